"""An engine that was passed in: its requirements, and how a step that writes begins on it."""

import secrets
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

from oauth_store.database.engines import GALERA, SYNC_READS, take_lock
from oauth_store.database.url import is_memory
from oauth_store.errors import ConfigurationError

_DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mysql+asyncmy", "mariadb+asyncmy")


def check_engine(engine: AsyncEngine) -> None:
    """Raise `ConfigurationError` for an engine that cannot keep steps apart."""
    driver = f"{engine.dialect.name}+{engine.dialect.driver}"
    if driver not in _DRIVERS:
        raise ConfigurationError(f"no support for an engine of {driver}; expected one of {', '.join(_DRIVERS)}")
    in_memory, pool = is_memory(engine.url), engine.pool
    if isinstance(pool, StaticPool) and not in_memory:
        raise ConfigurationError(
            "the engine has a StaticPool, so concurrent steps would share one transaction; leave out poolclass=, or "
            "pass the URL"
        )
    if isinstance(pool, NullPool) and in_memory:
        raise ConfigurationError(
            "the engine has a NullPool, so each connection to ':memory:' would be another database; use "
            "poolclass=StaticPool, or pass ':memory:'"
        )


def begin(session: Session) -> None:
    """Begin a step that writes, whatever the engine's own isolation level is.

    That level may commit each statement, or refuse most concurrent steps.
    """
    if session.get_bind().dialect.name != "sqlite":
        session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        return
    take_lock(session.connection())


def check_session(session: Session) -> None:
    """Raise `ConfigurationError` if statements mean something else in this engine's sessions. Needs a transaction."""
    kind = session.get_bind().dialect.name
    if kind in ("mysql", "mariadb"):
        _check_mysql(session)
    elif kind == "postgresql":
        _check_pooler(session)


def _check_mysql(session: Session) -> None:
    variables = (
        "sql_mode",
        "character_set_client",
        "character_set_connection",
        "character_set_results",
        "foreign_key_checks",
        "sql_select_limit",
        "autocommit",
    )
    row = session.execute(text("SELECT " + ", ".join(f"@@{variable} AS {variable}" for variable in variables))).one()
    found = {variable: getattr(row, variable) for variable in variables}
    modes = set(str(found.pop("sql_mode")).split(","))
    wanted: dict[str, str | int] = {
        **dict.fromkeys(variables[1:4], "utf8mb4"),
        "foreign_key_checks": 1,
        "autocommit": 0,
    }
    amiss = [f"{variable} = {found[variable]}" for variable, value in wanted.items() if found[variable] != value]
    cluster = {str(name): str(value) for name, value in session.execute(text(GALERA))}
    if cluster.get("wsrep_on") == "ON" and not int(cluster["wsrep_sync_wait"]) & SYNC_READS:
        amiss.append(f"wsrep_sync_wait = {cluster['wsrep_sync_wait']}")
    if found["sql_select_limit"] < 1_000_000:
        amiss.append(f"sql_select_limit = {found['sql_select_limit']}")
    if "NO_BACKSLASH_ESCAPES" in modes:  # asyncmy escapes with backslashes
        amiss.append("NO_BACKSLASH_ESCAPES in sql_mode")
    if not modes & {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"}:  # the server would truncate a hash
        amiss.append("no STRICT_TRANS_TABLES in sql_mode")
    if amiss:
        raise ConfigurationError(
            f"the sessions of the engine that you passed in have {', '.join(amiss)}, so it would store or find wrong "
            "tokens; fix its connect_args or listeners, or pass the URL instead of the engine"
        )


def _check_pooler(session: Session) -> None:
    """Raise `ConfigurationError` if a statement's name may lead to one of another process, with another meaning."""
    connection: Any = session.connection().connection.driver_connection
    asyncpg = session.get_bind().dialect.driver == "asyncpg"
    promised = connection.get_server_pid() if asyncpg else connection.info.backend_pid
    mark = secrets.token_hex(8)  # of this very statement, which is listed if it has a name
    listed = f"SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%{mark}%'"  # noqa: S608 (hexadecimal)
    process, named = session.execute(text(f"SELECT pg_backend_pid(), ({listed})")).one()
    if process != promised and (named if asyncpg else connection.prepare_threshold is not None):
        unnamed = _UNNAMED_ASYNCPG if asyncpg else "'prepare_threshold': None"
        raise ConfigurationError(
            "the engine that you passed in reaches PostgreSQL through a pooler and names its prepared statements, so a "
            "name may lead to another process's statement; pass the URL instead of the engine, or give it "
            f"connect_args={{{unnamed}}}"
        )


_UNNAMED_ASYNCPG = (
    "'statement_cache_size': 0, 'prepared_statement_cache_size': 0, 'prepared_statement_name_func': lambda: ''"
)
