"""A database: its engines, `read()` and `write()` sessions, and how a step runs on them."""

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from oauth_store.database.engines import (
    POOL_SIZE,
    POOL_TIMEOUT_SECONDS,
    create_engine,
    database_url,
    display_name,
    is_memory,
    sqlite_name,
)
from oauth_store.database.outages import hung_up, is_broken, is_conflict, outage
from oauth_store.database.remembered import Memory
from oauth_store.database.sqlite import SEND, Connection
from oauth_store.errors import DatabaseUnavailable, LostRaceError, OAuthStoreError
from oauth_store.events import Span

logger = logging.getLogger("oauth_store")

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 6
"""How often a step is tried while others change its rows, or the database reports a deadlock or a conflict."""


def _begin_immediate(connection: SyncConnection) -> None:
    # a deferred transaction that reads and then writes fails at once with "database is locked"
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        cast(Connection, connection.connection.driver_connection).begin_immediate()


def _send_next(connection: SyncConnection, _c: object, _s: object, _p: object, context: Any, _m: object) -> None:
    when = context.execution_options.get(SEND)
    if when is not None:
        cast(Connection, connection.connection.driver_connection).send_next(when)


class Database:
    """The engines of one database, and the sessions on them.

    SQLite files get two engines with one connection each: a writer, since SQLite has one writer at a time and its busy
    handler sleeps rather than queues, and a reader in autocommit that never waits for it. Servers are read in
    autocommit too: that spares a BEGIN and a ROLLBACK, which makes a lookup 1.7 times faster on PostgreSQL. There one
    pool does for both; MariaDB would have to be told of it each time, and a connection that was killed meanwhile would
    never be given back.
    """

    def __init__(
        self, database: str | Path | AsyncEngine | None, prepare: Callable[["Database"], Awaitable[None]]
    ) -> None:
        """Name the database; nothing is opened yet. `prepare` is awaited once, before the first step."""
        self._prepare = prepare
        self._prepared = False
        self._steps: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stale = False
        self._inode: int | None = None
        self.verified: Memory | None = None
        """Tokens that need not be looked up again: where a commit of any process can be noticed, and while open."""
        self._failure: OAuthStoreError | None = None
        self._preparing = asyncio.Lock()
        self._exclusive = asyncio.Lock()
        self.owned = not isinstance(database, AsyncEngine)
        if isinstance(database, AsyncEngine):
            self.url = database.url
            self.writer = database
        else:
            self.url = database_url(database)
            self.writer = self._create_engine()
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.memory = is_memory(self.url)
        if self.owned and not self.memory and self.url.get_backend_name() != "postgresql":
            self.reader = self._create_engine(wal=False, isolation_level="AUTOCOMMIT")
        else:
            self.reader = self.writer.execution_options(isolation_level="AUTOCOMMIT")

    def _create_engine(self, **options: Any) -> AsyncEngine:
        sqlite = self.url.get_backend_name() == "sqlite"
        # SQLAlchemy takes SQLite's writer to be in autocommit too: it would leave the transactions of failed steps open
        options["skip_autocommit_rollback"] = not sqlite
        if sqlite and not is_memory(self.url):
            # one connection beats several: SQLite's busy handler sleeps, and the slowest writes triple
            options |= {"pool_size": 1, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT_SECONDS}
        elif self.url.get_backend_name() == "mysql":
            options |= {"pool_size": POOL_SIZE // 2}  # of two pools
        engine = create_engine(self.url, **options)
        if sqlite and "isolation_level" not in options:
            event.listen(engine.sync_engine, "begin", _begin_immediate)
            event.listen(engine.sync_engine, "before_cursor_execute", _send_next)
        return engine

    def read(self) -> "_Session":
        """Return a context manager of a session whose statements each see the latest commit. Never inside `write()`."""
        return _Session(self, write=False)

    def write(self) -> "_Session":
        """Return a context manager of a session in one transaction: committed at the end, rolled back on any error."""
        return _Session(self, write=True)

    async def run(self, step: Callable[[], Coroutine[Any, Any, T]], name: str = "step") -> T:
        """Run one step to its end, and return its answer. Its span, which ends with it, has the `name`.

        The step is a task of its own: a client that hangs up cancels its request, and a cancelled database call would
        cost the pooled connection. Where somebody else was faster, or the database reports a deadlock or a
        serialization failure, or hung up before the COMMIT, the whole step is tried again. Raises `DatabaseUnavailable`
        for an outage.
        """
        return await asyncio.shield(self.start(step, name))

    def start(self, step: Callable[[], Coroutine[Any, Any, T]], name: str = "step") -> asyncio.Task[T]:
        """Start one step. `run` tells the rest."""
        return self.keep(asyncio.create_task(self._traced(step, name)))

    def keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Keep a reference to a task until it has ended; `aclose` waits for it."""
        self._steps.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._steps.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to ask for it

    async def _traced(self, step: Callable[[], Coroutine[Any, Any, T]], name: str) -> T:
        with Span(name):
            return await self._attempt(step)

    async def _attempt(self, step: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            await self.ready()
        except OAuthStoreError as error:
            logger.error("%s", error)  # check_schema() leaves it to its caller, who would say it twice
            raise
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await step()
            except LostRaceError:
                continue
            except Exception as error:
                if attempt < ATTEMPTS and (is_conflict(error) or hung_up(error)):
                    await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 (spread, not a secret)
                    continue
                known = self._known(error)
                if known is None:
                    raise
                logger.error("%s", known)
                raise known from (None if known is error else error)
        crowded = f"{self.display_name}: others changed the same rows {ATTEMPTS} times in a row"
        logger.error("%s", crowded)
        raise DatabaseUnavailable(crowded)

    def _known(self, error: Exception) -> OAuthStoreError | None:
        """Return an error as operators should read it, or None if it is none for them."""
        return error if isinstance(error, OAuthStoreError) else outage(error, self.display_name)

    def check_file(self, inode: int | None) -> None:
        """Raise `DatabaseUnavailable` unless the SQLite file that was opened is still the one at its path.

        SQLite would write to a deleted file, to no avail. A stat() costs 2 microseconds, and opens nothing.
        """
        if inode is None:
            return
        try:
            found = os.stat(str(self.url.database)).st_ino
        except OSError as error:
            raise DatabaseUnavailable(
                f"{self.display_name} is gone: {os.strerror(error.errno or 0)}; put it back, or restart the server to "
                "begin with an empty one"
            ) from error
        if found != inode:
            # SQLite pairs a file with its -wal by name alone, and would write the pages of the old one into the new one
            raise DatabaseUnavailable(
                f"{self.display_name} was replaced while it was in use; put it back, or, to use the new one, stop the "
                f"server, delete {self.display_name}-wal and -shm, and start the server"
            )

    async def ready(self) -> None:
        """Prepare the database at the first call. Raises `SchemaError` or `DatabaseUnavailable` until that succeeds."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._prepared = False
            self._loop, self._stale = loop, self._stale or self._loop is not None
            self._preparing, self._exclusive = asyncio.Lock(), asyncio.Lock()
        if self._prepared:
            return
        before = self._failure
        async with self._preparing:
            if self._prepared:
                return
            if self._failure is not None and self._failure is not before:
                # of the attempt that was waited for: a queue of attempts would keep the last one waiting for minutes
                raise type(self._failure)(*self._failure.args)
            if self._stale:
                await self._disconnect(foreign=True)
                self._stale = False
            try:
                await self._prepare(self)
                if self.sqlite and self.owned and not self.memory:
                    self._inode, self.verified = await asyncio.to_thread(self._open_memory)
            except Exception as error:
                if self.sqlite:
                    await self._disconnect(foreign=True)  # to look anew, at whatever file is there by then
                known = self._known(error)
                if known is None:
                    raise
                self._failure = type(known)(*known.args)
                raise known from (None if known is error else error)
            self._prepared = True

    def _open_memory(self) -> tuple[int, Memory]:
        inode = os.stat(str(self.url.database)).st_ino
        return inode, Memory(sqlite_name(self.url), inode)

    @property
    def display_name(self) -> str:
        """The database for an operator's eyes."""
        return display_name(self.url)

    async def _disconnect(self, *, foreign: bool) -> None:
        """Close all connections. A server's that belong to a `foreign` loop, maybe a dead one, are just forgotten."""
        verified, self.verified = self.verified, None
        if verified is not None:
            await asyncio.to_thread(verified.close)
        if self.owned and not (foreign and self.memory):
            for engine in (self.writer, self.reader):
                await engine.dispose(close=self.sqlite or not foreign)

    async def aclose(self) -> None:
        """Wait for the steps under way, then close all connections. An engine that was passed in stays open."""
        foreign = self._loop not in (None, asyncio.get_running_loop())
        while self._steps and not foreign:
            await asyncio.wait(self._steps)  # if all are done, gather() would never let the loop remove them
        await self._disconnect(foreign=foreign)
        if self.memory and self.owned:
            await self.writer.dispose()
        self._prepared, self._inode = False, None


class _Session:
    """`read()` or `write()`. A class, because the SDK's errors are frozen dataclasses: one that is raised through an
    `@asynccontextmanager` becomes a FrozenInstanceError."""

    def __init__(self, database: Database, *, write: bool) -> None:
        self._database = database
        self._write = write
        self._engine = database.writer if write else database.reader
        self._session = AsyncSession(self._engine, expire_on_commit=False)
        self._inode, self._pool = database._inode, self._engine.pool
        self._ended = False

    async def run(self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do all of the work of this session, and end it: what a flow step needs, a sixth faster than `async with`.

        `work` is given the `Session` within, whose statements are not awaited, and the arguments: each `await` of a
        session costs a greenlet, and this is one for all.
        """
        async with self as session:
            return await session.run_sync(self._to_the_end, work, *args, **kwargs)

    def _to_the_end(
        self, session: Session, work: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        answer = work(session, *args, **kwargs)
        self._end(session)
        return answer

    def _end(self, session: Session) -> None:
        if self._write:
            self._database.check_file(self._inode)  # it may have waited long for its turn
            try:
                session.commit()
            except exc.DBAPIError as error:
                if hung_up(error):  # nobody knows whether it was committed: the step must not be tried again
                    raise outage(error, self._database.display_name) or error from error
                raise
        elif self._pool is self._engine.pool:
            session.close()
        else:
            return
        self._ended = True

    async def __aenter__(self) -> AsyncSession:
        if self._database.memory:
            await self._database._exclusive.acquire()
        try:
            self._database.check_file(self._inode)
            if self._write and self._database.sqlite and not self._database.owned:
                await self._begin_immediate()
        except BaseException as error:
            await self._close(error)
            raise
        return self._session

    async def _begin_immediate(self) -> None:
        connection = await self._session.connection()
        driver_connection = (await connection.get_raw_connection()).driver_connection
        if driver_connection is not None and not driver_connection.in_transaction:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._ended:
                await self._session.run_sync(self._end)
        except BaseException as failure:
            error = failure
            raise
        finally:
            if self._ended:  # the session gave its connection back, and is done with: 25 microseconds less
                self._release()
            else:
                await self._close(error)

    async def _close(self, error: BaseException | None) -> None:
        try:
            # Nobody else would close a connection whose pool was disposed, and one that was opened while the file
            # could not be written is read-only for ever.
            if self._pool is not self._engine.pool or (is_broken(error) and not self._database.memory):
                await self._session.invalidate()
            else:
                await self._session.close()  # rolls back what was not committed
        finally:
            self._release()

    def _release(self) -> None:
        if self._database.memory:
            self._database._exclusive.release()


class HasDatabase(Protocol):
    _database: Database


Owner = TypeVar("Owner", bound=HasDatabase)


def flow_step(
    method: Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]:
    """Make a method one step of an OAuth flow: see `Database.run`."""

    @wraps(method)
    async def step(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._database.run(lambda: method(self, *args, **kwargs), method.__name__.lstrip("_"))

    return step
