# Towline. `make help` lists what there is.
PYTHON ?= python3.11
PORT ?= 5000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train resume sync preflight test test-slow bench docs lint ui clean clean-cache

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(READY) ## make the environment in .venv, versions as in constraints.txt

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q src
	@touch $(READY)

train: $(READY) ## the default run: a tiny model learns to add, with thoughts; ARGS='KEY=VALUE …' changes it
	$(BIN)/python -m src.run $(ARGS)

resume: $(READY) ## resume or extend the run in a folder: run=DIR; ARGS='KEY=VALUE …' changes it
	@test -n "$$run" || { echo "Which run? make resume run=DIR"; exit 2; }
	$(BIN)/python -m src.run "rerun=$$run" "hydra.run.dir=$$run" $(ARGS)

sync: $(READY) ## deliver to trackers what they lack of a run or sweep: run=DIR or run=[A,B]; ARGS='KEY=VALUE …'
	@test -n "$$run" || { echo "Which run? make sync run=DIR"; exit 2; }
	$(BIN)/python -m src.sync "run=$$run" $(ARGS)

preflight: $(READY) ## everything about a run that can be known without training it; ARGS='KEY=VALUE …'
	$(BIN)/python -m src.preflight $(ARGS)

test: lint ## every check that CI runs: format, lint, types, tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(ARGS)

test-slow: $(READY) ## checks on a real pretrained chat model in models/smollm2 (or TOWLINE_SMOLLM2=DIR)
	$(BIN)/python -m pytest -m slow -n 1 $(ARGS)

bench: $(READY) ## training speed beside TRL, transformers' Trainer and a bare loop; ARGS='--workloads small --rounds 1' changes it
	$(BIN)/python -m benchmarks.speed $(ARGS)

docs: $(READY) ## regenerate docs/configuration.md and docs/coming_from.md from the schema, conf/ and the tables
	$(BIN)/python -m src.config.pages

lint: $(READY) ## format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: $(READY) ## MLflow's page of all runs, on this machine; PORT=5001, ARGS='KEY=VALUE …' change it
	$(BIN)/python -m src.ui port=$(PORT) $(ARGS)

clean-cache: ## remove the cache of encoded rows (.cache/data)
	rm -rf .cache/data

clean: ## remove caches and build leftovers; runs, multirun, mlflow.db and .venv stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find src tests assets data -name __pycache__ -type d -prune -exec rm -rf {} +
