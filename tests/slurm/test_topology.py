"""Failure domains from the site file and from Slurm, for which a script stands in; its words are the manual's."""

from pathlib import Path

import pytest

from gemini_hpc.config import RunConfig, load_run
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.runtime.cluster import arranged_nodes, domains_of

SCONTROL = """\
#!/bin/sh
case "$*" in
"show topology")
    echo "SwitchName=s1 Level=0 LinkSpeed=1 Nodes=n[1-3]"
    echo "SwitchName=s2 Level=0 LinkSpeed=1 Nodes=n[4-6]"
    echo "SwitchName=top Level=1 LinkSpeed=1 Nodes=n[1-6] Switches=s[1-2]";;
"show hostnames n[1-3]") printf 'n1\\nn2\\nn3\\n';;
"show hostnames n[4-6]") printf 'n4\\nn5\\nn6\\n';;
"show hostnames n[1-6]") printf 'n1\\nn2\\nn3\\nn4\\nn5\\nn6\\n';;
"show hostnames n3") echo n3;;
*) exit 1;;
esac
"""

ALL = tuple(f"n{number}" for number in range(1, 7))


def on_slurm(*overrides: str) -> RunConfig:
    return load_run(overrides=["cluster.nodes=4", "cluster.spares=2", "drills=[]", *overrides], site="generic_slurm")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-6]")
    return scontrol


@pytest.mark.usefixtures("slurm")
def test_leaf_switches_are_domains_and_partners_are_at_different_ones() -> None:
    nodes, domains = arranged_nodes(on_slurm("site.failure_domains=topology"))
    assert domains == {"n1": "s1", "n2": "s1", "n3": "s1", "n4": "s2", "n5": "s2", "n6": "s2"}
    assert nodes == ("n1", "n4", "n2", "n5", "n3", "n6")


@pytest.mark.usefixtures("slurm")
def test_racks_of_the_site_file_and_none() -> None:
    nodes, domains = arranged_nodes(on_slurm("site.failure_domains={left: 'n[1-3]', right: 'n[4-6]'}"))
    assert nodes == ("n1", "n4", "n2", "n5", "n3", "n6") and domains["n6"] == "right"
    assert arranged_nodes(on_slurm()) == (ALL, {})


@pytest.mark.usefixtures("slurm")
def test_a_node_in_two_racks_is_refused() -> None:
    with pytest.raises(UserError, match="n3 is in left and in right: put it into one"):
        domains_of(on_slurm("site.failure_domains={left: 'n[1-3]', right: 'n3'}"), ALL)


def test_without_switches_slurm_has_no_topology(slurm: Path) -> None:
    slurm.write_text("#!/bin/sh\n")
    with pytest.raises(GeminiError, match=r"knows no switches .*: name the nodes in site.failure_domains"):
        domains_of(on_slurm("site.failure_domains=topology"), ALL)


def test_only_slurm_has_a_topology() -> None:
    with pytest.raises(UserError, match="only Slurm has a topology: name the nodes"):
        load_run(overrides=["site.failure_domains=topology"], site="local")
