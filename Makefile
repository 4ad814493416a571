# `make run` and `make test` need Python and make, nothing else: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
WORKERS ?= 2
RUN_ARGS ?=

.PHONY: help run test check bench nightly clean

help:
	@echo "make run      train a small LongNet language model on real text, evaluate it, write runs/latest"
	@echo "make test     run the tests"
	@echo "make check    format check, lint, type check, tests: what CI runs"
	@echo "make bench    measure speed, memory, sparse and adaptive attention, many ranks, pools (half an hour; text rows want make run first)"
	@echo "make nightly  the long sweeps"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	@echo "Setting up .venv (about a minute the first time)"
	@$(PIP) --editable '.[plots]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Setting up .venv (about a minute the first time)"
	@$(PIP) --editable '.[plots,dev]'
	@touch $@ .venv/.run

run: .venv/.run
	$(BIN)/dilated-attention train $(RUN_ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not nightly"

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

bench: .venv/.run
	$(BIN)/dilated-attention bench

nightly: .venv/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m nightly

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
