"""Databases to try things on, and looks at what stands in them."""

import asyncio
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import sqlalchemy
from mcp.shared.auth import OAuthToken
from sqlalchemy import Connection, Engine, Executable, Result, Row, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database.engines import create_engine
from oauth_store.database.models import Token
from oauth_store.database.sqlite import Lane
from oauth_store.database.url import database_url
from tests.workers import settle

T = TypeVar("T")

ROOM_BYTES = 2**30
"""That a directory in memory has to have."""
MARIADB = os.environ.get("OAUTH_STORE_TEST_MARIADB", "")
"""The URL of a server; without it the tests run on SQLite and PostgreSQL alone."""


async def administer(url: str, *statements: str) -> None:
    """Execute statements on PostgreSQL, outside of a transaction."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def memory() -> Path | None:
    """Where files are in memory, if there is room."""
    path = Path("/dev/shm")
    return path if path.is_dir() and shutil.disk_usage(path).free > ROOM_BYTES else None


@contextmanager
def postgres_directory() -> Iterator[Path]:
    """A directory for the data of a server: in memory, where there is room, since a disk makes a database in a second.

    Not in pytest's own: as root, the server runs as a user of its own, whom the next pytest would lock out.
    """
    with tempfile.TemporaryDirectory(dir=memory()) as directory:
        yield Path(directory)


async def create_postgres_database(server: str, template: str = "template0") -> str:
    """Create a database, as a copy of another one, and return its URL.

    In memory, to copy its files takes half the time of the default, which writes each page into a log.
    """
    name = f"oauth_store_test_{secrets.token_hex(8)}"
    in_memory = memory() and not os.environ.get("OAUTH_STORE_TEST_POSTGRES")
    strategy = "STRATEGY FILE_COPY" if in_memory else ""
    await administer(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}" {strategy}')
    return make_url(server).set(database=name).render_as_string(hide_password=False)


async def drop_postgres_database(server: str, url: str) -> None:
    """Drop what `create_postgres_database` created."""
    await administer(server, f'DROP DATABASE "{name_of_database(url)}" WITH (FORCE)')


async def create_mariadb_database(*statements: str) -> str:
    """Create a database, execute statements in it, and return its URL."""
    name = f"oauth_store_test_{secrets.token_hex(8)}"
    # the server's own default would compare text without regard to case: our tables must not depend on it
    await administer_mariadb(MARIADB, f"CREATE DATABASE {name}", f"USE {name}", *statements)
    return make_url(MARIADB).set(database=name).render_as_string(hide_password=False)


async def drop_mariadb_database(url: str) -> None:
    """Drop what `create_mariadb_database` created."""
    await administer_mariadb(MARIADB, f"DROP DATABASE {name_of_database(url)}")


async def administer_mariadb(url: str, *statements: str) -> list[Any]:
    """Execute statements on MariaDB, and return all rows."""
    import asyncmy

    at = make_url(url)
    connection = await asyncmy.connect(
        host=at.host, port=at.port or 3306, user=at.username or "", password=at.password or "", db=at.database
    )
    rows: list[Any] = []
    async with connection.cursor() as cursor:
        for statement in statements:
            await cursor.execute(statement)
            rows += await cursor.fetchall()
    await connection.commit()
    await connection.ensure_closed()
    return rows


def name_of_database(url: str) -> str:
    """The name of a server's database."""
    return str(make_url(url).database)


def sqlite_rows(path: str, statement: str) -> list[tuple[Any, ...]]:
    """Rows of an SQLite file. For files that no provider of this process has open: run in another process otherwise."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def check_integrity(path: str) -> None:
    """Let SQLite look at every page of a file, from a process of its own."""
    program = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('PRAGMA integrity_check').fetchone()[0])"
    ran = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert ran.stdout == "ok\n"


def is_server(url: str) -> bool:
    """Tell a server's URL from the path of an SQLite file."""
    return "://" in url


def connected(url: str, work: Callable[[Connection], T]) -> T:
    """Do `work` on a connection that has none of our settings. Not for an event loop."""

    async def connect() -> T:
        engine = create_async_engine(database_url(url), poolclass=NullPool)
        async with engine.connect() as connection:
            return await connection.run_sync(work)

    return asyncio.run(connect())


def execute(url: str, *statements: str | Executable, values: list[dict[str, Any]] | None = None) -> list[list[Any]]:
    """Run statements in one transaction of their own, with these values, and return the rows of each."""

    def run(connection: Connection) -> list[list[Any]]:
        results = [connection.execute(text(s) if isinstance(s, str) else s, values) for s in statements]
        rows = [list(result.all()) if result.returns_rows else [] for result in results]
        connection.commit()
        return rows

    return connected(url, run)


def select(url: str, statement: str) -> list[Any]:
    """The rows that a query finds."""
    return execute(url, statement)[0]


