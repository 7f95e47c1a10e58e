VENV := .venv
PYTHON ?= python3
READY := $(VENV)/.ready
ARGS ?=

# Threads that spin while they wait slow everything else on a machine with few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench

demo: $(READY)
	$(VENV)/bin/portcullis demo $(ARGS)

# One process a core, with one thread each; a file's tests stay together, since they share what is costly to make.
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(READY)
	$(VENV)/bin/python -m loadtest.bench $(ARGS)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)
