# Each target sets everything up by itself: a virtual environment in .venv with the tested versions, re-used the next time.
#   make demo      distil the builtin teacher on this machine, ends with a table and runs/demo/report.html
#   make test      the tests, but for the long ones
#   make test-all  all of them, as CI does: every variant of every recipe planned, every method on every teacher, several processes
#   make torture   every command killed at every event, every kind of file damaged; half an hour (JOBS=2 at once)
#   make lint      ruff, mypy, and the floors of the house
#   make results   the tables of docs/results.md and of the README, from results/*.json
#   make commands  the commands that README and docs show, in small
#   make site      the documentation as a site, into site/ (look at it: python3 -m http.server -d site)
#   make clean     remove what these leave behind
# Settings: PYTHON=python3.12 (any 3.10 to 3.13), VENV=folder, PIP_ARGS='--index-url ...' (a CPU-only index saves gigabytes of CUDA)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PIP_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all torture lint results commands site clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(READY)
	$(BIN)/python examples/demo.py

# Compiled tests and modules are kept, whatever the surroundings say: every process would translate them anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-all: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

torture: $(READY)
	$(BIN)/python -m tests.torture --kills 200 --mutations 5000 --jobs $(JOBS) $(TORTURE_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy d2o
	MYPYPATH=tools $(BIN)/mypy $(filter-out tools/site_%, $(wildcard tools/*.py))
	$(BIN)/lint-imports --no-logo

results: $(READY)
	$(BIN)/python tools/results.py

commands: $(READY)
	$(BIN)/python -m tools.doc_commands

# The theme's notice of a successor is no warning of ours.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# What the tools and the demo leave behind; the virtual environment stays (rm -r .venv to start over).
clean:
	rm -rf build dist site runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip would compile on one core, and not every file of every package is meant for this Python. The stamp comes last: an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "d2o needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt -e '.[eval,export,pairs,dev,docs,demo]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@