@asynccontextmanager
async def transaction(provider: SQLAlchemyOAuthProvider, *, locks: bool = True) -> AsyncIterator[AsyncSession]:
    """A session in a transaction, on a connection of its own; in memory, on the provider's.

    On SQLite it `locks` the file, or, as a step does, not before it writes.
    """
    store = provider._store
    await store.open()
    if isinstance(store.writer, Lane) and store.in_memory:
        async with store.writer.session() as session:
            yield session
            await session.commit()
        return
    engine = create_engine(store.url, poolclass=NullPool) if store.owned else store.writer
    assert isinstance(engine, AsyncEngine)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        if store.sqlite and locks:
            await (await session.connection()).exec_driver_sql("BEGIN IMMEDIATE")
        yield session
        await session.commit()


def engine_of(place: AsyncEngine | Lane) -> Engine:
    """The engine of a provider's writer or reader, for listeners."""
    return place.engine if isinstance(place, Lane) else place.sync_engine


async def rows_of(provider: SQLAlchemyOAuthProvider, statement: str | Executable) -> Sequence[Row[Any]]:
    """The rows that a query finds, on a connection of a provider."""
    await provider._store.open()
    return await provider._store.transact(_rows, False, text(statement) if isinstance(statement, str) else statement)


def _rows(session: Session, statement: Executable) -> Sequence[Row[Any]]:
    found: Result[Any] = session.execute(statement)
    return found.all()


async def value_of(provider: SQLAlchemyOAuthProvider, statement: str | Executable) -> Any:
    """The one value that a query finds, on a connection of a provider."""
    ((value,),) = await rows_of(provider, statement)
    return value


async def grant_id_of(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> bytes:
    """The id of a token's grant."""
    named = sqlalchemy.select(Token.grant_id).where(Token.token_hash == hash_secret(token.access_token))
    grant_id: bytes = await value_of(provider, named)
    return grant_id


async def tokens_of(provider: SQLAlchemyOAuthProvider) -> list[Row[Any]]:
    """All that is stored of tokens, once a provider has nothing more to do."""
    await settle(provider)
    return list(await rows_of(provider, sqlalchemy.select(Token.__table__).order_by(Token.token_hash)))


def shape(url: str, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """All tables, in every detail that the database can tell of: names and the order of columns too."""
    return {table: details for table, details in connected(url, _tables).items() if table not in without}


def dump(url: str) -> dict[str, Any]:
    """Everything that stands in a database: what `shape` tells, and the rows of each table."""

    def look(connection: Connection) -> dict[str, Any]:
        tables = _tables(connection)
        rows = {table: connection.execute(text(f"SELECT * FROM {table}")) for table in tables}
        return {"shape": tables, "rows": {table: sorted(map(tuple, rows[table]), key=repr) for table in tables}}

    return connected(url, look)


def _tables(connection: Connection) -> dict[str, Any]:
    return {table: _table(connection, table) for table in sorted(inspect(connection).get_table_names())}


def _table(connection: Connection, table: str) -> dict[str, Any]:
    inspector = inspect(connection)
    found: dict[str, Any] = {
        "columns": [
            (column["name"], str(column["type"]), column["nullable"], column["default"])
            for column in inspector.get_columns(table)
        ],
        "primary key": inspector.get_pk_constraint(table),
        "unique": sorted(inspector.get_unique_constraints(table), key=repr),
        "foreign keys": sorted(inspector.get_foreign_keys(table), key=repr),
        "checks": sorted(inspector.get_check_constraints(table), key=repr),
        "indexes": sorted(inspector.get_indexes(table), key=repr),
    }
    if connection.dialect.name == "sqlite":
        statement = "SELECT type, name, sql FROM sqlite_master WHERE tbl_name = :name ORDER BY type, name"
    elif connection.dialect.name == "mysql":
        definition = connection.execute(text(f"SHOW CREATE TABLE {table}")).one()[1]
        return found | {"definitions": [("table", table, definition)]}
    else:
        statement = (
            "SELECT 'constraint', conname, pg_get_constraintdef(pg_constraint.oid) FROM pg_constraint "
            "JOIN pg_class ON pg_class.oid = conrelid WHERE relname = :name "
            "UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE tablename = :name ORDER BY 1, 2"
        )
    # SQLite puts the name of a table that was renamed into quotes.
    found["definitions"] = [
        (kind, name, " ".join(sql.replace(f'TABLE "{table}"', f"TABLE {table}").split()) if sql else sql)
        for kind, name, sql in connection.execute(text(statement), {"name": table})
    ]
    return found


def file_bytes(path: str) -> bytes:
    """An SQLite file, its -wal and its -shm, read by another process: to close a descriptor of them would drop the
    locks that SQLite holds in this one."""
    existing = [name for name in (path, f"{path}-wal", f"{path}-shm") if Path(name).exists()]
    return subprocess.run(["cat", *existing], check=True, capture_output=True).stdout
