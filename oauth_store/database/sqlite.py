"""A connection to SQLite whose statements take one hop to its thread and back, or none of their own."""

import random
import sqlite3
import time
from collections.abc import Callable, Generator
from typing import Any

import aiosqlite

from oauth_store.errors import LostRaceError

BUSY_TIMEOUT_SECONDS = 5
"""How long a writer waits for its turn."""
LONGEST_NAP_SECONDS = 0.005

BEGIN = "begin"
SEND = "oauth_store_send"
"""The execution option that says when a statement of a transaction is sent: one of the three below.

Any other statement is sent at once, after the BEGIN, and its outcome is waited for. What is no connection of ours, as a
server's, sends every statement so.
"""
FIRST = "first"
"""Before the BEGIN, without a lock: a SELECT of what a transaction is about to change."""
LATER = "later"
"""With the next statement that is waited for, or with the COMMIT: nobody needs its outcome."""
LATER_IF_CHANGED = "later, if changed"
"""As `LATER`, an UPDATE that must change a row: else the transaction is rolled back with a `LostRaceError`."""


class Connection(aiosqlite.Connection):
    """What SQLAlchemy's dialect asks of an aiosqlite connection, in as few hops as there are answers to wait for.

    A hop costs 30 to 90 microseconds, more than the statement itself. The stock connection hops for the cursor, the
    execute, the fetch and the close of each statement, and for the rollback of a transaction that was committed: 4 for
    a lookup and 22 for a refresh, where this one needs 1 and 2. The second of these is the whole transaction, from
    BEGIN to COMMIT: other processes wait for the lock while SQLite works, and not while this one's event loop is busy.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connect, iter_chunk_size=64)
        self._thread.daemon = True  # as SQLAlchemy does with its own
        self._waiting: list[Statement] = []
        self._send: str | None = None

    def begin_immediate(self) -> None:
        """Send BEGIN IMMEDIATE in the same hop as the next statement."""
        self._waiting = [(BEGIN,)]

    def send_next(self, when: str | None) -> None:
        """Say when the next statement is sent: see `SEND`."""
        self._send = when

    def cursor(self) -> "Cursor":  # type: ignore[override]  # theirs is awaited, for a hop
        """Return a cursor, without a hop."""
        return Cursor(self)

    async def commit(self) -> None:
        """Commit, if anything was begun."""
        if self._waiting[1:] or self.in_transaction:  # a BEGIN alone need not be sent
            try:
                await self.run("execute", "COMMIT")
            except BaseException:  # SQLAlchemy takes a transaction whose COMMIT failed for ended
                await self.rollback()
                raise
        self._waiting = []

    async def rollback(self) -> None:
        """Roll back, if anything was begun."""
        self._waiting, self._send = [], None
        if self.in_transaction:
            await super().rollback()

    async def run(self, method: str, *arguments: Any) -> "Outcome":
        """Execute what waits and a statement, fetch its rows and close its cursor, in one hop."""
        when, self._send = self._send, None
        if when in (LATER, LATER_IF_CHANGED):
            self._waiting.append((when, method, *arguments))
            return None, [], -1, None
        waiting = [] if when == FIRST else self._waiting

        def run() -> Outcome:  # no partial: aiosqlite logs what it executes, and that one's text has the arguments
            return self._run(waiting, method, *arguments)

        return await self._execute(run)  # type: ignore[no-any-return,no-untyped-call]

    def _run(self, waiting: list["Statement"], method: str, *arguments: Any) -> "Outcome":
        cursor = self._conn.cursor()
        try:
            while waiting:  # taken off once it succeeded: after a BEGIN that failed, nothing may be written
                when, *earlier = waiting[0]
                if when == BEGIN:
                    _take_lock(cursor)
                else:
                    getattr(cursor, earlier[0])(*earlier[1:])
                if when == LATER_IF_CHANGED and not cursor.rowcount:
                    raise LostRaceError
                del waiting[0]
            getattr(cursor, method)(*arguments)
            rows = cursor.fetchall() if cursor.description else []
            return cursor.description, rows, cursor.rowcount, cursor.lastrowid
        finally:
            cursor.close()


def _take_lock(cursor: sqlite3.Cursor) -> None:
    """Begin a transaction that may write, once no other process is in one.

    SQLite would sleep for 1 millisecond, 2, 5, 10 and so on, while others come and go in a third of one: two workers
    on one file did 1.5 times as much as one, and do 1.7 times as much with shorter naps.
    """
    deadline, nap = time.monotonic() + BUSY_TIMEOUT_SECONDS, 0.0003
    cursor.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                cursor.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(nap / 2, nap))  # noqa: S311 (spread, not a secret)
                nap = min(1.2 * nap, LONGEST_NAP_SECONDS)
            else:
                return
    finally:
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}")


Statement = tuple[Any, ...]
"""When it is sent, a method of a cursor, and its arguments. A `BEGIN` has neither."""


Outcome = tuple[Any, list[Any], int, int | None]
"""Of a statement: the description and the rows, the row count, and the last row's id."""


class Cursor:
    """What SQLAlchemy's dialect asks of an aiosqlite cursor. Only a statement hops."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outcome: Outcome = (None, [], -1, None)

    async def __aenter__(self) -> "Cursor":
        return self

    def __await__(self) -> Generator[None, None, "Cursor"]:
        yield from ()
        return self  # SQLAlchemy 2.0 awaits a cursor, 2.1 enters it

    async def execute(self, sql: str, parameters: Any = ()) -> None:
        self._outcome = await self._connection.run("execute", sql, parameters)

    async def executemany(self, sql: str, parameters: Any) -> None:
        self._outcome = await self._connection.run("executemany", sql, parameters)

    async def fetchall(self) -> list[Any]:
        return self._outcome[1]

    async def close(self) -> None:
        """Nothing is left to close."""

    @property
    def description(self) -> Any:
        return self._outcome[0]

    @property
    def rowcount(self) -> int:
        return self._outcome[2]

    @property
    def lastrowid(self) -> int | None:
        return self._outcome[3]
