# make demo     train the example on this machine
# make test     all tests
# make check    format, lint, types, import layers, unit tests: before every commit
# make gpu      what only a GPU can show
# make clean    remove what the above have made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format gpu clean

demo: $(VENV)/.installed
	$(BIN)/launch +experiment=digits

# Two at once: SLURM's tests mostly wait, and have a process of their own (tests/conftest.py).
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/unit -q

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A machine with a GPU has its own torch: nothing is installed, see tests/gpu/README.md.
gpu:
	$(PYTHON) -m pytest tests/gpu -rs

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@
