"""The job script, a pure function of its parameters: `--dry-run` prints it, `submit` submits it."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from submitit.slurm.slurm import _convert_mem, _make_sbatch_string

from gemini_hpc.config import RunConfig, SiteConfig

_HEADER = """\
# {name} under gemini_hpc. Rendered by: python -m gemini_hpc.submit --dry-run{arguments}
#   {start} THIS_FILE            a new run, from the repository root after `make`
#   {start} THIS_FILE RUN_DIR    go on with a run that exists"""

_WHY = {
    "account": "The account that pays.",
    "constraint": "All nodes of one kind.",
    "cpus-per-task": "Cores of each node: the worker, and a little for its agent, window host and archiver.",
    "gpus-per-node": "GPUs of each node. Those of spares count as well.",
    "job-name": "The name in squeue.",
    "mem": "Memory of each node: the worker, and the arena, as /dev/shm often counts as memory of the job.",
    "no-kill": "The job lives on when a node of it fails: that is what the spares are for.",
    "nodes": "{active} nodes that train and {spares} standing by; sbatch --nodes may give it more or fewer of those.",
    "ntasks-per-node": "One agent for each node; it starts everything else there.",
    "open-mode": "After a requeue the log goes on.",
    "output": "The supervisor's log, where sbatch was called; all else is in the run directory.",
    "partition": "Where the job may run.",
    "requeue": "Slurm may start the job again, on other nodes too: it goes on from its newest checkpoint.",
    "signal": "So many seconds before the time limit the supervisor is told, and ends the run in order.",
    "time": "Time limit in minutes.",
}
"""Why each option is there."""

_FROM_SITE = "Asked for in the site file."

_BODY = """\
set -eu
run_dir=${{1:-}}
if [ -z "$run_dir" ]; then
    # The job makes its own run directory, under a name that it finds again after a requeue.
    run_dir=$({python} -m gemini_hpc.submit --prepare "job-${{SLURM_JOB_ID:-$$}}"{arguments})
fi
# exec: what Slurm or submitit signals must reach the supervisor itself.
exec {python} -u -m gemini_hpc.runtime.supervisor "$run_dir\""""


_PROBE_HEADER = "# Probes compute nodes for gemini_hpc. Rendered, submitted and watched by: python -m gemini_hpc.doctor"

_PROBE_BODY = 'exec {python} -u -m gemini_hpc.runtime.probes.job "$1"'

_WHY_PROBE = {
    "no-kill": "As a run asks for it.",
    "no-requeue": "Nobody waits for a second try.",
    "nodes": "Two show what there is between nodes.",
    "ntasks-per-node": "One probing program for each node.",
    "output": "Overridden by doctor.",
    "signal": "Its end in order, should its time run out.",
}

_OF_A_WHOLE_RUN = (
    "array",
    "error",
    "job_name",
    "nodes",
    "open_mode",
    "output",
    "requeue",
    "signal",
    "time",
    "time_min",
)
"""Options that a site file may give runs, and that `doctor`'s job has to give itself."""


def job_script(config: RunConfig, arguments: Sequence[str]) -> str:
    """Return the job script of `config`, which the command line `submit ARGUMENTS` resolves to.

    It names neither the run directory, which is its own first argument, nor a path of this machine. On a
    local site it has no #SBATCH lines: submitit's local executor runs it as it is.
    """
    site = config.site
    if site.kind == "local":
        lines = [
            "#!/bin/bash",
            _header(config.name, "bash", arguments),
            "",
            _body(site.python, arguments),
            "",
        ]
        return "\n".join(lines)
    return render_script(
        job_name=config.name,
        arguments=arguments,
        active=config.cluster.nodes,
        spares=config.cluster.spares,
        python=site.python,
        timeout_min=site.timeout_min,
        signal_delay_s=site.signal_delay_s,
        additional_parameters=site.slurm_additional_parameters,
        **_of_each_node(site),
    )


