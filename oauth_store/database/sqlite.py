"""The connection to an SQLite file, and its thread."""

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, create_engine, event, exc
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from oauth_store.database import forks
from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS, POOL_TIMEOUT_SECONDS, configure_sqlite
from oauth_store.database.url import is_memory, sqlite_name

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_NAP_SECONDS = 0.005


class Lane(forks.Holder):
    """A connection to an SQLite database, and its thread. Steps run through it one after another, each in one hop.

    A hop to a thread and back takes longer than most statements. SQLite has one writer at a time, and its busy handler
    sleeps rather than queues: one connection beats several.
    """

    def __init__(self, url: URL, *, read_only: bool = False) -> None:
        """With `read_only`, steps run in autocommit: each statement sees the latest commit and waits for no writer."""
        connect = partial(sqlite3.connect, sqlite_name(url), isolation_level=None, check_same_thread=False)
        self.engine = create_engine(
            "sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0, hide_parameters=True
        )
        configure_sqlite(self.engine, wal=not read_only)
        event.listen(self.engine, "checkin", _end_transaction)
        if not read_only:
            event.listen(self.engine, "before_cursor_execute", _begin_before_a_write)
        self._thread: ThreadPoolExecutor | None = None
        self._working = threading.RLock()
        self._in_memory = is_memory(url)
        forks.register(self)

    def session(self) -> "LaneSession":
        """Return a session whose `run_sync` runs in the thread."""
        return LaneSession(self)

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in the thread. Raises SQLAlchemy's `TimeoutError` if it has not started after ten seconds."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="oauth_store-sqlite")
        future = self._thread.submit(copy_context().run, self._work, work)
        late = asyncio.get_running_loop().call_later(POOL_TIMEOUT_SECONDS, future.cancel)
        task = asyncio.current_task()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as error:
            if task is not None and task.cancelling():
                raise
            raise exc.TimeoutError from error
        finally:
            late.cancel()

    def _work(self, work: Callable[[], T]) -> T:
        with self._working:
            return work()

    async def close(self) -> None:
        """Close the connection, after the steps in progress, and end the thread. Both start again when needed."""
        await self.run(self.engine.dispose)
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    def before_fork(self) -> None:
        """Close the connection to a file between two steps: a child would mistake its locks for its own."""
        # no longer than a step waits for its turn: a fork must never hang
        self._working.acquire(timeout=2 * BUSY_TIMEOUT_SECONDS)
        if not self._in_memory:
            self.engine.dispose()

    def after_fork(self) -> None:
        """Continue with the steps."""
        with suppress(RuntimeError):  # the step in progress took too long, and the fork did not wait for it
            self._working.release()

    def forget(self) -> None:
        """Start over in a forked process, which has no thread, and must not use the connection."""
        forks.keep_forever(self.engine.pool, self._thread)
        self.engine.dispose(close=False)
        self._thread, self._working = None, threading.RLock()


class LaneSession(AsyncSession):
    """An async session whose work runs where the connection is."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(expire_on_commit=False)
        self.sync_session.bind = lane.engine
        self._lane = lane

    async def run_sync(  # type: ignore[override]  # SQLAlchemy's names its parameters differently
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do all of `work` in the thread, in one hop."""
        return await self._lane.run(partial(work, self.sync_session, *args, **kwargs))


def _begin_before_a_write(
    connection: Connection, cursor: Any, statement: str, _parameters: object, _context: object, _many: object
) -> None:
    """Take SQLite's lock when it is needed. A step reads without it, and its UPDATEs verify what it decided.

    A deferred transaction that reads and then writes would fail at once with "database is locked".
    """
    driver_connection = connection.connection.driver_connection
    if driver_connection is not None and not driver_connection.in_transaction and not statement.startswith("SELECT"):
        _take_lock(cursor)


def _end_transaction(connection: DBAPIConnection | None, _record: object) -> None:
    """Roll back an open transaction: to SQLAlchemy, one whose COMMIT failed has ended."""
    if isinstance(connection, sqlite3.Connection) and connection.in_transaction:
        connection.rollback()


def _take_lock(cursor: sqlite3.Cursor) -> None:
    """Begin a transaction that may write, once no other process is in one.

    SQLite itself would sleep for 1 millisecond, 2, 5, 10 and so on, while other writers take a third of one.
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
