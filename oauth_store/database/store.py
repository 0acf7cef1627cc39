"""A database, and the steps that run on it."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from oauth_store.database import forks
from oauth_store.database.engines import COMMAND_TIMEOUT_SECONDS, create_engine
from oauth_store.database.outages import hung_up, is_broken, is_conflict, outage
from oauth_store.database.passed_in import begin, check_engine, check_session
from oauth_store.database.remembered import Remembered
from oauth_store.database.sqlite import Lane
from oauth_store.database.url import database_url, display_name, is_memory, sqlite_name
from oauth_store.errors import ConfigurationError, DatabaseUnavailable, LostRaceError, OAuthStoreError
from oauth_store.events import Listener, Span, emit_committed

logger = logging.getLogger("oauth_store")

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 6
"""How often a step is tried while other writers change its rows, or the database reports a deadlock or a conflict."""
PATIENCE_SECONDS = COMMAND_TIMEOUT_SECONDS + 5
"""How long after its start a step is retried when the server hangs up: once, if the server does not respond."""


class Store(forks.Holder):
    """One database. `read()` and `write()` run a step on it, and nothing else reaches it.

    A step is a function of a `Session`, whose statements are not awaited, and of values. It runs in one go: on a server
    in one greenlet of the event loop, on an SQLite file in the thread of its connection. A file has two connections, a
    writer and a reader in autocommit, which never waits for it. Servers are read in autocommit too: a lookup is 1.7
    times faster on PostgreSQL, where one pool serves both. MariaDB would need a command each time to switch.
    """

    listener: Listener | None = None

    def __init__(self, database: str | Path | AsyncEngine | None, check: Callable[["Store"], Awaitable[None]]) -> None:
        """Name the database; nothing is opened yet. `check` is awaited once, before the first step."""
        self._check = check
        self._opened = False
        self._opening: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._steps: set[asyncio.Task[Any]] = set()
        self._inode: int | None = None
        self.remembered: Remembered | None = None
        """Tokens that need no new lookup, while the store is open and if commits of any process can be noticed."""
        self.owned = not isinstance(database, AsyncEngine)
        self.url = database.url if isinstance(database, AsyncEngine) else database_url(database)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.in_memory = is_memory(self.url)
        self.writer: AsyncEngine | Lane
        self.reader: AsyncEngine | Lane
        if isinstance(database, AsyncEngine):
            check_engine(database)
            self.writer = database
            self.reader = database.execution_options(isolation_level="AUTOCOMMIT")
        elif self.sqlite:
            self.writer = Lane(self.url)
            self.reader = self.writer if self.in_memory else Lane(self.url, read_only=True)
        elif self.url.get_backend_name() == "postgresql":
            self.writer = create_engine(self.url)
            self.reader = self.writer.execution_options(isolation_level="AUTOCOMMIT")
        else:
            half: dict[str, Any] = {"pools": 2, "skip_autocommit_rollback": True}
            self.writer = create_engine(self.url, **half)
            self.reader = create_engine(self.url, isolation_level="AUTOCOMMIT", **half)
        self._turn: asyncio.Lock | None = None
        """For an SQLite engine that was passed in, which has one writer, or in memory one connection."""
        forks.register(self)

    @property
    def display_name(self) -> str:
        """The database as an operator should see it."""
        return display_name(self.url)

    async def read(self, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step in which each statement sees the latest commit, and return its result: see `write`."""
        return await asyncio.shield(self._start(step, False, *args, **kwargs))

    async def write(self, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step in one transaction, committed at its end and rolled back on any error, and return its result.

        The step is a task of its own: a client that hangs up cancels its request, and a cancelled database call would
        cost the pooled connection. If another writer was faster, or the database reports a deadlock or a serialization
        failure, or hangs up before the COMMIT, the step runs again. Raises `SchemaError` or `DatabaseUnavailable`.
        """
        return await asyncio.shield(self._start(step, True, *args, **kwargs))

    def start_write(
        self, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[T]:
        """Start a step as `write` runs it."""
        return self._start(step, True, *args, **kwargs)

    def _start(
        self, step: Callable[Concatenate[Session, P], T], write: bool, /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[T]:
        return self.keep(asyncio.create_task(self._traced(step, write, *args, **kwargs)))

    def keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Keep a reference to a task until it has ended; `close` waits for it."""
        self._steps.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._steps.discard(task)
        if not task.cancelled():
            task.exception()  # no caller may be left to retrieve it

    async def _traced(
        self, step: Callable[Concatenate[Session, P], T], write: bool, /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with Span(step.__name__.lstrip("_")):
            try:
                await self.open()
            except OAuthStoreError as error:
                logger.error("%s", error)  # not in open(): the caller of check_schema() reports it
                raise
            return await self._attempt(step, write, *args, **kwargs)

    async def _attempt(
        self, step: Callable[Concatenate[Session, P], T], write: bool, /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        patience_ends = time.monotonic() + PATIENCE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self.transact(step, write, *args, **kwargs)
            except LostRaceError:
                continue
            except Exception as error:
                in_time = time.monotonic() < patience_ends
                if attempt < ATTEMPTS and (is_conflict(error) or (hung_up(error) and in_time)):
                    await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 (spread, not a secret)
                    continue
                known = self._known(error)
                if known is None:
                    raise
                logger.error("%s", known)
                raise known from (None if known is error else error)
        crowded = f"{self.display_name}: other writers changed the same rows {ATTEMPTS} times in a row"
        logger.error("%s", crowded)
        raise DatabaseUnavailable(crowded)

    def _known(self, error: Exception) -> OAuthStoreError | None:
        """Return an error as operators should read it, or None if it is not for them."""
        return error if isinstance(error, OAuthStoreError) else outage(error, self.display_name)

    async def transact(
        self, step: Callable[Concatenate[Session, P], T], write: bool, /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a step once, as it is, even if the database is not checked yet."""
        place = self.writer if write else self.reader
        session = place.session() if isinstance(place, Lane) else AsyncSession(place, expire_on_commit=False)
        inode = self._inode
        async with self._turn if self._turn and (write or self.in_memory) else nullcontext():
            answer = await session.run_sync(self._whole, step, write, inode, *args, **kwargs)
        emit_committed(session.sync_session, self.listener)  # here, on the loop: log handlers may need it
        return answer

    def _whole(
        self,
        session: Session,
        step: Callable[Concatenate[Session, P], T],
        write: bool,
        inode: int | None,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do all of a step, from its first statement to the end of its session, in a greenlet or SQLite's thread."""
        engine = session.get_bind().engine
        pool = engine.pool
        broken = False
        try:
            self._check_file(inode)
            if write and not self.owned:
                begin(session)
            answer = step(session, *args, **kwargs)
            if write:
                self._check_file(inode)  # it may have waited long for its turn
                self._commit(session)
        except BaseException as error:
            broken = (is_broken(error) and not self.in_memory) or hung_up(error)
            raise
        finally:
            # Nothing else closes a connection whose pool was disposed, and one that was opened while the file could not
            # be written stays read-only.
            if broken or pool is not engine.pool:
                session.invalidate()
            else:
                session.close()  # rolls back what was not committed
        return answer

    def _commit(self, session: Session) -> None:
        try:
            session.commit()
        except exc.DBAPIError as error:
            if hung_up(error):  # it may have been committed: the step must not run again
                raise outage(error, self.display_name) or error from error
            raise

    def _check_file(self, inode: int | None) -> None:
        """Raise `DatabaseUnavailable` unless the SQLite file that was opened is still the one at its path.

        SQLite would write to a deleted file, and lose the data. A stat() costs 2 microseconds, and opens nothing.
        """
        if inode is None:
            return
        try:
            present = os.stat(str(self.url.database)).st_ino
        except OSError as error:
            raise DatabaseUnavailable(
                f"{self.display_name} is gone: {os.strerror(error.errno or 0)}; put it back, or restart the server to "
                "start with an empty one"
            ) from error
        if present != inode:
            # SQLite pairs a file with its -wal only by name, and would write the pages of the old one into the new one
            raise DatabaseUnavailable(
                f"{self.display_name} was replaced while it was in use; put it back, or, to use the new one, stop the "
                f"server, delete {self.display_name}-wal and -shm, and start the server"
            )

    async def open(self) -> None:
        """Check the database at the first call. Raises `SchemaError` or `DatabaseUnavailable` until that succeeds."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            await self._adopt(loop)
        if self._opened:
            return
        if self._opening is None or self._opening.done():
            self._opening = self.keep(asyncio.create_task(self._open()))
        await asyncio.shield(self._opening)

    async def _adopt(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move to another event loop. The previous one has to have ended: a server's connections belong to it.

        An SQLite file's connections belong to their own threads, and serve all loops. Raises `ConfigurationError`.
        """
        before = self._loop
        if isinstance(self.writer, Lane):
            self._loop, self._opening = loop, None
            return
        if before is not None and before.is_running():
            raise ConfigurationError(
                f"{self.display_name} is in use by another event loop of this process, and its connections belong to "
                "that one; build a provider for each event loop"
            )
        self._loop, self._opening, self._opened = loop, None, False
        self._turn = asyncio.Lock() if self.sqlite else None
        if before is not None:
            await self._disconnect(close=False)

    async def _open(self) -> None:
        try:
            if not self.owned:
                await self.transact(check_session, True)
            await self._check(self)
            if self.sqlite and self.owned and not self.in_memory:
                self._inode, self.remembered = await asyncio.to_thread(self._remember)
        except Exception as error:
            if self.sqlite and not self.in_memory:
                await self._disconnect(close=True)  # to start over, with whatever file is there by then
            known = self._known(error)
            if known is None:
                raise
            raise known from (None if known is error else error)
        self._opened = True

    def _remember(self) -> tuple[int, Remembered]:
        inode = os.stat(str(self.url.database)).st_ino
        return inode, Remembered(sqlite_name(self.url), inode)

    async def _disconnect(self, *, close: bool) -> None:
        """Close all connections, or just forget them if they belong to an event loop that may be dead."""
        remembered, self.remembered = self.remembered, None
        if remembered is not None:
            await asyncio.to_thread(remembered.close)
        if not self.owned:
            return
        for place in {self.writer, self.reader}:
            await (place.close() if isinstance(place, Lane) else place.dispose(close=close))

    async def close(self) -> None:
        """Wait for the steps in progress, then close all connections. An engine that was passed in stays open."""
        loop = asyncio.get_running_loop()
        foreign = self._loop not in (None, loop)
        while ours := {step for step in self._steps if step.get_loop() is loop}:
            await asyncio.wait(ours)  # if all are done, gather() would never let the loop remove them
        await self._disconnect(close=self.sqlite or not foreign)
        self._opened, self._inode, self._loop = False, None, None

    def before_fork(self) -> None:
        """Close the connection that notices commits: two processes must not share an SQLite connection."""
        if self.remembered is not None:
            self.remembered.close()
            self.remembered, self._opened = None, False

    def forget(self) -> None:
        """Start over in a forked process: nothing here belongs to it, and nothing is closed."""
        forks.keep_forever(self._steps, self.remembered)
        self._loop = self._opening = self.remembered = self._inode = None
        self._steps, self._opened = set(), False
        for place in {self.writer, self.reader}:
            if not isinstance(place, Lane):
                # of an engine that was passed in too: with the parent's socket, the child would end its transactions
                forks.keep_forever(place.sync_engine.pool)
                place.sync_engine.dispose(close=False)
