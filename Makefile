# One command for each thing a newcomer wants. Every target makes .venv when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(VENV)/gpu
LOGGERS := $(VENV)/loggers
LAUNCHERS := $(VENV)/launchers
RAY := $(VENV)/ray
WHEELS := build/gpu-wheels
SITE := build/gpu-site
TUNIX ?= $(wildcard $(VENV)/tunix/bin/python)

# LLVM optimizes little, which halves the time of these tests. `make numerics` and `make parity` compile as users do.
FAST := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_parallel_codegen_split_count=1
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# The folders of tests that have a target of their own: they need more than pip, or no compile option.
APART := accelerators notebooks numerics parity tools

.PHONY: quickstart test test-all fuzz numerics parity tpu docs notebooks test-tools bench bench-check gpu-bench gpu-wheels tables lint format clean

quickstart: $(VENV)/ready
	$(BIN)/python -m experiments.quickstart

test: $(VENV)/ready-dev lint
	$(FAST) $(PYTEST) -m "not all" $(APART:%=--ignore=tests/%)

test-all: $(VENV)/ready-dev
	$(FAST) $(PYTEST) $(APART:%=--ignore=tests/%)

# Other inputs each time; FUZZ=--hypothesis-seed=N repeats one.
fuzz: $(VENV)/ready-dev
	$(FAST) $(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz $(FUZZ)

numerics: $(VENV)/ready-dev
	$(PYTEST) tests/numerics tests/kernels

parity: $(VENV)/ready-parity $(VENV)/ready-mergekit
	$(PYTEST) tests/parity

tpu: $(VENV)/ready-parity $(VENV)/ready-gpu
	PYTHONPATH=$(GPU) $(PYTEST) tests/accelerators

docs: $(VENV)/ready-docs
	$(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/ready-dev
	$(FAST) $(PYTEST) tests/notebooks

test-tools: docs $(VENV)/ready-loggers $(VENV)/ready-launchers $(VENV)/ready-skypilot $(VENV)/ready-ray-apart
	which chromedriver slurmctld slurmd sbatch || (apt-get update -qq && apt-get install -qq --no-install-recommends \
		chromium chromium-driver slurmctld slurmd slurm-client)
	PYTHONPATH=$(LOGGERS):$(RAY) $(FAST) $(BIN)/python -m pytest tests/tools

# Any machine with an NVIDIA GPU. One without a network that brings its own Python 3.12, jax and torch takes that Python
# and the wheels that `make gpu-wheels` wrote beforehand: make gpu-bench GPU_PYTHON=python3
gpu-bench: $(if $(GPU_PYTHON),,$(VENV)/ready-cuda-bench)
	$(if $(GPU_PYTHON),$(GPU_PYTHON) -m pip install -q --no-index --no-deps --upgrade --target $(SITE) $(WHEELS)/*.whl)
	PYTHONPATH=$(SITE) $(or $(GPU_PYTHON),$(BIN)/python) -m experiments.bench.gpu

# What such a machine lacks, at most 55 MB.
gpu-wheels: $(BIN)/python
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_24_x86_64 --platform any -d $(WHEELS) bitsandbytes gguf
	test $$(du -sb $(WHEELS) | cut -f1) -le 55000000

bench: $(VENV)/ready-parity
	$(BIN)/python -m experiments.bench.step --tunix=$(TUNIX)

bench-check: $(VENV)/ready-parity
	$(BIN)/python -m experiments.bench.step --check

tables: $(VENV)/ready
	$(BIN)/python -m experiments.tables

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# A stamp is written only when the install has succeeded, so that a broken one is done again. pip compiles what it
# installs on one core: all of them do so after it. Some packages bring files that are not of this Python.
INSTALL = $(BIN)/python -m pip install -q --no-compile -e
COMPILE = $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/ready: setup.py | $(BIN)/python
	$(INSTALL) .
	$(COMPILE)
	touch $@

# XLA's compiler for GPUs has a folder of its own: where it is installed, every process says that it finds no driver.
$(VENV)/ready-gpu: $(VENV)/ready-parity
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install -q --no-deps --target $(GPU) \
		"jax-cuda12-pjrt==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')"
	touch $@

# The packages of optional loggers have a folder of their own: they pin what others need in newer versions.
$(VENV)/ready-loggers: setup.py $(VENV)/ready-dev
	$(BIN)/python -m pip install -q --target $(LOGGERS) --upgrade alembic mlflow-skinny sqlalchemy wandb
	touch $@

# A peer of merging, without the packages of its own that no merge needs.
$(VENV)/ready-mergekit: $(VENV)/ready-parity
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/mergekit --upgrade mergekit==0.1.5 immutables sentencepiece
	touch $@

# The tools that start jobs on clusters pin much, and have an environment of their own.
$(VENV)/ready-launchers: $(BIN)/python
	$(PYTHON) -m venv $(LAUNCHERS)
	$(LAUNCHERS)/bin/python -m pip install -q --no-compile kubernetes-validate xpk
	touch $@

$(VENV)/ready-skypilot: $(BIN)/python
	$(PYTHON) -m venv $(VENV)/skypilot
	$(VENV)/skypilot/bin/python -m pip install -q --no-compile skypilot
	touch $@

# Beside the other packages, as one of the tests runs studies on it.
$(VENV)/ready-ray-apart: setup.py $(VENV)/ready-dev
	$(BIN)/python -m pip install -q --target $(RAY) --upgrade ray
	touch $@

# A peer of `make bench`, which runs without it too.
$(VENV)/ready-tunix:
	$(PYTHON) -m venv $(VENV)/tunix
	$(VENV)/tunix/bin/python -m pip install -q google-tunix
	touch $@

$(VENV)/ready-%: setup.py | $(BIN)/python
	$(INSTALL) '.[dev,$*]'
	$(COMPILE)
	touch $@

# The pip that comes with Python 3.11 resolves in twice the time of the newest one.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowrank needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
