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
seen = set(sys.modules)
for step in json.load(sys.stdin):
    exec(step)
    print(json.dumps(sorted(set(sys.modules) - seen)))
    seen = set(sys.modules)
"""
PROVIDER = """
from oauth_store import AutoApproval, SQLAlchemyOAuthProvider

provider = SQLAlchemyOAuthProvider({!r}, base_url="http://127.0.0.1:8000", approval=AutoApproval())
"""


def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    """What FastMCP with InMemoryOAuthProvider had not, by top-level package.

    A provider on SQLite imports SQLAlchemy and its driver, and nothing else of size: not Alembic, Jinja, rich's and
    cyclopts' command line, nor MariaDB's dialect. Routes bring the rate limits, a password argon2, a URL of PostgreSQL
    its driver. The first passkey that is used brings fido2.
    """
    steps = [
        PROVIDER.format("oauth.db"),
        "provider.get_routes('/mcp')",
        "from oauth_store import PasswordApproval",
        PROVIDER.format("postgresql://user@127.0.0.1/name"),
    ]
    command = [sys.executable, "-c", BUILD]
    output = subprocess.run(
        command, cwd=tmp_path, input=json.dumps(steps), capture_output=True, text=True, check=True
    ).stdout
    imported = [json.loads(line) for line in output.splitlines()]
    assert [name for names in imported for name in names if name.startswith("sqlalchemy.dialects.mysql")] == []
    built, routes, password, postgresql = (
        {name.partition(".")[0] for name in names} - sys.stdlib_module_names for names in imported
    )
    built = {name for name in built if "cython" not in name}  # what compiled extensions share
    expected = {"oauth_store", "sqlalchemy", "greenlet", "aiosqlite", "opentelemetry"}
    assert built - {"fastmcp", "typing_extensions"} <= expected
    assert "limits" in routes
    assert "argon2" in password
    assert "fido2" not in built | routes | password
    assert "asyncpg" in postgresql


def test_all_that_is_exported_is_there() -> None:
    """What is imported late is there nevertheless, and what is not exported is an error that says so."""
    for name in oauth_store.__all__:
        assert getattr(oauth_store, name).__name__ == name
    with pytest.raises(AttributeError, match="'oauth_store' has no attribute 'Nonsense'"):
        oauth_store.Nonsense  # noqa: B018
