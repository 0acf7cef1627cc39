"""All checks of `oauth-store doctor`: the database from inside, and its server from outside."""

import os
import platform
import sqlite3
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from argon2 import Type, extract_parameters
from argon2.exceptions import InvalidHashError

from oauth_store.approval import PASSWORD_HASH
from oauth_store.database import schema
from oauth_store.database.ephemeral import EPHEMERAL, is_intended, loss_of
from oauth_store.database.files import file_kind
from oauth_store.database.store import Store
from oauth_store.doctor.database import examine_database
from oauth_store.doctor.files import examine_files
from oauth_store.doctor.finding import Finding, examined, failure, ok, problem, warning
from oauth_store.doctor.url import examine_url
from oauth_store.errors import ConfigurationError

PACKAGES = ("fastmcp-oauth-store", "fastmcp", "mcp", "sqlalchemy", "alembic")
DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "asyncmy"}

LEAST_MEMORY_KIB, LEAST_PASSES = 19 * 1024, 2
"""OWASP's minimum for argon2id with one thread; `oauth-store hash-password` uses 64 MiB and 3 passes."""
MOST_MEMORY_KIB = 1024 * 1024
"""Two sign-ins at once may take twice this."""


def examine(database: str | None, url: str | None) -> Iterator[Finding]:
    """Check the database from inside, and its server from outside if `url` is given. Blocks.

    If a URL is given and no database is set anywhere, checks only the server. Raises `ConfigurationError` for a setting
    that names no database.
    """
    if url is None or database is not None or os.environ.get("MCP_OAUTH_DB"):
        try:
            store = Store(database, schema.prepare)
        except OSError as error:  # a relative path in a directory that was deleted
            yield failure("path", error)
        else:
            yield from _inside(store, url)
    if url is not None:
        yield from examine_url(url)


def _inside(store: Store, url: str | None) -> Iterator[Finding]:
    yield from examined("versions", _versions, store.url.get_backend_name())
    yield from examined("password", _password)
    yield from examined("persistence", _persistence, store)
    if store.in_memory:
        yield warning(
            "database",
            "it is in the memory of the server process: nothing survives a restart",
            "set MCP_OAUTH_DB to the path of a file, unless this is a test",
        )
        return
    if store.sqlite:
        path = Path(str(store.url.database))
        yield from examined("path", _path, path)
        missing = list(examined("database", _missing, path))
        if not missing:
            yield from examine_files(path)
            missing = list(examined("database", _missing, path))  # again: SQLite would create it
        if missing:
            yield from missing
            return
    yield from examine_database(store, url)


def _persistence(store: Store) -> Iterator[Finding]:
    """Check whether the file, which need not exist yet, will be lost with its container."""
    try:
        intended = is_intended()
    except ConfigurationError as error:
        yield problem("persistence", str(error), "until then the server does not start")
        return
    loss = loss_of(Path(str(store.url.database))) if store.sqlite and not store.in_memory else None
    if loss is not None and intended:
        yield ok("persistence", f"{loss.found}, which {EPHEMERAL}=1 accepts")
    elif loss is not None:
        yield warning("persistence", loss.found, f"{loss.advice}. To accept this, set {EPHEMERAL}=1")


def _path(path: Path) -> Iterator[Finding]:
    if not path.is_absolute():
        yield warning(
            "path",
            f"{path} depends on the working directory; here it is {os.path.realpath(path)}",
            "set MCP_OAUTH_DB to the full path, for the server and for oauth-store",
        )


def _missing(path: Path) -> Iterator[Finding]:
    """Find nothing if the file exists. Raises `OSError` for one that cannot be accessed."""
    try:
        status = path.stat()
        kind = file_kind(status.st_mode)
        if kind != "a file":
            yield problem("database", f"{path} is {kind}", "set MCP_OAUTH_DB to the file of the server")
        elif status.st_size == 0 and os.path.lexists(f"{path}-wal"):
            yield problem(
                "database",
                f"{path} is empty, and next to it is a -wal, which SQLite deletes when it opens the file",
                "stop the server, copy both files to a safe place, and restore a backup (see docs/moving.md)",
            )
    except FileNotFoundError:
        directory = Path(os.path.realpath(path)).parent
        if not directory.is_dir():
            yield problem(
                "database",
                f"{path} does not exist, and neither does its directory {directory}",
                "set MCP_OAUTH_DB to the file of the server, or create the directory for a new one",
            )
            return
        yield warning(
            "database",
            f"{os.path.realpath(path)} does not exist yet",
            "the server creates it at first use. If clients were authorized before, this is the wrong file: check "
            "MCP_OAUTH_DB in the server's environment",
        )


def _versions(kind: str) -> Iterator[Finding]:
    found = [f"Python {platform.python_version()}"]
    for package in (*PACKAGES, DRIVERS[kind]):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # importable, but not installed
            found.append(f"{package} of unknown version")
    if kind == "sqlite":
        found.append(f"SQLite {sqlite3.sqlite_version}")
    yield ok("versions", ", ".join(found))


def _password() -> Iterator[Finding]:
    password_hash = os.environ.get(PASSWORD_HASH)
    if password_hash is not None:
        yield examine_password_hash(password_hash)


def examine_password_hash(value: str) -> Finding:
    """Check MCP_OAUTH_PASSWORD_HASH, without printing any of it."""
    check = "password"
    again = f"run `oauth-store hash-password`, and set {PASSWORD_HASH} to its output, in single quotes in a shell"
    if not value:
        return warning(check, f"{PASSWORD_HASH} is empty, which counts as not set", again)
    try:
        parameters = extract_parameters(value)
    except InvalidHashError:
        return problem(check, f"{PASSWORD_HASH} is not an argon2 hash: the server does not start", again)
    shown = (
        f"argon2{parameters.type.name.lower()}, {parameters.memory_cost / 1024:g} MiB, {parameters.time_cost} passes"
    )
    strength = parameters.memory_cost * parameters.time_cost
    if parameters.type is not Type.ID or strength < LEAST_MEMORY_KIB * LEAST_PASSES:
        return warning(check, f"{PASSWORD_HASH} is weak ({shown}): an attacker who reads it can guess fast", again)
    if parameters.memory_cost > MOST_MEMORY_KIB:
        return warning(check, f"{PASSWORD_HASH} is costly to check at every sign-in ({shown})", again)
    return ok(check, shown)
