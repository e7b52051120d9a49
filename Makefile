# make install   .venv/ with the locked dependencies and this clone     make check   all that CI checks, tests included
# make demo      a short run on the embedded model and images, scored    make test    the tests only
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := install
.PHONY: install demo test lint format check clean

VENV_PYTHON := .venv/bin/python

export OMP_NUM_THREADS ?= 2

install:
	@.ci/environment.sh

demo: install
	rm -rf outputs/demo
	.venv/bin/qzo-diffuse train --preset demo --output-dir outputs/demo --json | tee outputs/demo.json
	.venv/bin/qzo-diffuse evaluate --run outputs/demo
	@echo "look at outputs/demo/report.html"

test: install
	$(VENV_PYTHON) -m pytest

lint: install
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	$(VENV_PYTHON) -m pytest --noconftest --durations=0 tests/test_architecture.py

format: install
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

check: lint
	@$(MAKE) --no-print-directory test

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
