# Needs Python 3.11+ and make. Everything else is installed into .venv, from requirements/, by hash.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PORT ?= 8000
# Two sets share the venv. The test set holds the demo's (a test sees to it), so it stands for both.
# A stamp bears the sum of its lock: a new lock installs again, switching between the sets does not.
sum = $(firstword $(shell cksum requirements/$(1).txt))
DEMO := .venv/.demo-$(call sum,demo)
TEST := .venv/.test-$(call sum,test)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r
# Tests that share a server or a browser stay on one worker, see tests/conftest.py. Three for two cores: some wait.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint mutants conformance fuzz audit-deps bench load drill serve screenshots lock clean

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(DEMO) ## The whole loop with thirty devices; the admin stays up until Ctrl-C
	$(BIN)/python -m deploy.demo

# The hundreds of commands that tests start are compiled once, also where the environment says not to keep that.
test: export PYTHONDONTWRITEBYTECODE =
test: $(TEST) ## All tests, with real services and a browser
	@.ci/tools
	$(PYTEST) $(ARGS) || $(BIN)/python -m tests.again $$?

lint: $(TEST) ## Style, types, import rules, migrations, checks, API schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py check
	$(BIN)/python manage.py spectacular --validate --fail-on-warn --file /dev/null

mutants: $(TEST) ## Take the SDK's checks away one by one, to see the attack tests notice; ROWS="1 23", all 40 take a while
	@.ci/tools
	$(BIN)/python -m tests.attacks.mutants $(ROWS)

# The suite is on no package index: github.com/theupdateframework/tuf-conformance, any checkout. Three of its tests need
# the program faketime.
conformance: $(TEST) ## The public TUF suite against the SDK's client; SUITE=/path/to/tuf-conformance
	@test -d "$(SUITE)/tuf_conformance" || { echo "SUITE=/path/to/a/checkout/of/tuf-conformance is needed" >&2; exit 2; }
	@command -v faketime >/dev/null || { echo "The suite needs faketime: apt install faketime" >&2; exit 2; }
	cd "$(SUITE)" && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$(CURDIR)" "$(CURDIR)/$(BIN)/python" -m pytest tuf_conformance \
	  -q -n $(WORKERS) -p no:cacheprovider -p no:django \
	  --entrypoint "$(CURDIR)/$(BIN)/python -m tests.conformance" $(ARGS)

fuzz: $(TEST) ## Mutated messages at every parser, for SECONDS (600); crashes are kept in tests/fuzz/crashes
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600) $(ARGS)

audit-deps: $(TEST) ## Are the locked packages free of known faults? Says so where it could ask nobody (exit 3)
	$(BIN)/python -m deploy.audit_deps $(ARGS)

bench: $(DEMO) ## Measure what it costs beside baselines; writes deploy/bench/RESULTS.md
	$(BIN)/python -m deploy.bench $(ARGS)

load: $(DEMO) ## Many devices' polls at the real server here, with and without keep-alive; ARGS="--connections 10000"
	$(BIN)/python -m deploy.load $(ARGS)

drill: $(TEST) ## Kill, cut off, fill up and wear out devices in every way promised, and print what comes of it; ARGS="--only store"
	@$(BIN)/python -m tests.survival $(ARGS)

serve: $(DEMO) ## The server alone, on PORT (8000), with its data in var/
	$(BIN)/python manage.py serve --port $(PORT)

screenshots: $(TEST) ## Take the README's pictures anew
	@.ci/tools
	FLEET_SCREENSHOTS=1 $(BIN)/python -m pytest tests/browser $(ARGS)

lock: $(TEST) ## Resolve requirements/ anew from pyproject.toml
	$(RESOLVE) --group pyproject.toml:test --upgrade -o requirements/test.txt
	$(RESOLVE) --group pyproject.toml:demo -c requirements/test.txt -o requirements/demo.txt
	$(RESOLVE) --group pyproject.toml:server -c requirements/test.txt -o requirements/server.txt
	$(RESOLVE) pyproject.toml -c requirements/test.txt -o requirements/device.txt

RESOLVE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --custom-compile-command "make lock"

clean: ## Remove what was installed and made; var/, the server's data, stays
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv or ensurepip. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

$(DEMO): | .venv/.made
	@test -e $(TEST) || { echo "Installing what the demonstration needs into .venv (half a minute)"; \
	  $(INSTALL) requirements/demo.txt; }
	@rm -f .venv/.demo-*; touch $@

$(TEST): | .venv/.made
	@echo "Installing what the tests need into .venv (a minute)"
	@$(INSTALL) requirements/test.txt
	@rm -f .venv/.test-* .venv/.demo-*; touch $@ $(DEMO)
