VENV := .venv
PYTHON ?= python3
READY := $(VENV)/.ready
ARGS ?=

# Threads that spin while they wait slow everything else on a machine with few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench

demo: $(READY)
	$(VENV)/bin/portcullis demo $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

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
