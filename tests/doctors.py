"""What the doctor finds, and what it looks at: mounts, and users with few rights."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oauth_store.doctor.examine import examine
from oauth_store.doctor.finding import Finding
from tests.databases import execute


def bad(database: object) -> dict[str, Finding]:
    """The warnings and problems of a database, by what was looked at."""
    found = {finding.check: finding for finding in examine(str(database), None) if finding.level != "ok"}
    for finding in found.values():
        assert finding.advice, finding
    return found


def finding(database: object, check: str, level: str) -> str:
    """The one warning or problem that a database has."""
    found = bad(database)
    assert list(found) == [check], found
    assert found[check].level == level
    return f"{found[check].found} -> {found[check].advice}"


def on_postgresql(database_url: str) -> None:
    """Skip on other databases."""
    if not database_url.startswith("postgresql"):
        pytest.skip("a matter of PostgreSQL")


@contextmanager
def role(database_url: str, *statements: str) -> Iterator[str]:
    """The URL of a database for a user that PostgreSQL has for this test, after statements that name it {role}."""
    user = f"oauth_store_test_{os.urandom(4).hex()}"
    try:
        execute(
            database_url,
            f"CREATE ROLE {user} LOGIN PASSWORD 'pa55word'",
            *(statement.format(role=user) for statement in statements),
        )
        scheme, _, rest = database_url.partition("://")
        yield f"{scheme}://{user}:pa55word@{rest.rpartition('@')[2]}"
    finally:
        execute(database_url, f"DROP OWNED BY {user}", f"DROP ROLE {user}")


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[Path]:
    """What `mount` makes of its arguments, of which the last one is where. Skips where it is not allowed."""
    where = Path(arguments[-1])
    mounting = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if mounting.returncode != 0:
        pytest.skip(f"no mount here: {mounting.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
