# make install   .venv/ with the locked dependencies and this clone
# make demo      a short run on the embedded model and images, scored
# make test      the tests that every commit passes (docs/testing.md)
# make check     all that CI checks: lint, types and those tests
# make check-all the same with the slow tests as well
# make docs      the documents as a site that can be searched, in site/
# make package   wheel and sdist in dist/, checked by twine
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := install
.PHONY: install demo test lint format check check-all docs package clean

VENV_PYTHON := .venv/bin/python

export OMP_NUM_THREADS ?= 2

# Two processes with one thread each: faster than one with two, and a test's sums have one order.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

install:
	@.ci/environment.sh

demo: install
	rm -rf outputs/demo
	.venv/bin/qzo-diffuse train --preset demo --output-dir outputs/demo --json | tee outputs/demo.json
	.venv/bin/qzo-diffuse evaluate --run outputs/demo
	@echo "look at outputs/demo/report.html"

test: install
	$(PYTEST)

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

check-all: lint
	$(PYTEST) -m "slow or not slow" -rs

docs: install
	@.ci/extra.sh docs
	.venv-docs/bin/mkdocs build --strict

package: install
	@.ci/extra.sh release
	rm -rf dist
	.venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/python -m twine check --strict dist/*

clean:
	rm -rf .venv .venv-docs .venv-release site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
