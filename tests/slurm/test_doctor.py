"""`doctor` on the login node of a real Slurm: its job, what the nodes find, and that nothing of it is left."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import GONE_S, START_S, command, until
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import SITE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("machines")]

PATIENT = ["recovery.heartbeat_timeout_s=60", "recovery.world_s=60", "model.preset=tiny"]
"""A machine that others use too is slow, and no problem."""

AGREED = {
    "versions": r"^Python 3\.\d+",
    "Slurm": r"^slurm-wlm 22\.05\.\d+; srun --mpi offers pmi2",
    "kernel": r"pidfd.*flock",
    "limits": r"threads started, memlock \S+",
    "memory charge": r"^not known whether /dev/shm counts as memory of the job",
    "interface": r"^ib0 \(of the default route\) is up, .*; no RDMA device behind it; window hosts use TCP over it",
    "locking": r"^flock and exclusive files of n\d are seen by n\d; a file and its answer take \d+ ms",
    "MPI world": r"^2 window hosts by srun --mpi=pmi2 up in \d+\.\d\d s .* Rget, verified, .*; TCP over ib0$",
    "clocks": r"^against the login node: n\d [+-]\d+ ms, n\d [+-]\d+ ms, each known to \d+ ms",
    "no-kill": r"^sbatch and srun take --no-kill; whether it is honoured Slurm does not tell",
}
"""Findings that hold for both nodes."""

OF_EACH = ("memory", "memory files", "leftovers", "clock", "run directory")


def doctor(cluster: SlurmCluster, place: Path, *options: str) -> "subprocess.Popen[bytes]":
    site = place / "test.yaml"
    site.write_text(SITE.format(place=place))
    words = command("doctor", "--site", str(site), *options, *PATIENT)
    with (place / "output").open("wb") as output, (place / "errors").open("wb") as errors:
        return subprocess.Popen(
            cluster.login.enter(words, place), stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )


def left(cluster: SlurmCluster, place: Path) -> list[str]:
    """Return what there still is: jobs, folders, processes, files in memory."""
    found = cluster.run("squeue", "-h", "-o", "%j %T").stdout.splitlines()
    found += [str(path) for path in place.rglob(".gemini*")]
    for node in (cluster.login, *cluster.nodes.values()):
        words = ["sh", "-c", "ls -d /dev/shm/* 2>/dev/null; pgrep -af '[g]emini_hpc'"]
        shown = subprocess.run(node.enter(words), capture_output=True, text=True).stdout.splitlines()
        # the login node's processes are all of the others', too
        found += [f"{node.name}: {line}" for line in shown]
    return found


def test_the_compute_nodes_are_probed_by_a_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    process = doctor(cluster, tmp_path, "--json")
    assert process.wait(START_S) == 0, (tmp_path / "output").read_text() + (tmp_path / "errors").read_text()
    told = json.loads((tmp_path / "output").read_text())
    here = [finding["probe"] for finding in told["findings"] if "nodes" not in finding]
    assert here == ["versions", "Slurm", "run directory", "job"]
    there = [finding for finding in told["findings"] if "nodes" in finding]
    assert all(finding["level"] in ("ok", "warning") for finding in there), there
    nodes = sorted({node for finding in there for node in finding["nodes"]})
    assert len(nodes) == 2
    for probe, words in AGREED.items():
        (finding,) = [finding for finding in there if finding["probe"] == probe]
        assert finding["nodes"] == nodes and re.search(words, finding["text"]), finding
    for probe in OF_EACH:
        assert sorted(node for f in there if f["probe"] == probe for node in f["nodes"]) == nodes
    assert {finding["probe"] for finding in there} == {*AGREED, *OF_EACH}
    assert told["notes"] == [] and told["numbers"]["timeout_min"] == 20
    assert told["verdict"].startswith("0 problems, ") and told["verdict"].endswith("submit can go ahead")
    waits = (tmp_path / "errors").read_text()
    assert re.search(r"^waiting for: job \d+ \(RUNNING\) on n\d, n\d$", waits, re.MULTILINE), waits
    assert left(cluster, tmp_path) == []


def test_what_is_broken_on_the_nodes_alone_is_a_problem_told_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "broken/mpi4py").mkdir(parents=True)
    (tmp_path / "broken/mpi4py/__init__.py").write_text("raise ImportError('no libmpi here')")
    setup = f"site.slurm_setup=['export PYTHONPATH={tmp_path}/broken:$PYTHONPATH']"
    process = doctor(cluster, tmp_path, "--json", setup)
    assert process.wait(START_S) == 1
    told = json.loads((tmp_path / "output").read_text())
    (found,) = [finding for finding in told["findings"] if finding["level"] == "problem"]
    assert found["probe"] == "MPI world" and len(found["nodes"]) == 2
    assert "the MPI world of 2 window hosts broke down (ImportError: no libmpi here): " in found["text"]
    assert told["verdict"].startswith("1 problem, ")
    assert left(cluster, tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_doctor_that_is_ended_leaves_neither_job_nor_folder(
    cluster: SlurmCluster, tmp_path: Path, number: signal.Signals
) -> None:
    process = doctor(cluster, tmp_path)
    output = tmp_path / "output"
    until(lambda: "n1, n2: " in output.read_text() or process.poll() is not None, "a finding of the nodes", START_S)
    assert list(tmp_path.glob(".gemini-doctor-*")) and cluster.run("squeue", "-h").stdout
    # enter.py stays before the command, and passes no signal on
    cluster.run("pkill", f"-{number.name[3:]}", "-o", "-f", f"^{sys.executable} -m gemini_hpc.doctor")
    assert process.wait(GONE_S + GONE_S) == 130, output.read_text()
    assert "waiting for: the end of the job, which is cancelled" in output.read_text()
    until(lambda: not left(cluster, tmp_path), f"the end of {left(cluster, tmp_path)}", GONE_S)


def test_a_job_that_waits_says_why_and_is_cancelled_in_time(cluster: SlurmCluster, tmp_path: Path) -> None:
    taken = cluster.run("sbatch", "--parsable", "-N6", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    job = taken.stdout.strip()
    try:
        until(lambda: len(cluster.states("alloc")) == 6, "all nodes to be taken", GONE_S)
        process = doctor(cluster, tmp_path, "--wait-min", "0.1")
        assert process.wait(START_S) == 0, (tmp_path / "errors").read_text()
        text = (tmp_path / "output").read_text()
        assert re.search(r"^waiting for: job \d+ to start \(up to 0.1 min\): PENDING \(Resources\)$", text, re.M), text
        assert re.search(r"^warning  job +job \d+ did not start within 0.1 min", text, re.M), text
        assert cluster.run("squeue", "-h", "-o", "%i").stdout.split() == [job]
        assert list(tmp_path.rglob(".gemini*")) == []
    finally:
        cluster.run("scancel", job)
        until(lambda: not cluster.run("squeue", "-h").stdout, "the end of all jobs", GONE_S)
