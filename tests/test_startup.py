"""What a server pays at its start: nothing is imported before it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import oauth_store

BUILD = """
import json, sys
import fastmcp
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider

InMemoryOAuthProvider(base_url="http://127.0.0.1:8000")
before = set(sys.modules)
from oauth_store import AutoApproval, SQLAlchemyOAuthProvider

provider = SQLAlchemyOAuthProvider({database!r}, base_url="http://127.0.0.1:8000", approval=AutoApproval())
{then}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(directory: Path, database: str = "oauth.db", then: str = "") -> set[str]:
    """What building a provider imports that FastMCP with InMemoryOAuthProvider had not, by top-level package."""
    program = BUILD.format(database=database, then=then)
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout
    packages = {module.partition(".")[0] for module in json.loads(output)} - sys.stdlib_module_names
    return {package for package in packages if "cython" not in package}  # what compiled extensions share


def test_only_what_is_needed_is_imported(tmp_path: Path) -> None:
    """The package and a provider on SQLite import SQLAlchemy and its driver, and nothing else of size.

    Not Alembic, argon2, Jinja, rich's and cyclopts' command line, the rate limits, nor the servers' drivers.
    """
    expected = {"oauth_store", "sqlalchemy", "greenlet", "aiosqlite", "opentelemetry"}
    assert imported(tmp_path) - {"fastmcp", "typing_extensions"} <= expected


def test_the_other_parts_are_imported_when_they_are_needed(tmp_path: Path) -> None:
    """A password brings argon2, routes bring the rate limits, and a URL of PostgreSQL brings its driver."""
    assert "argon2" in imported(tmp_path, then="from oauth_store import PasswordApproval")
    assert "limits" in imported(tmp_path, then="provider.get_routes('/mcp')")
    assert "asyncpg" in imported(tmp_path, "postgresql://user@127.0.0.1/name")


def test_all_that_is_exported_is_there() -> None:
    """What is imported late is there nevertheless, and what is not exported is an error that says so."""
    for name in oauth_store.__all__:
        assert getattr(oauth_store, name).__name__ == name
    with pytest.raises(AttributeError, match="'oauth_store' has no attribute 'Nonsense'"):
        oauth_store.Nonsense  # noqa: B018
