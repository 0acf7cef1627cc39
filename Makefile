# Each target does its own set-up, in .venv; all it needs is Python 3.11 or newer: make PYTHON=python3.13 test
PYTHON ?= python3
PYTHONS ?= 3.11 3.12 3.13
VENV ?= .venv
BIN := $(VENV)/bin
# What is compiled once is not compiled again by each process that the tests start
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all coverage mutants check docs bench clean

help:
	@echo "make demo       a client keeps working through a kill -9 of its server"
	@echo "make serve      a server with a sign-in page, for you to connect Claude to"
	@echo "make test       the tests, on SQLite and on PostgreSQL"
	@echo "make test-all   the same on each Python that is here, of $(PYTHONS)"
	@echo "make coverage   the same, and which branches of the package they take"
	@echo "make mutants    deliberate faults in the code, one at a time: the tests have to catch each (14 minutes)"
	@echo "make check      formatting, lint, types, migrations, the docs and the tests: what CI runs"
	@echo "make docs       the documentation, in build/docs"
	@echo "make bench      measure what it costs, and write docs/benchmarks (7 minutes; QUICK=1: one, and writes elsewhere)"
	@echo "make clean      remove .venv and everything else that was built here"
	@echo "PYTHON=...      the interpreter to build .venv with: 3.11 or newer, python3 if unset"

demo: $(VENV)/installed
	@$(BIN)/python examples/demo.py

serve: $(VENV)/installed
	@$(BIN)/python -m examples.serve

# As many processes as there are cores. What measures how long something takes counts processor time.
PARALLEL = --numprocesses logical --dist worksteal
test: $(VENV)/installed-dev
	$(BIN)/pytest $(PARALLEL)

coverage: $(VENV)/installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# pyenv has a python3.12 on the path that only says which versions it would have
test-all:
	@failed=; \
	for version in $(PYTHONS); do \
		for python in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python3; do \
			$$python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && break; \
			python=; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version: not here, skipped"; continue; fi; \
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

# Warnings are errors: of a link or an anchor that leads nowhere, too. What the build may not do is fetch anything.
docs: $(VENV)/installed-dev
	$(BIN)/sphinx-build -c docs --fail-on-warning --keep-going --fresh-env --quiet . build/docs
	@echo "build/docs/docs/index.html"

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

clean:
	rm -rf .venv .venv-* tests/clients/node_modules tests/clients/agents/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 25.1 is the first pip that knows --group
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null) || found="not installed"; \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$found." \
			"Name another: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
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