def probe_script(config: RunConfig, name: str, nodes: int, timeout_min: int) -> str:
    """Return the script of the job called `name` in which `doctor` probes `nodes` nodes; its argument is a folder.

    It asks for its nodes as a run does, but for few, for a short time, and never again.
    """
    site = config.site
    named = {key.replace("-", "_"): value for key, value in site.slurm_additional_parameters.items()}
    return _render(
        _PROBE_HEADER,
        _PROBE_BODY.format(python=site.python),
        {**_WHY, **_WHY_PROBE},
        {
            "no_kill": True,
            **{key: value for key, value in named.items() if key not in _OF_A_WHOLE_RUN},
            "no_requeue": True,
            "signal": "B:TERM@10",
            "output": "slurm-%j.out",
        },
        job_name=name,
        nodes=nodes,
        time=timeout_min,
        **_of_each_node(site),
    )


def _of_each_node(site: SiteConfig) -> dict[str, Any]:
    return {
        "mem_gb": site.mem_gb,
        "cpus_per_task": site.cpus_per_task,
        "gpus_per_node": site.gpus_per_node,
        "partition": site.slurm_partition,
        "constraint": site.slurm_constraint,
        "account": site.slurm_account,
        "setup": site.slurm_setup,
    }


def render_script(
    *,
    job_name: str,
    arguments: Sequence[str],
    active: int,
    spares: int,
    python: str,
    timeout_min: int,
    signal_delay_s: int,
    mem_gb: float | None = None,
    cpus_per_task: int | None = None,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    constraint: str | None = None,
    account: str | None = None,
    setup: Sequence[str] = (),
    additional_parameters: Mapping[str, Any] | None = None,
) -> str:
    """Return the batch script of one job of active + spares nodes, each option below a line that explains it.

    `additional_parameters` are sbatch options by their long names and win over ours; false takes one of ours
    away. The options are rendered by submitit 1.5.4's `_make_sbatch_string`.
    """
    options: dict[str, Any] = {
        "no_kill": True,
        "requeue": True,
        "signal": f"B:USR2@{signal_delay_s}",  # B: the batch process, which is the supervisor, not the steps
        "output": "slurm-%j.out",
        **{key.replace("-", "_"): value for key, value in (additional_parameters or {}).items()},
    }
    return _render(
        _header(job_name, "sbatch", arguments),
        _body(python, arguments),
        {**_WHY, "nodes": _WHY["nodes"].format(active=active, spares=spares)},
        options,
        job_name=job_name,
        nodes=active + spares,
        time=timeout_min,
        mem_gb=mem_gb,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        partition=partition,
        constraint=constraint,
        account=account,
        setup=setup,
    )


def _render(
    header: str,
    body: str,
    why: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    mem_gb: float | None,
    setup: Sequence[str],
    **parameters: Any,
) -> str:
    unset: Any = None  # submitit's own default is refused where such keys are checked
    text = _make_sbatch_string(
        command=body,
        folder=".",
        stderr_to_stdout=True,
        use_srun=False,
        ntasks_per_node=1,
        mem=None if mem_gb is None else _convert_mem(mem_gb),
        setup=list(setup) or None,
        wckey=unset,
        additional_parameters={key: value for key, value in options.items() if value is not False},
        **parameters,
    )
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            key = line.removeprefix("#SBATCH --").partition("=")[0]
            lines.append(f"# {why.get(key, _FROM_SITE)}")
        lines.append(line)
    return "\n".join([lines[0], header, *lines[1:], ""])


def _header(name: str, start: str, arguments: Sequence[str]) -> str:
    return _HEADER.format(name=name, start=start, arguments=_words(arguments).replace("\n", " "))


def _body(python: str, arguments: Sequence[str]) -> str:
    return _BODY.format(python=python, arguments=_words(arguments))


def _words(arguments: Sequence[str]) -> str:
    return "".join(f" {shlex.quote(argument)}" for argument in arguments)
