# Each target does its own set-up, in .venv; all it needs is Python 3.11 or newer: make PYTHON=python3.13 test
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo serve test check clean

help:
	@echo "make demo    a client keeps working through a kill -9 of its server"
	@echo "make serve   a server with a sign-in page, for you to connect Claude to"
	@echo "make test    the tests, on SQLite and on PostgreSQL"
	@echo "make check   formatting, lint, types, migrations and the tests: what CI runs"
	@echo "make clean   remove .venv and everything else that was built here"
	@echo "PYTHON=...   the interpreter to build .venv with: 3.11 or newer, python3 if unset"

demo: .venv/installed
	@$(BIN)/python examples/demo.py

serve: .venv/installed
	@$(BIN)/python -m examples.serve

test: .venv/installed-dev
	$(BIN)/pytest

check: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	@echo "alembic upgrade head and alembic check, on a fresh SQLite file"
	@directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && export MCP_OAUTH_DB="$$directory/oauth.db" && \
		$(BIN)/alembic upgrade head && $(BIN)/alembic check
	$(BIN)/pytest

clean:
	rm -rf .venv tests/clients/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 25.1 is the first pip that knows --group
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null) || found="not installed"; \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$found." \
			"Name another: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

.venv/installed: .venv/created pyproject.toml
	$(PIP) install --editable .
	@touch $@

.venv/installed-dev: .venv/created pyproject.toml
	$(PIP) install --editable '.[postgresql]' --group dev
	@touch $@ .venv/installed
