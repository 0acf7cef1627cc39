"""What the doctor asks the database itself."""

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.orm import Session

from oauth_store.database import schema
from oauth_store.database.models import ACCESS, Base, clients, codes, tokens
from oauth_store.database.purge import BATCH, INTERVAL_SECONDS, purgeable
from oauth_store.database.store import Store
from oauth_store.database.url import sqlite_name
from oauth_store.doctor.catalogs import EMPTY_STEPS, STEPS
from oauth_store.doctor.finding import Finding, duration, examined, failure, ok, problem, warning
from oauth_store.errors import OAuthStoreError, SchemaError

T = TypeVar("T")

FUTURE_SECONDS = 60
"""Two machines may differ by this much."""
BACKLOG = 100 * BATCH
"""Expired rows of one table that the server, busy all the time, deletes in a hundred minutes."""


def examine_database(store: Store) -> Iterator[Finding]:
    """Look at a database that is there: can it be used, is its schema ours, is it sound, is anything amiss in it.

    Blocks. Each examination is a transaction of its own, and each finding is yielded as it is made.
    """
    watcher = _watch_wal(store) if store.sqlite else None
    with asyncio.Runner() as runner:
        try:
            yield from _Examination(store, runner).findings()
        finally:
            with suppress(Exception):  # of a database that broke: that was found
                runner.run(store.close())
            if watcher is not None:
                watcher.close()


def _watch_wal(store: Store) -> sqlite3.Connection | None:
    """Return a connection that leaves a -wal as it is while it is open, if the -wal holds anything.

    The last connection to close would move what is sound of it into the file, and delete the rest, which may be all
    that is left to recover. A read-only connection cannot, and keeps the others from it.
    """
    path = Path(sqlite_name(store.url))
    try:
        if not Path(f"{path}-wal").stat().st_size:
            return None
        watcher = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    except (OSError, sqlite3.Error):
        return None
    with suppress(sqlite3.Error):
        watcher.execute("PRAGMA schema_version").fetchone()
    return watcher


class _Examination:
    """One look at one database."""

    def __init__(self, store: Store, runner: asyncio.Runner) -> None:
        self._store = store
        self._runner = runner
        self._kind = store.url.get_backend_name()

    def findings(self) -> Iterator[Finding]:
        try:
            self._ask(_reach)
        except Exception as error:
            known = schema.explained(error, self._store.display_name)
            if isinstance(known, SchemaError):  # no database at all
                yield problem("database", *_split(str(known)))
            else:
                yield failure("database", error)
            return
        yield ok("database", f"{self._store.display_name} can be reached")
        try:
            revision = self._ask(_revision)
            schema.check(schema.HEAD if revision == schema.EMPTY else revision, self._store.display_name)
        except OAuthStoreError as error:
            yield problem("schema", *_split(str(error)))
            return
        except Exception as error:
            yield failure("schema", error)
        else:
            if revision == schema.EMPTY:
                yield from examined("schema", self._ask, EMPTY_STEPS[self._kind])
                return
            yield ok("schema", f"{revision}, which this release needs")
        for check, step in STEPS[self._kind]:
            yield from examined(check, self._ask, step)
        yield from examined("writing", self._try_to_write)
        for check, step in (("stored times", _future), ("purge backlog", _backlog)):
            yield from examined(check, self._ask, step)

    def _ask(self, step: Callable[[Session], T]) -> T:
        return self._runner.run(self._store.transact(step, False))

    def _try_to_write(self) -> list[Finding]:
        """Write, read and delete a row of each table, and roll all of it back: what no catalog tells shows there."""
        try:
            # on a file by the reader: the writer would change its journal mode
            self._runner.run(self._store.transact(_write, not self._store.sqlite, self._store.sqlite))
        except _RolledBack as tried:
            if tried.hidden:
                return [
                    problem(
                        "writing",
                        f"rows that were written are hidden from this user: {', '.join(tried.hidden)}",
                        "drop the policies of row level security, or ALTER ROLE ... BYPASSRLS",
                    )
                ]
        return [ok("writing", "a write was tried, and rolled back")]


def _reach(session: Session) -> None:
    session.execute(text("PRAGMA schema_version" if session.get_bind().dialect.name == "sqlite" else "SELECT 1"))


def _revision(session: Session) -> str:
    return schema.found(session.connection())


def _split(message: str) -> tuple[str, str]:
    found, separator, advice = message.partition("; ")
    return (found, advice) if separator else (message, "see what it says")


class _RolledBack(Exception):
    """All was tried. `hidden` names the tables whose rows this user does not see."""

    def __init__(self, hidden: list[str]) -> None:
        self.hidden = hidden


def _write(session: Session, locks: bool) -> None:
    """Raise `_RolledBack`. The rows have expired: the purge deletes what a table without transactions keeps."""
    if locks:
        session.execute(text("BEGIN IMMEDIATE"))
    key = secrets.token_bytes(32)
    common = {"client_id": f"oauth-store doctor {key.hex()}", "created_at": 1}
    asked = {"grant_id": key[:16], "scopes": "", "expires_at": 1}
    rows = {
        clients.c.client_id: {**common, "client_metadata": "{}"},
        codes.c.handle_hash: {
            **common,
            **asked,
            "handle_hash": key,
            "redirect_uri": "",
            "redirect_uri_provided_explicitly": False,
            "code_challenge": "",
        },
        tokens.c.token_hash: {**common, **asked, "token_hash": key, "kind": ACCESS},
    }
    hidden = []
    for column, row in rows.items():
        session.execute(insert(column.table).values(row))
    for column, row in reversed(rows.items()):
        ours = column == row[column.name]
        seen = session.execute(select(func.count()).select_from(column.table).where(ours)).scalar_one()
        changed = session.execute(update(column.table).where(ours).values(created_at=2)).rowcount  # type: ignore[attr-defined]  # an UPDATE's result is a CursorResult
        deleted = session.execute(delete(column.table).where(ours)).rowcount  # type: ignore[attr-defined]  # the same
        if not seen == changed == deleted == 1:
            hidden.append(column.table.name)
    raise _RolledBack(hidden)


def _future(session: Session) -> list[Finding]:
    latest = []
    for table in Base.metadata.sorted_tables:
        latest.append(session.execute(select(func.max(table.columns["created_at"]))).scalar() or 0)
    ahead = max(latest) - time.time()
    if ahead <= FUTURE_SECONDS:
        return [ok("stored times", "none is in the future")]
    return [
        problem(
            "stored times",
            f"the newest row was created {duration(ahead)} from now",
            "this clock is behind, or that of a server was ahead: let all machines keep time by NTP. What was issued "
            "then expires later than it should",
        )
    ]


def _backlog(session: Session) -> list[Finding]:
    expired = purgeable(session, int(time.time()))
    shown = ", ".join(f"{count:,} of oauth_{name}" for name, count in expired.items())
    if max(expired.values()) <= BACKLOG:
        return [ok("purge backlog", f"expired rows: {shown}")]
    return [
        warning(
            "purge backlog",
            f"expired rows that are still there: {shown}",
            f"nothing, if the server has just been idle: after an hour of use it deletes {BATCH} a step until none is "
            f"left, or else every {INTERVAL_SECONDS} seconds of use. `oauth-store purge` deletes them now",
        )
    ]
