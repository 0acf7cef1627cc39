"""The doctor's checks inside the database."""

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
from oauth_store.doctor.passkeys import examine_passkeys
from oauth_store.errors import OAuthStoreError, SchemaError

T = TypeVar("T")

FUTURE_SECONDS = 60
"""How much the clocks of two machines may differ."""
BACKLOG = 100 * BATCH
"""Expired rows of one table that a busy server deletes in a hundred minutes."""


def examine_database(store: Store, url: str | None) -> Iterator[Finding]:
    """Check an existing database: whether it can be used, its schema, its integrity and its content.

    `url` is that of its server, if it is known. Blocks. Each check is a transaction of its own, and yields each finding
    at once.
    """
    watcher = _watch_wal(store) if store.sqlite else None
    with asyncio.Runner() as runner:
        try:
            yield from _Examination(store, runner, url).findings()
        finally:
            with suppress(Exception):  # the database broke, which is a finding already
                runner.run(store.close())
            if watcher is not None:
                watcher.close()


def _watch_wal(store: Store) -> sqlite3.Connection | None:
    """Return a connection that preserves the -wal while it is open, or None if the -wal is empty or missing.

    The last connection to close would move the intact part of the -wal into the file and delete the rest, which may be
    all that is left to recover. A read-only connection cannot do that, and keeps the others from doing it.
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
    """One examination of one database."""

    def __init__(self, store: Store, runner: asyncio.Runner, url: str | None) -> None:
        self._store = store
        self._runner = runner
        self._url = url
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
        yield from examined("passkeys", self._ask, lambda session: examine_passkeys(session, self._url))
        for check, step in (("stored times", _future), ("purge backlog", _backlog)):
            yield from examined(check, self._ask, step)

    def _ask(self, step: Callable[[Session], T]) -> T:
        return self._runner.run(self._store.transact(step, False))

    def _try_to_write(self) -> list[Finding]:
        """Write, read and delete a row of each table, and roll it all back: no catalog shows every problem."""
        try:
            # for a file, use the reader: the writer would change the journal mode
            self._runner.run(self._store.transact(_write, not self._store.sqlite, self._store.sqlite))
        except _RolledBack as tried:
            if tried.hidden:
                return [
                    problem(
                        "writing",
                        f"this user cannot see rows that it wrote: {', '.join(tried.hidden)}",
                        "drop the row level security policies, or ALTER ROLE ... BYPASSRLS",
                    )
                ]
        return [ok("writing", "a test write succeeded, and was rolled back")]


def _reach(session: Session) -> None:
    session.execute(text("PRAGMA schema_version" if session.get_bind().dialect.name == "sqlite" else "SELECT 1"))


def _revision(session: Session) -> str:
    return schema.found(session.connection())


def _split(message: str) -> tuple[str, str]:
    found, separator, advice = message.partition("; ")
    return (found, advice) if separator else (message, "fix this, and run the doctor again")


class _RolledBack(Exception):
    """The test write is done. `hidden` names the tables whose rows this user cannot see."""

    def __init__(self, hidden: list[str]) -> None:
        self.hidden = hidden


def _write(session: Session, locks: bool) -> None:
    """Raise `_RolledBack`. The rows are expired: the purge deletes any that a table without transactions keeps."""
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
            f"the newest row was created {duration(ahead)} in the future",
            "this clock is behind, or a server's clock was ahead: sync all machines with NTP. Tokens that were issued "
            "then expire later than they should",
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
            f"expired rows that are not deleted yet: {shown}",
            f"if the server was idle until now, wait: after an hour of use it deletes {BATCH} rows per step until none "
            f"are left. Otherwise it deletes them every {INTERVAL_SECONDS} seconds of use. To delete them now, run "
            "`oauth-store purge`",
        )
    ]
