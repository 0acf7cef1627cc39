"""Copy a database to another: every row of every table, in one transaction, read back before the commit."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import BigInteger, CursorResult, Executable, Row, Table, func, insert, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from oauth_store.database import schema
from oauth_store.database.engines import create_engine
from oauth_store.database.models import Base
from oauth_store.database.store import Store
from oauth_store.database.url import database_url, display_name, is_memory
from oauth_store.errors import ConfigurationError, OAuthStoreError

T = TypeVar("T")

BATCH = 1000
"""Rows that are read, written and compared at a time: a registration may have 32 KiB."""

CACHE_KIB = 64 * 1024
"""SQLite's cache while it writes: with its default, 2 MiB, the indexes of a million tokens are written many times."""

# Queries that identify a database: two URLs may name the same one.
_IDENTITY = {
    "postgresql": "SELECT pg_postmaster_start_time(), current_database(), current_schema()",
    "mysql": "SELECT @@hostname, @@port, @@datadir, database()",
}

_PRIME = 1_000_003
"""Times are summed modulo this, so that the sum of a million of them fits into 64 bits."""

Progress = Callable[[str, int, int], None]
"""Called for each batch with what is done ("copying" or "verifying"), its number of rows, and their total."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy."""

    source: str
    target: str
    rows: dict[str, int]
    """By table."""
    source_changed: bool
    """Another process wrote to the source meanwhile. Those changes are not in the target."""


async def copy(source: str, target: str, *, on_progress: Progress = lambda *_: None) -> Copied:
    """Copy all tables from one database to an empty one, and compare every row before the commit.

    The target gets its schema if it has none. It gets all rows in one transaction: if the copy fails or is stopped, the
    target has no rows. The source is read as of one moment, and may be in use.

    Raises `ConfigurationError` if the two are the same, the source does not exist or the target is not empty,
    `SchemaError` if either has another schema, `DatabaseUnavailable`, and `OAuthStoreError` if the target refuses a row
    or returns it changed.
    """
    source_url, target_url = _url(source, "source"), _url(target, "target")
    if _is_file(source_url) and not _exists(source_url):
        raise ConfigurationError(f"the source {display_name(source_url)} does not exist")
    async with _snapshot(source_url) as origin:
        await _check_apart(origin, target_url)
        await _create(target)
        totals = await origin.totals()
        count = sum(of_table["rows"] for of_table in totals.values())
        async with _transaction(target_url) as destination:
            await destination.check_empty()
            for table in Base.metadata.sorted_tables:
                async for rows in origin.batches(table):
                    await destination.insert(table, rows)
                    on_progress("copying", len(rows), count)
            for table in Base.metadata.sorted_tables:
                async for rows in origin.batches(table):
                    await destination.check_same(table, rows)
                    on_progress("verifying", len(rows), count)
            await destination.check_totals(totals)
            await destination.commit()
        await origin.end()
        rows_of = {name: of_table["rows"] for name, of_table in totals.items()}
        return Copied(origin.name, destination.name, rows_of, source_changed=await origin.totals() != totals)


def _url(database: str, which: str) -> URL:
    url = database_url(database)
    if is_memory(url):
        raise ConfigurationError(f"the {which} is a database in memory; expected a file's path or a server's URL")
    return url


def _is_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _exists(url: URL) -> bool:
    return os.path.exists(str(url.database))


def _is_same_file(one: URL, other: URL) -> bool:
    return os.path.samefile(str(one.database), str(other.database))


async def _check_apart(origin: "_Side", target_url: URL) -> None:
    """Raise `ConfigurationError` if the target is the source under another name."""
    if origin.url.get_backend_name() != target_url.get_backend_name():
        return
    if _is_file(target_url):
        same = _exists(target_url) and _is_same_file(origin.url, target_url)
    else:
        async with _connected(target_url) as destination:
            same = await origin.identity() == await destination.identity()
    if same:
        raise ConfigurationError(f"{origin.name} and {display_name(target_url)} are the same database")


async def _create(target: str) -> None:
    """Create the target's schema unless it has one. Raises `SchemaError` if it has another one."""
    store = Store(target, schema.prepare)
    try:
        await store.open()
    finally:
        await store.close()


@asynccontextmanager
async def _connected(url: URL, **options: Any) -> AsyncIterator["_Side"]:
    engine = create_engine(url, poolclass=NullPool, **options)
    name = display_name(url)
    try:
        with _reported(name):
            connection = await engine.connect()
        try:
            yield _Side(url, name, connection)
        finally:
            with _reported(name):
                await connection.close()  # rolls back what was not committed
    finally:
        await engine.dispose()


@asynccontextmanager
async def _snapshot(url: URL) -> AsyncIterator["_Side"]:
    """Yield the source as of the first statement. Writers do not wait for it, nor does it wait for them."""
    options: dict[str, Any] = {"wal": False} if _is_file(url) else {"isolation_level": "REPEATABLE READ"}
    async with _connected(url, **options) as side:
        with _reported(side.name):
            if _is_file(url):
                await side.connection.exec_driver_sql("BEGIN")
            revision = await side.connection.run_sync(schema.found)
        if revision == schema.EMPTY:
            raise ConfigurationError(f"the source {side.name} is empty: there is nothing to copy")
        schema.check(revision, side.name)
        yield side


