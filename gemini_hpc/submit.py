"""`python -m gemini_hpc.submit`: check a run, make its directory, submit its job, and watch it in the foreground."""

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from gemini_hpc import __version__, versions
from gemini_hpc.cli import Parser, run_command, split_settings
from gemini_hpc.config import CONFIG_FILE, EXAMPLE, RunConfig, capacity, dump, load_run, read_run
from gemini_hpc.data import check_source
from gemini_hpc.errors import UserError
from gemini_hpc.models import presets
from gemini_hpc.persist import manifest
from gemini_hpc.progress import Progress
from gemini_hpc.runtime.children import ATTACHED
from gemini_hpc.runtime.fingerprint import fingerprint
from gemini_hpc.runtime.living import claim, whereabouts
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import read_status, update_status
from gemini_hpc.slurm.control import SlurmError, SlurmJob
from gemini_hpc.slurm.script import job_script

CANCEL_GRACE_S = 15.0
ENVIRONMENT_FILE = "env.json"
PACKAGES = ("torch", "deepspeed", "mpi4py", "mpich", "h5py", "submitit", "plotly", "pyzmq")


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.resume is not None:
        run_dir, config = _resume(Path(options.resume), options)
    else:
        config = load_run(options.config, options.overrides, options.nodes, options.spares, options.site)
        run_dir = Path(config.site.runs_dir, options.prepare or _new_name(config))
    if config.train.entry == EXAMPLE:
        presets.model_shape(config.model.family, config.model.preset, config.model.seq_len)
    script = job_script(config, _script_arguments(options))
    if options.dry_run:
        print(f"{script}\n# --- {CONFIG_FILE}, resolved ---\n{dump(config)}", end="")
        return 0
    if options.prepare and (run_dir / CONFIG_FILE).exists():  # the job was requeued: it goes on where it was
        print(run_dir.resolve())
        return 0
    needs, corpus = _check(config)
    if options.resume is not None:
        _check_corpus(run_dir, corpus)
    if options.resume is None:
        run_dir = _claim(run_dir)
    _fill_directory(run_dir, config, script, corpus)
    if options.prepare:
        print(run_dir.resolve())
        return 0
    if options.resume is not None:
        update_status(RunPaths(run_dir.resolve(), Path(config.site.shm_dir)), state="starting", waiting_for=[])
    return _submit(run_dir, config, needs, wait=config.site.kind == "local" if options.wait is None else options.wait)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gemini_hpc.submit",
        description="Train with DeepSpeed ZeRO-3 through the loss of nodes. Without arguments: the main job.",
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key.sub=value", help="a YAML file, and overrides")
    parser.add_argument("--site", help="auto (default), local, ibex, or a YAML file")
    parser.add_argument("--nodes", type=int, help="nodes that train")
    parser.add_argument("--spares", type=int, help="nodes that stand by")
    parser.add_argument("--dry-run", action="store_true", help="print the job script and the configuration; do nothing")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on from the newest checkpoint of a run")
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, help="watch until the end (local: default)")
    parser.add_argument("--prepare", metavar="NAME", help=argparse.SUPPRESS)  # called by the job script
    options = parser.parse_intermixed_args(arguments)
    options.config, options.overrides = split_settings(options.settings)
    return options


def _script_arguments(options: argparse.Namespace) -> list[str]:
    """Return what the job script needs to resolve the same run again."""
    flags = [("--site", options.site), ("--nodes", options.nodes), ("--spares", options.spares)]
    given = [text for flag, value in flags if value is not None for text in (flag, str(value))]
    return [*([options.config] if options.config else []), *given, *options.overrides]


def _new_name(config: RunConfig) -> str:
    return f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


# --- checks, before anything is made ----------------------------------------------------------------------


def _check(config: RunConfig) -> tuple[capacity.Needs | None, str]:
    """Return what the run needs and its corpus's fingerprint; UserError for text or memory that is not there."""
    room = capacity.room_at(config.site)
    if config.train.entry != EXAMPLE:
        _check_entry(config.train.entry)
        return None, ""  # somebody else's model and data: known once they are built
    model = config.model
    corpus = check_source(config.data, model.seq_len)
    shapes = presets.shapes_by_preset(model.family, model.seq_len)
    return capacity.check(config, shapes, room), corpus


