# make help lists the targets. Everything runs in .venv, which is built on first use.

# Any Python of the right age; `make PYTHON=/path/to/python3.12 ...` names one.
OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c '$(OLD_ENOUGH)' 2>/dev/null && echo $$python && break; done)
VLLM ?= auto
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
PACKAGES := $(wildcard internvl training sft mpo rl mmpr rewards cascade)
SOURCES := $(PACKAGES) $(wildcard benchmarks examples scripts tests)

# Two test processes share the cores (and one thread makes results repeatable); no test needs the
# network, so a look-up that would wait for it fails at once.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.PHONY: help .venv demo test test-all lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

.venv:  ## build the environment (VLLM=auto|cuda|cpu|none); done already: returns at once
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found (python3 is: \
	$$(python3 --version 2>&1)). Install one, or name it: make .venv PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) scripts/setup_env.py --vllm $(VLLM)

demo: .venv  ## the whole cascade on a tiny model (ARGS="--seed 1" is handed on)
	$(BIN)/cascade demo $(ARGS)

test: .venv  ## the tests that CI runs (ARGS="-k name" is handed on)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv  ## all tests, slow ones too
	$(PYTEST) $(ARGS)

lint: .venv  ## style, formatting and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(PACKAGES) scripts/setup_env.py

format: .venv  ## mend what ruff can mend
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove caches and build leftovers (the environment and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