@asynccontextmanager
async def _transaction(url: URL) -> AsyncIterator["_Side"]:
    """Yield the target in a transaction."""
    async with _connected(url) as side:
        with _reported(side.name):
            if _is_file(url):
                await side.connection.exec_driver_sql(f"PRAGMA cache_size = -{CACHE_KIB}")
                await side.connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield side


@contextmanager
def _reported(name: str) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, OSError) as error:
        raise schema.explained(error, name) from error


class _RefusedError(Exception):
    """The target refuses a row. The text has no values, which PostgreSQL prints from the second line on."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__(str(error).partition("\n")[0])


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two databases, on a connection of its own."""

    url: URL
    name: str
    connection: AsyncConnection

    async def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a database call to its end, even after Ctrl-C: a cancelled one may hang in asyncpg."""
        task = asyncio.create_task(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.gather(task, return_exceptions=True)
            raise

    async def execute(self, statement: Executable, rows: list[dict[str, Any]] | None = None) -> CursorResult[Any]:
        with _reported(self.name):
            return await self.run(self.connection.execute(statement, rows))

    async def identity(self) -> Row[Any]:
        return (await self.execute(text(_IDENTITY[self.url.get_backend_name()]))).one()

    async def totals(self) -> dict[str, dict[str, int]]:
        """Return the number of rows of each table and a sum over each time column: a server's writes change these."""
        totals = {}
        for table in Base.metadata.sorted_tables:
            times = [column for column in table.columns if isinstance(column.type, BigInteger)]
            sums = [func.coalesce(func.sum(column % _PRIME), 0).label(column.name) for column in times]
            row = (await self.execute(select(func.count().label("rows"), *sums).select_from(table))).one()
            totals[table.name] = {name: int(value) for name, value in row._mapping.items()}
        return totals

    async def batches(self, table: Table) -> AsyncIterator[Sequence[Row[Any]]]:
        """Yield the rows of a table in the order of their keys."""
        (key,) = table.primary_key.columns
        query = select(table).order_by(key).limit(BATCH)
        rows = (await self.execute(query)).all()
        while rows:
            yield rows
            rows = (await self.execute(query.where(key > rows[-1]._mapping[key]))).all()

    async def check_empty(self) -> None:
        for table in Base.metadata.sorted_tables:
            if (await self.execute(select(1).select_from(table).limit(1))).first():
                names = ", ".join(table.name for table in reversed(Base.metadata.sorted_tables))
                raise ConfigurationError(
                    f"the target {self.name} is not empty: {table.name} has rows. Copy to another database, or, if "
                    f"nothing needs these rows, delete those of {names}, in this order"
                )

    async def insert(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        write = self._copy_in if self.url.get_backend_name() == "postgresql" else self._insert
        try:
            with _reported(self.name):
                await self.run(write(table, rows))
        except _RefusedError as refused:
            raise OAuthStoreError(f"{self.name} refused a row of {table.name}: {refused}. Nothing was copied") from None

    async def _insert(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        try:
            await self.connection.execute(insert(table), [row._asdict() for row in rows])
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            raise _RefusedError(error.orig) from error

    async def _copy_in(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        """Write to PostgreSQL with COPY: two to four times as fast as INSERT."""
        from asyncpg import PostgresConnectionError, PostgresError

        connection: Any = (await self.connection.get_raw_connection()).driver_connection
        try:
            await connection.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())
        except PostgresConnectionError as error:
            raise OSError(str(error)) from error
        except PostgresError as error:
            raise _RefusedError(error) from error

    async def check_same(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        """Raise `OAuthStoreError` unless these rows are here and exactly the same."""
        (key,) = table.primary_key.columns
        query = select(table).where(key.in_([row._mapping[key] for row in rows]))
        found = {row._mapping[key]: row for row in await self.execute(query)}
        for row in rows:
            copied = found.get(row._mapping[key])
            if copied != row:
                changed = [name for name, value in row._mapping.items() if copied and copied._mapping[name] != value]
                raise OAuthStoreError(
                    f"a row of {table.name} differs between {self.name} and the source: "
                    f"{', '.join(changed) or 'it is missing'}. Nothing was copied"
                )

    async def check_totals(self, totals: dict[str, dict[str, int]]) -> None:
        """Raise `OAuthStoreError` if the target has anything else."""
        if await self.totals() != totals:
            raise OAuthStoreError(
                f"another process wrote to {self.name} meanwhile. Nothing was copied; stop it, then copy again"
            )

    async def commit(self) -> None:
        with _reported(self.name):
            await self.run(self.connection.commit())

    async def end(self) -> None:
        """End the transaction, so that the next read sees the present state."""
        with _reported(self.name):
            await self.run(self.connection.rollback())
