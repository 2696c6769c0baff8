"""The pure parts of probing compute nodes: what several nodes found, their clocks, locks and devices."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gemini_hpc.config import load_run
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.probes import compute, nodes
from gemini_hpc.runtime.probes.between import judge_locks
from gemini_hpc.runtime.probes.folder import Folder
from gemini_hpc.runtime.probes.nodes import Stream, judge_clocks, merged, no_kill, silent

LISTED = """\
MPI plugin types are...
\tnone
\tpmi2
\tpmix
specific pmix plugin versions available: pmix_v4
"""


def found(text: str, level: str = "ok", seconds: float = 1.0) -> dict[str, Any]:
    return {"probe": "memory", "level": level, "text": text, "seconds": seconds}


def test_what_all_nodes_agree_on_is_one_line() -> None:
    row = {"n1": found("8 GiB"), "n2": found("8 GiB", seconds=3.0)}
    assert list(merged(row)) == [(["n1", "n2"], found("8 GiB", seconds=3.0))]


def test_what_nodes_do_not_agree_on_is_a_line_each() -> None:
    row = {"n1": found("8 GiB"), "n2": found("9 GiB"), "n3": found("8 GiB", "warning"), "n4": found("8 GiB")}
    assert [(names, line["level"]) for names, line in merged(row)] == [
        (["n1", "n4"], "ok"),
        (["n2"], "ok"),
        (["n3"], "warning"),
    ]


def test_a_node_may_have_nothing_to_say() -> None:
    assert list(merged({"n1": found("seen by n2"), "n2": found("")})) == [(["n1"], found("seen by n2"))]
    assert list(merged({"n1": None, "n2": found("8 GiB")})) == [(["n2"], found("8 GiB"))]


def test_a_node_that_falls_silent_is_named_with_its_last_word() -> None:
    words = [found("8 GiB"), found("9 GiB")]
    assert silent({"n1": words, "n2": words[:1], "n3": [], "n4": words}) == {"n2": "memory", "n3": "its start"}
    assert silent({"n1": words}) == {} and silent({}) == {}


def test_clocks_are_told_with_what_is_known_of_them() -> None:
    told = judge_clocks({"n1": (-0.010, 0.030), "n2": (0.100, 0.120)})
    assert told.level == "ok"
    assert told.text == (
        "against the login node: n1 +10 ms, n2 +110 ms, each known to 20 ms; between nodes at most 130 ms"
    )


@pytest.mark.parametrize(
    ("bounds", "level"),
    [
        ({"n1": (1.5, 1.6)}, "warning"),
        ({"n1": (-1.6, -1.5)}, "warning"),
        ({"n1": (-0.6, -0.5), "n2": (0.6, 0.7)}, "warning"),  # apart from each other
        ({"n1": (-5.0, 5.0)}, "ok"),  # that imprecise: nothing is known against it
        ({"n1": (0.2, 0.1)}, "warning"),  # set meanwhile
    ],
)
def test_only_clocks_that_surely_differ_are_warned_of(bounds: dict[str, tuple[float, float]], level: str) -> None:
    assert judge_clocks(bounds).level == level


def test_no_kill_is_said_to_be_unknown_and_its_absence_is_warned_of() -> None:
    assert no_kill(load_run(site="generic_slurm")).level == "ok"
    for key in ("no-kill", "no_kill"):
        without = load_run(site="generic_slurm", overrides=[f"site.slurm_additional_parameters={{{key}: false}}"])
        told = no_kill(without)
        assert told.level == "warning" and "submit --resume" in told.text


@pytest.mark.parametrize(
    ("refused", "level", "words"),
    [
        ({"lock": True, "claim": True}, "ok", "flock and exclusive files of n1 are seen by n2"),
        ({"lock": False, "claim": True}, "ok", "flock of n1 is not seen by n2, which no run needs"),
        ({"lock": True, "claim": False}, "problem", "n1 and n2 both made one file"),
    ],
)
def test_locks_are_judged_by_what_is_refused(refused: dict[str, bool], level: str, words: str) -> None:
    told = judge_locks("n1", {"n2": refused}, 0.012)
    assert told.level == level and told.text.startswith(words)


def test_files_that_are_seen_late_are_warned_of() -> None:
    told = judge_locks("n1", {"n2": {"lock": True, "claim": True}}, 30.0)
    assert told.level == "warning" and "30000 ms" in told.text


def test_what_srun_offers_is_read_of_new_and_old_versions() -> None:
    assert compute.mpi_kinds(LISTED) == ["pmi2", "pmix", "pmix_v4"]
    assert compute.mpi_kinds("srun: MPI types are...\nsrun: none\nsrun: openmpi\nsrun: pmi2\n") == ["pmi2"]
    assert compute.mpi_kinds("MPI plugin types are...\n\tnone\n") == []


def test_memory_that_is_charged_is_told_from_noise() -> None:
    assert "does not count" in compute.charge("/dev/shm", 100 << 20, 103 << 20).text
    charged = compute.charge("/dev/shm", 100 << 20, 165 << 20)
    assert charged.level == "ok" and "64 MiB there made it 65 MiB larger" in charged.text


@pytest.mark.parametrize(
    ("text", "words"), [("200000", "200 Gbit/s"), ("-1", "of unknown speed"), (None, "of unknown")]
)
def test_the_speed_of_an_interface(text: str | None, words: str, tmp_path: Path) -> None:
    (tmp_path / "ib0").mkdir()
    if text is not None:
        (tmp_path / "ib0" / "speed").write_text(f"{text}\n")
    assert compute.speed("ib0", tmp_path).startswith(words)


def test_the_rdma_device_is_that_of_the_same_card(tmp_path: Path) -> None:
    net, rdma = tmp_path / "net", tmp_path / "infiniband"
    for card, interface, device in (("1", "ib0", "mlx5_0"), ("2", "eth0", "mlx5_1")):
        (tmp_path / "pci" / card).mkdir(parents=True)
        (net / interface).mkdir(parents=True)
        (rdma / device / "ports/1").mkdir(parents=True)
        for link in (net / interface / "device", rdma / device / "device"):
            os.symlink(tmp_path / "pci" / card, link)
    (rdma / "mlx5_0/ports/1/rate").write_text("100 Gb/sec (4X EDR)\n")
    (net / "lo").mkdir()
    assert compute.rdma_devices("ib0", net, rdma) == ["mlx5_0 at 100 Gb/sec (4X EDR)"]
    assert compute.rdma_devices("eth0", net, rdma) == ["mlx5_1"]
    assert compute.rdma_devices("lo", net, rdma) == []
    assert compute.rdma_devices("ib0", net, tmp_path / "none") == []


def test_a_folder_shows_whole_values_only(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "shared")
    folder.path.mkdir()
    assert folder.read("ping") is None and folder.lines("found") == []
    folder.post("ping", [1, 2.5])
    folder.post("ping", {"again": True})
    assert folder.read("ping") == {"again": True}
    folder.add("found", 1)
    folder.add("found", 2)
    with (folder.path / "found").open("a") as file:
        file.write(json.dumps("half"))
    assert folder.lines("found") == [1, 2]
    assert sorted(path.name for path in folder.path.iterdir()) == ["found", "ping"]
    with pytest.raises(GeminiError, match="no pong"):
        folder.wait("pong", 0.05)
    folder.remove()
    assert not folder.path.exists()


def test_a_stream_is_read_line_by_line_across_a_fork() -> None:
    stream = Stream()
    assert stream.news() == []
    if (child := os.fork()) == 0:
        stream.tell(waits="one")
        stream.tell(finding={"probe": "memory"}, nodes=["n1"])
        os._exit(0)
    os.waitpid(child, 0)
    assert stream.news() == [{"waits": "one"}, {"finding": {"probe": "memory"}, "nodes": ["n1"]}]
    assert stream.news() == []


def test_its_job_has_a_bound_that_holds_all_that_is_waited_for() -> None:
    run = load_run(site="generic_slurm")
    probe = nodes.job_probe(run, Stream(), wait_min=10)
    assert probe.bound_s > 60 * (10 + nodes.JOB_MIN)
    assert probe.undo is not None and probe.undo_s > nodes.LEAVE_S
