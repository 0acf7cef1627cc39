"""How Alembic reaches the database: `alembic` itself, `oauth-store upgrade` and a provider's first use come here."""

import asyncio
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, exc, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from oauth_store.database import create_engine, create_file, database_url, display_name, is_memory
from oauth_store.errors import DatabaseUnavailable, OAuthStoreError
from oauth_store.models import Base
from oauth_store.schema import EMPTY, VERSION_TABLE, VS2, check, explained, found

LOCK = 0x0A07_5702E
"""Names our migrations among a server's advisory locks."""


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Look at our tables alone: an application's own may stand beside them."""
    return kind != "table" or name in Base.metadata.tables


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "version_table": VERSION_TABLE,
    "include_name": include_name,
    "compare_type": True,
    "transactional_ddl": True,
}


def run_offline(url: URL) -> None:
    """Print the SQL instead of running it."""
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


def run_online(connection: Connection) -> None:
    """Migrate in one transaction that no other process can come between."""
    standing = found(connection)
    connection.rollback()  # the look began a transaction, in which no PRAGMA takes effect
    if standing not in {EMPTY, VS2, *(script.revision for script in context.script.walk_revisions())}:
        check(standing, display_name(connection.engine.url))  # ahead: says so
    if connection.dialect.name == "sqlite":
        run_on_sqlite(connection, scrub=standing in (VS2, "0001"))
        return
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    run_migrations(connection)


def run_on_sqlite(connection: Connection, *, scrub: bool) -> None:
    """Migrate an SQLite database. `scrub` wipes the free pages, where every token stands that VS-2 ever deleted."""
    enforced = connection.exec_driver_sql("PRAGMA foreign_keys").scalar()
    connection.exec_driver_sql("PRAGMA foreign_keys = OFF")  # dropping a parent would delete its children
    if scrub:
        # All other connections closed: they would keep old pages from being wiped.
        connection.exec_driver_sql("PRAGMA locking_mode = EXCLUSIVE")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        run_migrations(connection)
        if scrub:
            connection.exec_driver_sql("VACUUM")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.rollback()
        connection.exec_driver_sql("PRAGMA locking_mode = NORMAL")
        connection.exec_driver_sql(f"PRAGMA foreign_keys = {enforced}")
        connection.rollback()


def run_migrations(connection: Connection) -> None:
    """Migrate, and commit."""
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


async def connect_and_run(url: URL) -> None:
    """Run the migrations on a connection of their own."""
    if url.get_backend_name() == "sqlite" and not is_memory(url):
        create_file(url)
    engine = create_engine(url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run_online)
    except (exc.DBAPIError, OSError) as error:
        if "database is locked" in str(error):
            raise DatabaseUnavailable(
                f"{display_name(url)} is in use by another process; stop the server that uses it, and run this again"
            ) from error
        raise explained(error, display_name(url)) from error
    finally:
        await engine.dispose()


def main() -> None:
    """Choose the database: a connection or a URL that was handed over, else `MCP_OAUTH_DB`."""
    config = context.config
    handed_over = config.attributes.get("connection")
    if handed_over is not None:
        run_online(handed_over)
        return
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
