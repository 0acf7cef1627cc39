"""How Alembic reaches the database: `alembic` itself, `oauth-store upgrade` and a provider's first use come here."""

import asyncio
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, exc, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from oauth_store.database import create_engine, create_file, database_url, is_memory
from oauth_store.errors import DatabaseUnavailable, OAuthStoreError, SchemaError
from oauth_store.models import Base
from oauth_store.schema import VERSION_TABLE

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
    sqlite = connection.dialect.name == "sqlite"
    scrub = sqlite and holds_plain_tokens(connection)
    if sqlite:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")  # dropping a parent would delete its children
        if scrub:
            # all other connections closed: they would keep old pages, and their tokens, from being wiped
            connection.exec_driver_sql("PRAGMA locking_mode = EXCLUSIVE")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
    if sqlite:
        if scrub:
            # Free pages hold every token that VS-2 ever deleted.
            connection.exec_driver_sql("VACUUM")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.commit()


def holds_plain_tokens(connection: Connection) -> bool:
    """Tell whether the tables of VS-2 stand in the database."""
    inspector = inspect(connection)
    held = inspector.has_table("oauth_tokens") and "token" in {
        column["name"] for column in inspector.get_columns("oauth_tokens")
    }
    connection.rollback()  # the look began a transaction, in which no PRAGMA takes effect
    return held


async def connect_and_run(url: URL) -> None:
    """Run the migrations on a connection of their own."""
    if url.get_backend_name() == "sqlite" and not is_memory(url):
        create_file(url)
    engine = create_engine(url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run_online)
    except exc.DBAPIError as error:
        cause = str(error.orig)
        where = url.render_as_string(hide_password=True) if url.host else url.database
        if "file is not a database" in cause:
            raise SchemaError(f"{where} is not an SQLite database; set MCP_OAUTH_DB to another path") from error
        if "database is locked" in cause:
            raise DatabaseUnavailable(
                f"{where} is in use by another process; stop the server that uses it, and run this again"
            ) from error
        raise DatabaseUnavailable(f"cannot migrate {where}: {cause}") from error
    except OSError as error:
        raise DatabaseUnavailable(f"cannot reach {url.render_as_string(hide_password=True)}: {error}") from error
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
