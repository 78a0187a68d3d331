# Undertow. `make` lists the targets. Every target sets up what it needs; a second run takes the set-up as it stands.

# The first of these that works and is new enough, or what you say: make test PYTHON=/usr/local/bin/python3.12
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
# cpu, cuda, or auto: cuda where nvidia-smi finds a GPU with a driver new enough.
BUILD ?= auto
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint check lock clean

help: ## list the targets
	@echo "Undertow: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options: PYTHON=python3.12  BUILD=cpu|cuda  ONCE=1 (demo)  ARGS='-n 0 -k bank' (test)"

setup: ## make .venv with the locked dependencies, for the CPU or for CUDA
	@test -n "$(PYTHON)" || { echo "Undertow needs Python 3.11 to 3.14, and none was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { echo "Undertow needs Python 3.11 to 3.14; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py --venv $(VENV) --build $(BUILD)

demo: setup ## take the small backdoored model, serve it guarded, watch it caught (ONCE=1: no server left running)
	$(BIN)/undertow demo $(if $(filter-out 0,$(ONCE)),--once)

test: setup ## run the tests, two processes beside each other (ARGS='-n 0 -k bank': one, and of these only)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

coverage: setup ## branches of server/ and of guard's core that tests without an engine reach; fails below 95%
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadscope --no-loadscope-reorder --ignore tests/e2e --ignore tests/organisms \
		--ignore tests/evaluation $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: setup ## ruff, mypy, import contracts, YAML
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict configs deploy docker

check: lint test ## all that has to pass before a commit

lock: ## resolve requirements/*.lock anew; UPGRADE=1 takes the newest versions
	@test -n "$(PYTHON)" || { echo "Undertow needs Python 3.11 to 3.14, and none was found." >&2; exit 1; }
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet $(UV)
	build/lock/bin/python scripts/lock.py --uv build/lock/bin/uv $(if $(filter-out 0,$(UPGRADE)),--upgrade)

clean: ## remove .venv, caches and build leftovers
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find guard server tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