def _check_entry(name: str) -> None:
    """Look for the module of "package.module:function", as a worker would, without running it."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        found = find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UserError(f"train.entry {name!r}: no module {top!r} here or in this Python; give module:function")


def _check_corpus(run_dir: Path, corpus: str) -> None:
    """The losses of a resumed run mean something only if it goes on with the same text."""
    try:
        before = json.loads((run_dir / ENVIRONMENT_FILE).read_text())["corpus"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{run_dir / ENVIRONMENT_FILE} cannot be read; start a new run") from error
    if before != corpus:
        raise UserError(
            f"the text that {run_dir} trains on has changed since it began; bring it back, or start a new run"
        )


def _resume(run_dir: Path, options: argparse.Namespace) -> tuple[Path, RunConfig]:
    if options.config is not None:
        raise UserError(f"--resume goes on with the run's own {CONFIG_FILE}; leave out {options.config}")
    before = read_run(run_dir)
    site = options.site or before.site.name
    config = load_run(run_dir / CONFIG_FILE, options.overrides, options.nodes, options.spares, options.site)
    paths = RunPaths(run_dir.resolve(), Path(config.site.shm_dir))
    if where := whereabouts(paths, before):
        raise UserError(
            f"{run_dir} is being run already ({where}; site {site}); "
            f"watch it: python -m gemini_hpc.status {shlex.quote(str(run_dir))}"
        )
    try:
        valid, rejected = manifest.survey(run_dir)
        published = manifest.published(run_dir)
    except manifest.PersistError as error:
        raise UserError(f"{error}; make it readable, or start a new run") from error
    newest = valid[0] if valid else None
    if published and not newest:  # rather than quietly from the beginning, over what may still be saved
        raise UserError(f"no checkpoint of {run_dir} can be used ({rejected[0]}); repair one, or start a new run")
    if fingerprint(before) != fingerprint(config) or (newest and newest.fingerprint != fingerprint(config)):
        raise UserError(
            f"{run_dir} was started with other settings of model, data, train or number of nodes; "
            "resume it without those overrides, or start a new run"
        )
    status = read_status(paths)
    proven = status.get("state") == "finished" and (status.get("verdict") or not config.verify)
    if newest and newest.step >= config.train.steps and proven:
        raise UserError(f"{run_dir} has done all its {config.train.steps} steps; start a new run")
    return run_dir, config


def _claim(wanted: Path) -> Path:
    """Make a new run directory, under the next free name if somebody else made this one a moment ago."""
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in count(2):
            try:
                run_dir = wanted if number == 2 else wanted.with_name(f"{wanted.name}-{number - 1}")
                run_dir.mkdir(mode=0o700)
                return run_dir
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"cannot make {wanted} ({error.strerror}); set site.runs_dir to a folder of yours") from error
    raise AssertionError("unreachable")


def _fill_directory(run_dir: Path, config: RunConfig, script: str, corpus: str) -> None:
    try:
        for name in ("logs", "events", "checkpoints"):
            (run_dir / name).mkdir(exist_ok=True)
        environment = {**_environment(), "corpus": corpus}
        files = {
            "submit.sh": script,
            ENVIRONMENT_FILE: json.dumps(environment, indent=1) + "\n",
            CONFIG_FILE: dump(config),
        }
        for name, text in files.items():  # of a run that is resumed there are some, which must not be lost
            (run_dir / f".{name}.tmp").write_text(text)
        for name in files:
            os.replace(run_dir / f".{name}.tmp", run_dir / name)
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir} ({error.strerror}); set site.runs_dir to a folder of yours"
        ) from error


def _environment() -> dict[str, object]:
    return {
        "gemini_hpc": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "host": platform.node(),
        "kernel": platform.release(),
        "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


# --- the job ------------------------------------------------------------------------------------------------


def _submit(run_dir: Path, config: RunConfig, needs: capacity.Needs | None, wait: bool) -> int:
    from gemini_hpc.slurm.submission import submit_job  # submitit takes a moment to import

    if wait and config.site.kind == "local":
        os.environ[ATTACHED] = str(os.getpid())
    shown = shlex.quote(str(run_dir))
    print(f"run      {run_dir}")
    job = f"{config.model.family} {config.model.preset}" if config.train.entry == EXAMPLE else config.train.entry
    print(
        f"         {job}, {config.cluster.nodes} nodes + "
        f"{config.cluster.spares} spare, {config.protect.replicas} copies of every snapshot"
    )
    if needs:
        print(f"memory   {needs.snapshot_bytes / 1e6:.1f} MB a snapshot, {needs.arena_bytes / 1e6:.1f} MB a node")
    if versions.mismatch():
        print(f"versions {versions.mismatch()}: a recovery builds engines anew (1 to 2 s) instead of swapping them")
    told_to_end: list[int] = []
    if wait:  # noted rather than raised: whatever comes when, and however often, the job is cancelled once, in order
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda told, _frame: told_to_end.append(told))
    job = submit_job(config, run_dir)
    if config.site.kind == "slurm":
        _claim_run(RunPaths(run_dir.resolve(), Path(config.site.shm_dir)), job.id)
    print(f"job      {job.id}")
    print(f"watch    python -m gemini_hpc.status {shown}")
    if config.site.kind == "slurm":
        print(f"log      {job.log}")
        print(f"cancel   scancel {job.id}")
    if not wait:
        print(f"resume   python -m gemini_hpc.submit --resume {shown}")
        return 0
    progress = Progress(RunPaths(run_dir.resolve(), Path(config.site.shm_dir)), sys.stdout)
    while not job.done() and not told_to_end:
        progress.show()
        time.sleep(0.1)
    if told_to_end:
        print("\nstopping ...", flush=True)
        job.cancel(CANCEL_GRACE_S)
        if read_status(progress.paths).get("state") == "finished":
            print("stopped; the training itself was done")
        else:
            print(f"stopped; go on with: python -m gemini_hpc.submit --resume {shown}")
        return 130
    return progress.conclude(job.log)


def _claim_run(paths: RunPaths, job_id: str) -> None:
    """Have `status` know the job while it waits in the queue; of two that were submitted at once one goes."""
    try:
        other = claim(paths, job_id)
    except (SlurmError, OSError):  # it is busy, or the disk is full: the job does it when it starts
        return
    if other:
        with suppress(SlurmError):  # it would see for itself that it is not wanted
            SlurmJob(job_id, CANCEL_GRACE_S).cancel()
        raise UserError(f"{paths.run_dir} is being run already, as job {other}; job {job_id} was cancelled")


if __name__ == "__main__":
    sys.exit(run_command(main))
