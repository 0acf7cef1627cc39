"""The state of the schema, its creation and its migrations: the only module that imports Alembic, only to migrate."""

import asyncio
import io
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Connection, MetaData, PrimaryKeyConstraint, String, Table, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS, create_engine, create_file, take_lock
from oauth_store.database.ephemeral import warn_of_loss
from oauth_store.database.models import Base
from oauth_store.database.names import VERSION_TABLE
from oauth_store.database.outages import outage
from oauth_store.database.store import Store
from oauth_store.database.url import database_url
from oauth_store.errors import OAuthStoreError, SchemaError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0003"
"""The revision that this release needs."""
POSTGRESQL_LOCK = 0x0A07_5702E
MYSQL_LOCK = "oauth_store"
"""Name the lock that a schema change holds, among a server's advisory locks."""
LOCK_TIMEOUT_SECONDS = 20
"""How long a check of the schema waits for a migration in progress."""
VS2 = "VS-2 tables without a version"
EMPTY = "empty"

_UPGRADE = "run `alembic upgrade head` (in a checkout) or `oauth-store upgrade`"

_VS2_COLUMNS = {
    "oauth_clients": {"client_id", "client_json", "created_at"},
    "oauth_codes": {
        "code",
        "client_id",
        "redirect_uri",
        "redirect_uri_provided_explicitly",
        "code_challenge",
        "scopes",
        "expires_at",
        "resource",
    },
    "oauth_tokens": {"token", "client_id", "scopes", "expires_at", "token_type", "refresh_token", "resource"},
}
"""Compared exactly: an application's own tables of these names must not be mistaken for VS-2's, which are dropped."""

# Alembic's context is global: of two upgrades in one process, one ran its statements on the other's database.
_alembic = threading.Lock()


def found(connection: Connection) -> str:
    """Return the state of a database: `EMPTY`, `VS2`, or the revision of its schema.

    Raises `SchemaError` for tables with our names that do not belong to oauth_store.
    """
    if connection.dialect.name not in ("mysql", "mariadb"):
        return _found(connection)
    # Each statement of a migration is a commit there, and the state in between is no schema. Wait for its end.
    connection.execute(text(f"SELECT GET_LOCK('{MYSQL_LOCK}', {LOCK_TIMEOUT_SECONDS})"))
    try:
        return _found(connection)
    finally:
        connection.execute(text(f"SELECT RELEASE_LOCK('{MYSQL_LOCK}')"))


def _found(connection: Connection) -> str:
    inspector = inspect(connection)
    tables = set(inspector.get_table_names())
    if VERSION_TABLE in tables:
        revision = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 (a constant)
        if revision is not None:
            return str(revision)
    ours = tables & set(_VS2_COLUMNS)
    if not ours:
        return EMPTY
    foreign = [name for name in sorted(ours) if {c["name"] for c in inspector.get_columns(name)} != _VS2_COLUMNS[name]]
    if not foreign:
        return VS2
    raise SchemaError(
        f"found tables named {', '.join(foreign)} that do not belong to oauth_store: they are not VS-2's, and "
        f"{VERSION_TABLE} has no revision (this release needs schema {HEAD}); use another database, or another "
        "schema of it"
    )


def check(revision: str, where: str) -> None:
    """Raise `SchemaError` unless `revision`, as `found` returned it, is the one that this release needs."""
    if revision == HEAD:
        return
    if revision == VS2:
        raise SchemaError(
            f"{where} is a VS-2 database, but this release needs schema {HEAD}; "
            f"stop the server that uses it, then {_UPGRADE}"
        )
    if re.fullmatch(r"\d{4}", revision) and revision < HEAD:
        raise SchemaError(f"{where} is at schema {revision}, but this release needs {HEAD}; {_UPGRADE}")
    raise SchemaError(
        f"{where} is at schema {revision}, which this release does not know (it needs {HEAD}); "
        "install the newer release of fastmcp-oauth-store that upgraded the database"
    )


async def prepare(store: Store) -> None:
    """Check the schema before the first step: create it in an empty database, never change one that has data.

    Raises `SchemaError` if the schema is behind, ahead, or not ours, and `DatabaseUnavailable` if the file cannot be
    created.
    """
    if store.in_memory and store.owned:  # no other process can have written to it
        return await store.transact(_create_tables, True)
    if store.sqlite and store.owned:
        await asyncio.to_thread(create_file, store.url)
        await asyncio.to_thread(warn_of_loss, str(store.url.database))
    revision = await state(store)
    if revision == EMPTY:
        # finish even if this start is cancelled, which would cost an engine that was passed in a connection
        await asyncio.shield(store.keep(asyncio.create_task(_create(store))))
        revision = await state(store)
    return check(revision, store.display_name)


async def require(store: Store) -> None:
    """Check the schema of a database that another server creates. Raises as `prepare`, also if it is empty."""
    if store.sqlite and store.owned and not await asyncio.to_thread(Path(str(store.url.database)).exists):
        raise SchemaError(f"{store.display_name} does not exist; start the authorization server, which creates it")
    revision = await state(store)
    if revision == EMPTY:
        raise SchemaError(f"{store.display_name} is empty; start the authorization server, which creates its tables")
    check(revision, store.display_name)


