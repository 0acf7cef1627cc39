"""A consistent copy of an SQLite file that a server may be writing to."""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from oauth_store.database import schema
from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS
from oauth_store.database.store import Store
from oauth_store.database.url import database_url, is_memory
from oauth_store.errors import ConfigurationError, DatabaseUnavailable, OAuthStoreError

PAGES = 2000
"""Pages of 4 KiB that are copied between two checks for Ctrl-C."""

_HINTS = {
    "postgresql": "pg_dump --table='oauth_*' or a backup of the whole server",
    "mysql": "mysqldump --single-transaction or a backup of the whole server",
}

Progress = Callable[[str, int, int], None]
"""Called now and then with what is done ("copying"), the pages copied since the last call, and their total."""


@dataclass(frozen=True, slots=True)
class BackedUp:
    """The result of a backup."""

    source: str
    file: str
    revision: str
    size: int
    """In bytes."""


def backup(database: str | None, file: str | Path, *, on_progress: Progress = lambda *_: None) -> BackedUp:
    """Copy an SQLite file as it is at one moment to `file`, which must not exist, and check the copy. Blocks.

    The server may keep running. The copy is one file of mode 0600; if anything fails, it is deleted.

    Raises `ConfigurationError` for a database that is not a file, a source that does not exist or a `file` that does,
    `SchemaError` for a file of another program, `DatabaseUnavailable`, and `OAuthStoreError` for a damaged copy.
    """
    url = database_url(database)
    if url.get_backend_name() != "sqlite":
        hint = _HINTS[url.get_backend_name()]
        raise ConfigurationError(f"backup copies only SQLite files; use this database's own tools: {hint}")
    if is_memory(url):
        raise ConfigurationError("the database is in memory; expected a file's path")
    source, target = str(url.database), Path(file)
    if not os.path.exists(source):
        raise ConfigurationError(f"{source} does not exist")
    revision = _revision(source)
    if revision == schema.EMPTY:
        raise ConfigurationError(f"{source} has no oauth_store tables, so there is nothing to back up")
    _create(target)
    try:
        _copy(source, target, on_progress)
        _check(target, revision)
    except BaseException:
        target.unlink()
        raise
    return BackedUp(source, str(target), revision, target.stat().st_size)


def _revision(path: str) -> str:
    async def look() -> str:
        store = Store(Path(path), schema.prepare)
        try:
            return await schema.state(store)
        finally:
            await store.close()

    return asyncio.run(look())


def _create(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        raise ConfigurationError(f"{path} already exists, and backup never overwrites; choose another name") from None
    except OSError as error:
        raise DatabaseUnavailable(f"cannot create {path}: {os.strerror(error.errno or 0)}") from error


def _copy(source: str, target: Path, on_progress: Progress) -> None:
    try:
        with closing(_connect(source)) as origin, closing(_connect(str(target))) as copy:
            origin.execute("BEGIN")
            # One moment, however long it takes: without a transaction, every write of a server would restart the copy.
            origin.execute("SELECT count(*) FROM sqlite_master").fetchone()
            origin.backup(copy, pages=PAGES, progress=_steps(on_progress))
            copy.execute("PRAGMA journal_mode = DELETE")  # one file without a -wal; the server will set it back
            problems = [row[0] for row in copy.execute("PRAGMA integrity_check")]
            if problems != ["ok"]:
                raise OAuthStoreError(f"the copy of {source} is damaged, and so is the file itself: {problems[0]}")
    except (sqlite3.Error, OSError) as error:
        raise DatabaseUnavailable(f"cannot copy {source} to {target}: {error}") from error


def _steps(on_progress: Progress) -> Callable[[int, int, int], None]:
    done = 0

    def step(_status: int, left: int, total: int) -> None:
        nonlocal done
        on_progress("copying", total - left - done, total)
        done = total - left

    return step


def _check(target: Path, revision: str) -> None:
    if _revision(str(target)) != revision:
        raise OAuthStoreError(
            f"{target} is not at schema {revision}: an upgrade may have been running. Run backup again"
        )


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
