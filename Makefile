# A fresh clone needs Python 3.11 (or 3.12), pip, make and a compiler; everything else goes into .venv.
# Only relative paths, all quoted: make itself cannot name a path with a space.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help run test simulate-faults check faults slurm-faults slurm-demo lab bench clean FORCE

# Modules loaded on a cluster often set these; packages from outside would be taken for our own.
unexport PYTHONPATH PYTHONHOME

PYTHON ?=
ARGS ?=
PY := .venv/bin/python

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 22
	echo 'Options are passed on with ARGS, as in: make run ARGS="--nodes 3 train.steps=60"'

run: .venv/.ready ## the main job: train, lose a node, go on (python -m gemini_hpc.submit)
	@exec $(PY) -m gemini_hpc.submit $(ARGS)

test: .venv/.ready ## all tests but the long rows of the fault matrix
	@exec $(PY) -m pytest $(ARGS)

SEEDS ?= 0:100000
simulate-faults: .venv/.ready ## schedules of failures on a simulated cluster (SEEDS=0:100000; one seed is replayed)
	@exec $(PY) -m tests.scenarios.schedules $(SEEDS) $(ARGS)

check: .venv/.ready ## format, lint, types, import contracts, shell scripts, then all tests
	@$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck .ci/run $(wildcard sbatch/*.sh)
	exec $(PY) -m pytest $(ARGS)

faults: .venv/.ready ## the fault matrix: every failure on real processes, and a table of what became of it (20 minutes)
	@exec $(PY) -m pytest -m faults $(ARGS) tests/cluster

slurm-faults: .venv/.ready ## the same for nodes of a real Slurm: they lose their power, their link, their time
	@exec $(PY) -m pytest -m faults $(ARGS) tests/slurm

slurm-demo: .venv/.ready ## a Slurm of six nodes on this machine, a job, and a node that loses its power
	@exec $(PY) -m tests.slurm.demo

lab: .venv/.ready ## JupyterLab on notebooks/
	@as_root=(); if [ "$$(id -u)" = 0 ]; then as_root=(--allow-root); fi
	exec $(PY) -m jupyterlab "$${as_root[@]}" $(ARGS) notebooks/

BENCH ?= snapshot pull interleaving
bench: .venv/.ready ## tables of what protection costs (13 minutes; BENCH="decisions recovery steadiness": the others)
	@for name in $(BENCH); do echo "== $$name"; $(PY) -m "benchmarks.$$name" $(ARGS); done

clean: ## remove .venv and every cache (runs/ is kept)
	@rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache build ./*.egg-info
	find . \( -name .git -o -path ./runs \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the place it was made for. No stamp (interrupted: pip cannot tell a half-written package from a
# whole one), another place (a clone that was moved), no Python: start afresh. An edited setup.cfg: update in place.
SOUND = [ -x $(PY) ] && [ "$$(cat .venv/.ready 2>/dev/null)" = "$$(pwd -P)" ]

# torch first, from its pin: an open range anywhere would pull another build and gigabytes of CUDA.
# DeepSpeed builds in isolation (no torch there): its setup then probes neither a GPU nor nvcc.
.venv/.ready: setup.cfg constraints.txt $(shell $(SOUND) || echo FORCE)
	@exec 9< Makefile; flock 9  # two makes at once in one clone: the second finds it done
	if $(SOUND) && [ .venv/.ready -nt setup.cfg ] && [ .venv/.ready -nt constraints.txt ]; then exit; fi
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3 python) ''; do
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && break
	done || { echo 'set-up: needs Python 3.11 or 3.12; install it, or name it: make PYTHON=/path/to/python3.11 ...' >&2; exit 2; }
	if [ -e .venv/setup.log ] && ! { $(SOUND); }; then rm -rf .venv; fi  # without our log it is somebody else's
	rm -f .venv/.ready; mkdir -p .venv; : > .venv/setup.log
	trap 'code=$$?; [ $$code = 0 ] || { tail -n 30 .venv/setup.log; echo "set-up did not finish (all of it: .venv/setup.log); the next make starts it afresh"; } >&2' EXIT
	log() { "$$@" >> .venv/setup.log 2>&1; }
	pip() { log $(PY) -m pip --no-input --disable-pip-version-check "$$@"; }
	install() { DS_BUILD_OPS=0 pip install --no-user --constraint constraints.txt --build-constraint constraints.txt "$$@"; }
	echo 'set-up 1/4: Python environment in .venv (once, about 2 minutes in all)'
	# A Python without ensurepip (Debian without python3-venv) lends its own pip.
	log "$$python" -m venv .venv || { log "$$python" -m venv --without-pip .venv; log "$$python" -m pip --python $(PY) install --no-user pip; }
	pip install --no-user --constraint constraints.txt pip
	echo 'set-up 2/4: torch'
	install torch
	echo 'set-up 3/4: DeepSpeed, MPI, JupyterLab and the rest'
	install --editable '.[dev,wikipedia]'
	echo 'set-up 4/4: check'
	pip check
	pwd -P > .venv/.ready