def _create_tables(session: Session) -> None:
    Base.metadata.create_all(session.connection())


async def state(store: Store) -> str:
    """Return the result of `found`, without changing the database."""
    try:
        return await store.transact(_state, False)
    except (DBAPIError, OSError) as error:
        raise explained(error, store.display_name) from error


def _state(session: Session) -> str:
    return found(session.connection())


def explained(error: Exception, where: str) -> Exception:
    """Return `error` as an operator should read it, or unchanged if it shows a bug of ours."""
    if "file is not a database" in str(error):
        return SchemaError(f"{where} is not an SQLite database; set MCP_OAUTH_DB to another path")
    return outage(error, where) or error


async def _create(store: Store) -> None:
    """Create the schema in an empty database, in one transaction: the tables and the row of their revision.

    Not with Alembic, whose context is global to the process: an application may be migrating its own database with it.
    """
    passed_in = store.writer if isinstance(store.writer, AsyncEngine) and not store.owned else None
    engine = passed_in or create_engine(store.url, poolclass=NullPool)
    give_up = time.monotonic() + BUSY_TIMEOUT_SECONDS
    try:
        while True:
            try:
                async with engine.connect() as connection:
                    return await connection.run_sync(_create_unless_created)
            except DBAPIError as error:
                if "database is locked" not in str(error) or time.monotonic() > give_up:
                    raise
            # SQLite does not wait to change the journal mode
            await asyncio.sleep(random.uniform(0, 0.05))  # noqa: S311 (spread, not a secret)
    finally:
        if passed_in is None:
            await engine.dispose()


def _create_unless_created(connection: Connection) -> None:
    lock(connection)
    if _found(connection) == EMPTY:  # no other process was faster
        Base.metadata.create_all(connection)
        version = Table(
            VERSION_TABLE,
            MetaData(),
            Column("version_num", String(32), nullable=False),
            PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),  # as Alembic names it
        )
        version.create(connection, checkfirst=True)  # a downgrade to the base leaves it, empty
        connection.execute(version.insert().values(version_num=HEAD))
    connection.commit()
    if connection.dialect.name in ("mysql", "mariadb"):
        connection.execute(text(f"SELECT RELEASE_LOCK('{MYSQL_LOCK}')"))  # the connection may go back to a pool


def lock(connection: Connection) -> None:
    """Begin a transaction that excludes every other change of the schema, by any process."""
    if connection.dialect.name == "postgresql":
        # after waiting for the lock, it has to see what others committed, whatever the engine's isolation level
        connection.execution_options(isolation_level="READ COMMITTED")
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": POSTGRESQL_LOCK})
    elif connection.dialect.name == "sqlite":
        begin_immediate(connection)
    else:  # held by the connection until it is closed; MySQL commits with each DDL statement
        connection.execute(text(f"SELECT GET_LOCK('{MYSQL_LOCK}', 300)"))


def begin_immediate(connection: Connection) -> None:
    """Take SQLite's write lock before the first read."""
    connection.rollback()
    connection.begin()
    take_lock(connection)


def upgrade(database: str | Path | URL | None = None, revision: str = "head", *, sql: bool = False) -> str:
    """Migrate a database to `revision`, or return the SQL that would. Blocks: do not call it in an event loop.

    Raises `OAuthStoreError`, whose message says what to do, and has then changed nothing.
    """
    return _migrate("upgrade", database, revision, sql=sql)


def downgrade(database: str | Path | URL | None = None, revision: str = "-1", *, sql: bool = False) -> str:
    """Migrate a database down to `revision`: see `upgrade`."""
    return _migrate("downgrade", database, revision, sql=sql)


def _migrate(command: str, database: str | Path | URL | None, revision: str, *, sql: bool) -> str:
    url = database if isinstance(database, URL) else database_url(database)
    with _alembic:
        return _command(command, revision, url=url, sql=sql)


def _command(name: str, revision: str, *, url: URL, sql: bool) -> str:
    from alembic import command
    from alembic.util import CommandError

    output = io.StringIO()
    config = alembic_config(output_buffer=output, stdout=sys.stdout)
    config.attributes["url"] = url
    try:
        getattr(command, name)(config, revision, sql=sql)
    except CommandError as error:
        if isinstance(error.__cause__, OAuthStoreError):
            raise error.__cause__ from None
        if f"identified by '{revision}'" in str(error):
            raise SchemaError(
                f"there is no schema {revision}; expected a revision from 0001 to {HEAD}, and `oauth-store status` "
                "shows the current one"
            ) from error
        raise SchemaError(str(error)) from error
    return output.getvalue()


def alembic_ini() -> Path:
    """Return the path of our `alembic.ini`: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent.parent
    inside = package / "alembic.ini"
    return inside if inside.exists() else package.parent / "alembic.ini"


def alembic_config(**options: Any) -> "Config":
    """Return the Alembic configuration for our migrations."""
    from alembic.config import Config

    return Config(str(alembic_ini()), **options)
