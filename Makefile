# Everything sets itself up: `make demo` and `make test` work on a machine that has only Python (3.11 or later) and make.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One place decides how many threads a test process may take; hosts and routers set their own.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help demo test test-long check lint bench protos train clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --progress-bar off --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

demo: $(INSTALLED)  ## serve the tiny model, change the topic, add a host, kill one: no answer changes
	$(BIN)/expertmesh demo

test: check $(INSTALLED)  ## the linters and the tests; CI runs test-long too
	$(BIN)/pytest -m "not ray" --numprocesses 2
	$(BIN)/pytest -m "ray and not long"

test-long: $(INSTALLED)  ## several machines, outages, faults under load, benches (some need root, sshd, rsync, redis)
	$(BIN)/pytest -m long

check: $(INSTALLED)  ## formatting, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell --skip "expertmesh/models/tiny,*_pb2*" expertmesh protos configs cluster README.md CHANGELOG.md

lint: $(INSTALLED)  ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure this machine
	$(BIN)/expertmesh bench exchange
	$(BIN)/expertmesh bench kernel
	$(BIN)/expertmesh bench decode --rounds 2 --streams 1 --streams 32
	$(BIN)/expertmesh bench serve --seconds 20
	$(BIN)/expertmesh bench balance
	$(BIN)/expertmesh bench planner

protos: $(INSTALLED)  ## generate the stubs again
	$(BIN)/python expertmesh/_proto/generate.py

train: $(INSTALLED)  ## train the tiny model that ships with the package again
	$(BIN)/python -m expertmesh.train --out expertmesh/models/tiny

clean:  ## remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
