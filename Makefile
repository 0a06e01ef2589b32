# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
#
#   make demo    sets up .venv and routes 256 tokens: on the GPU if there is one, else on the CPU
#   make test    sets up .venv, checks style and types, and runs the tests (those marked gpu need a GPU)
#
# An environment that has torch and the other dependencies already can be used as it is: make demo VENV= PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Processes that share a GPU for its tests; 7 of them take a third of the time.
GPU_TEST_PROCESSES ?= 0
# Tests that share a GPU take turns.
TEST_PROCESSES ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)

ifeq ($(VENV),)
  BIN_PYTHON := $(PYTHON)
  READY :=
else
  BIN_PYTHON := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

.PHONY: demo test lint unit-test gpu-test bench clean

demo: $(READY)
	$(BIN_PYTHON) -m dsv4_router.cli demo

test: $(READY)
	$(MAKE) -j 2 lint unit-test

unit-test: $(READY)
	$(BIN_PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	$(BIN_PYTHON) -m ruff check .
	$(BIN_PYTHON) -m ruff format --check .
	$(BIN_PYTHON) -m mypy

gpu-test: $(READY)
	$(BIN_PYTHON) -m pytest -m gpu -n $(GPU_TEST_PROCESSES) --maxschedchunk 1

bench: $(READY)
	$(BIN_PYTHON) profiling/bench.py --out profiling/results/bench.jsonl

# A torch that is already there (a CUDA build, in a virtual environment made by hand) is kept.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q setuptools -c constraints.txt
	$(VENV)/bin/python -m pip install -q -e ".[test]" --no-build-isolation -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
