# The commands of this project. The first use of any target makes $(VENV) and installs the tested set into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test check docs format reality clean
.DEFAULT_GOAL := demo

# torch first: its pinned version decides what everything else may ask for.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "distri needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	mkdir -p out
	$(BIN)/distri run -o out/demo.png
	$(BIN)/distri compare --cfg-split off -o out/compare.png
	@echo "See out/demo.png, and out/compare.png: two patches, and beside them the picture of a single process."

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m pytest -n 0 tests/test_docs.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Predictions against runs on this machine: needs root on Linux, for network namespaces; says so and ends well where it cannot.
reality: $(INSTALLED)
	$(BIN)/python benchmarks/reality.py

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
