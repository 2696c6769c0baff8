"""Sites: found by name wherever the package is, or by path."""

from pathlib import Path

import pytest

from gemini_hpc.config import resolve_site, site_names
from gemini_hpc.config.site import SITES_DIR, SiteConfig
from gemini_hpc.errors import UserError


def test_the_sites_of_the_package() -> None:
    assert {"local", "generic_slurm", "ibex"} <= set(site_names())
    for name in site_names():
        assert resolve_site(name).name == name


def test_every_key_of_a_site_file_is_commented_and_the_slurm_ones_are_complete() -> None:
    for name in site_names():
        text = (SITES_DIR / f"{name}.yaml").read_text()
        for paragraph in text.strip().split("\n\n"):
            assert paragraph.startswith("#"), f"{name}: {paragraph}"
    slurm_keys = set(SiteConfig.model_fields) - {"name", "call_timeout_s"}
    for name in ("generic_slurm", "ibex"):
        text = (SITES_DIR / f"{name}.yaml").read_text()
        assert {line.split(":")[0] for line in text.splitlines() if line and line[0].isalpha()} >= slurm_keys


def test_auto_is_slurm_where_sbatch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolve_site("auto").name == "local"
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\n")
    sbatch.chmod(0o755)
    assert resolve_site("auto").name == "generic_slurm"


def test_a_site_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_DISK", "/data/group")
    file = tmp_path / "mine.yaml"
    file.write_text("kind: slurm\nruns_dir: $GROUP_DISK/runs\nslurm_additional_parameters: {exclusive: true}\n")
    site = resolve_site(str(file))
    assert (site.name, site.kind, site.runs_dir) == ("mine", "slurm", "/data/group/runs")
    assert site.slurm_additional_parameters == {"exclusive": True}


def test_a_sites_own_open_mpi_is_for_slurm(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: ibex\nmpi: openmpi\n")
    assert (resolve_site(str(file)).mpi, resolve_site("ibex").mpi) == ("openmpi", "mpich")
    file.write_text("mpi: openmpi\n")
    with pytest.raises(UserError, match=r"mine.yaml: site.mpi is openmpi, .* Slurm sites only: set site.mpi=mpich"):
        resolve_site(str(file))


def test_a_job_has_time_to_be_saved(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: generic_slurm\ntimeout_min: 2\n")
    with pytest.raises(
        UserError, match=r"site.signal_delay_s is 120 s, and the job has 120 s in all: set site.timeout_min=12"
    ):
        resolve_site(str(file))


def test_a_site_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: ibex\nslurm_constraint: v100\n")
    mine, ibex = resolve_site(str(file)).model_dump(), resolve_site("ibex").model_dump()
    assert {key for key in mine if mine[key] != ibex[key]} == {"name", "slurm_constraint"}
    assert (mine["name"], mine["slurm_constraint"]) == ("mine", "v100")
    file.write_text("extends: ibx\n")
    with pytest.raises(UserError, match=r"mine.yaml: extends: 'ibx': .*did you mean ibex"):
        resolve_site(str(file))
    file.write_text("extends: ibex_v100\n")
    with pytest.raises(UserError, match="extends another one itself"):
        resolve_site(str(file))


def test_the_user_is_known_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert "$" not in resolve_site("ibex").runs_dir


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean ibex.*valid are auto, generic_slurm, ibex, .*, local"):
        resolve_site("ibx")
    with pytest.raises(UserError, match="No such file"):
        resolve_site("nowhere/ibex.yaml")


def test_a_wrong_key_in_a_site_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: slurm\npartition: gpu\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'partition': did you mean slurm_partition"):
        resolve_site(str(tmp_path / "mine.yaml"))
