# Each target sets itself up in .venv, and needs only Python 3.11 or newer: make PYTHON=python3.13 test
PYTHON ?= python3
PYTHONS ?= 3.11 3.12 3.13
VENV ?= .venv
BIN := $(VENV)/bin
# The processes that the tests start reuse compiled code
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all coverage mutants check docs bench clean

help:
	@echo "make demo       a client keeps working through a kill -9 and a lost response, until it is revoked"
	@echo "make serve      a server with a sign-in page, for you to connect Claude to"
	@echo "make test       the tests, on SQLite and on PostgreSQL"
	@echo "make test-all   the same on each installed Python of $(PYTHONS)"
	@echo "make coverage   the tests, and the branches of the package that they cover"
	@echo "make mutants    deliberate faults in the code, one at a time: the tests have to catch each (14 minutes)"
	@echo "make check      what CI runs: formatting, lint, types, migrations, documentation and tests"
	@echo "make docs       the documentation, in build/docs"
	@echo "make bench      measure what authentication costs, and write docs/benchmarks (7 minutes; QUICK=1: one minute, elsewhere)"
	@echo "make clean      remove .venv and everything else that was built"
	@echo "PYTHON=...      the interpreter for .venv: 3.11 or newer, by default python3"

demo: $(VENV)/installed
	@$(BIN)/python examples/demo.py

serve: $(VENV)/installed
	@$(BIN)/python -m examples.serve

# Two processes more than there are cores. Tests that measure a cost count processor time.
PARALLEL = --numprocesses auto --dist worksteal
test: $(VENV)/installed-dev
	$(BIN)/pytest $(PARALLEL)

coverage: $(VENV)/installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# pyenv puts a python3.12 on the path that only lists the versions that it has
test-all:
	@failed=; \
	for version in $(PYTHONS); do \
		for python in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python3; do \
			$$python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && break; \
			python=; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version: not installed, skipped"; continue; fi; \
		echo "Python $$version: $$python"; \
		$(MAKE) --no-print-directory VENV=.venv-$$version PYTHON=$$python test || failed="$$failed $$version"; \
	done; \
	[ -z "$$failed" ] || { echo "failed on$$failed" >&2; exit 1; }

mutants: $(VENV)/installed-dev
	$(BIN)/python -m tests.mutants

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m tests.mutants --list >/dev/null
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@echo "alembic upgrade head and alembic check, on a fresh SQLite file"
	@directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && export MCP_OAUTH_DB="$$directory/oauth.db" && \
		$(BIN)/alembic upgrade head && $(BIN)/alembic check
	$(MAKE) docs
	$(MAKE) test

# Warnings are errors, also for a broken link or anchor. The build fetches nothing.
docs: $(VENV)/installed-dev
	$(BIN)/sphinx-build -c docs --fail-on-warning --keep-going --fresh-env --quiet . build/docs
	@echo "build/docs/docs/index.html"

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

clean:
	rm -rf .venv .venv-* tests/clients/node_modules tests/clients/agents/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip 25.1 is the first with --group
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null) || found="not installed"; \
		echo "$(PYTHON) is $$found; expected Python 3.11 or newer." \
			"Name another one: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml
	$(PIP) install --editable '.[postgresql]' --group dev
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) install --group bench
	@touch $@
