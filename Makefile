# Needs Python 3.11+ and make. Everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: lock
lock: ## Resolve requirements/ anew from pyproject.toml
	for set in server demo test; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-annotate --custom-compile-command "make lock" --group pyproject.toml:$$set -o requirements/$$set.txt; \
	done
