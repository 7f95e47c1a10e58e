VENV := .venv
PYTHON ?= python3
READY := $(VENV)/.ready
ARGS ?=

# Threads that spin while they wait slow everything else on a machine with few cores.
export OMP_WAIT_POLICY ?= PASSIVE

# The images of load tests, of the demonstration's digits unless a file is named.
IMAGES ?= var/bench/images.npz
HOST ?= http://127.0.0.1:8000
LOCUST = $(VENV)/bin/locust --headless --only-summary --host $(HOST) --images $(IMAGES)

.PHONY: demo test lint bench engines smoke soak spike overload endurance

demo: $(READY)
	$(VENV)/bin/portcullis demo $(ARGS)

# Processes of one thread each; a file's tests stay together, since they share what is costly to make.
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(READY) $(IMAGES)
	$(VENV)/bin/python -m loadtest.bench --images $(IMAGES) $(ARGS)

# In process, on a GPU where there is one: ARGS='NAME --store ...'.
engines: $(READY)
	$(VENV)/bin/python -m loadtest.engines $(or $(ARGS),digits)

# Against a gateway that runs already, at HOST.
smoke soak spike: $(READY) $(IMAGES)
	$(LOCUST) -f loadtest/profiles/$@.py $(ARGS)

# Each starts a gateway of its own: ARGS='NAME --store ...'.
overload endurance: $(READY) $(IMAGES)
	$(VENV)/bin/python -m loadtest.$@ --images $(IMAGES) $(or $(ARGS),digits)

var/bench/images.npz: | $(READY)
	$(VENV)/bin/python -m loadtest.image_sets digits --data digits --output $@

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $(READY)
