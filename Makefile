# `make` lists the targets. Everything runs from .venv; nothing is installed anywhere else.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.heliostat
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo lint check test servers format bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with the pinned set (PYTHON=python3.12 picks the interpreter)

demo: setup ## the flights example, from Parquet to a prediction over HTTP
	$(BIN)/heliostat demo

check: lint ## lint, then the unit tests; a minute
	$(BIN)/python -m pytest -q tests/unit

lint: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint servers ## set-up, lint, then all tests; what CI runs
	$(BIN)/python -m pytest --maxfail 5 --durations 30 tests/unit tests/local

servers: setup $(VENV)/s3/.complete ## what tests talk to: PostgreSQL and Prometheus (Debian's, if root may install them), an S3 server
	@{ test -n "$$(ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null)" && command -v prometheus >/dev/null; } || \
	test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql prometheus >/dev/null; } || \
	echo "PostgreSQL or Prometheus cannot be installed here: their tests are skipped" >&2

format: setup ## put the code in order
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: setup ## the benchmark beside bare LightGBM and Polars
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks.run

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment of its own: the server is a process of its own, and its packages want other versions than ours.
$(VENV)/s3/.complete: tests/s3-server.txt $(STAMP)
	$(BIN)/python -m venv $(VENV)/s3
	$(VENV)/s3/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/s3-server.txt
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found; name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV); the first time takes some minutes"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
