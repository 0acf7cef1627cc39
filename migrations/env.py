"""Run the migrations, for both `alembic` and `oauth-store upgrade`."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, exc
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS, create_engine, create_file
from oauth_store.database.models import Base
from oauth_store.database.names import VERSION_TABLE
from oauth_store.database.schema import EMPTY, VS2, begin_immediate, check, explained, found, lock
from oauth_store.database.url import database_url, display_name, is_memory
from oauth_store.errors import DatabaseUnavailable, OAuthStoreError


def only_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Include only the tables of oauth_store: an application's own may be in the same database."""
    return kind != "table" or name in Base.metadata.tables


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "version_table": VERSION_TABLE,
    "include_name": only_ours,
    "compare_type": True,
    "transactional_ddl": True,
}


def run_offline(url: URL) -> None:
    """Print the SQL instead of running it."""
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS)
    if url.get_backend_name() == "sqlite":
        context.execute("PRAGMA foreign_keys = ON")  # without it, nothing keeps 0002 from dropping rows
    with context.begin_transaction():
        context.run_migrations()


def run_online(connection: Connection) -> None:
    """Migrate in one transaction, under a lock against every other process."""
    lock(connection)
    if connection.dialect.name in ("mysql", "mariadb"):
        logging.getLogger("asyncmy").setLevel(logging.ERROR)  # it would repeat that MySQL does not name primary keys
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


def run_alone(connection: Connection) -> None:
    """Migrate an SQLite file that holds plain-text tokens, while no other process has it open."""
    connection.exec_driver_sql("PRAGMA busy_timeout = 0")  # two processes waiting here would wait for each other
    connection.exec_driver_sql("PRAGMA locking_mode = EXCLUSIVE")
    begin_immediate(connection)
    connection.rollback()  # the lock stays until the connection is closed
    # Free pages hold every token that VS-2 ever deleted. VACUUM drops them before the migration, which itself leaves
    # none (secure_delete is on): after a crash at any moment, everything left over will still be wiped.
    connection.exec_driver_sql("VACUUM")
    connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    run_online(connection)
    connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def look(connection: Connection) -> str:
    """Return the state of the database. Raises `SchemaError` for foreign tables or a newer release's schema."""
    standing = found(connection)
    if standing not in {EMPTY, VS2, *(script.revision for script in context.script.walk_revisions())}:
        check(standing, display_name(connection.engine.url))  # ahead: raises an error that says so
    return standing


async def attempt(url: URL) -> None:
    """Check the database on a connection that changes nothing, then run the migrations on another."""
    sqlite = url.get_backend_name() == "sqlite"
    async with connected(url, wal=False) as connection:
        standing = await connection.run_sync(look)
    async with connected(url) as connection:
        if sqlite:
            await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")  # dropping a parent would delete its children
        await connection.run_sync(run_alone if sqlite and standing in (VS2, "0001") else run_online)


@asynccontextmanager
async def connected(url: URL, **options: Any) -> AsyncIterator[AsyncConnection]:
    engine = create_engine(url, poolclass=NullPool, **options)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def connect_and_run(url: URL) -> None:
    """Run the migrations. Raises an error of one line that names the problem."""
    if url.get_backend_name() == "sqlite" and not is_memory(url):
        create_file(url)
    give_up = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            return await attempt(url)
        except (exc.DBAPIError, OSError) as error:
            if "database is locked" not in str(error):
                raise explained(error, display_name(url)) from error
            if time.monotonic() > give_up:
                raise DatabaseUnavailable(
                    f"{display_name(url)} is in use by another process; stop the server that uses it, and run this "
                    "again"
                ) from error
        # SQLite does not wait for every lock of other connections, nor to change the journal mode.
        await asyncio.sleep(random.uniform(0, 0.05))  # noqa: S311 (spread, not a secret)


def main() -> None:
    """Choose the database: the URL in the config's attributes, else `MCP_OAUTH_DB`."""
    config = context.config
    if config.cmd_opts is not None and config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)  # run by the `alembic` command
    try:
        url = config.attributes.get("url") or database_url()
        if context.is_offline_mode():
            run_offline(url)
        else:
            asyncio.run(connect_and_run(url))
    except OAuthStoreError as error:
        raise CommandError(str(error)) from error  # one line and an exit code, not a traceback


main()
