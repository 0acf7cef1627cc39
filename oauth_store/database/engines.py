"""From a setting to an engine: URLs, files, drivers, and the settings of each database."""

import importlib.util
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from oauth_store.errors import ConfigurationError, DatabaseUnavailable

DEFAULT_DATABASE = "mcp_oauth.db"
BUSY_TIMEOUT_SECONDS = 5
"""How long a writer waits for its turn."""
POOL_SIZE = 10
CONNECT_TIMEOUT_SECONDS = 10
COMMAND_TIMEOUT_SECONDS = 10
POOL_TIMEOUT_SECONDS = 10
RECYCLE_SECONDS = 300
"""A connection's age at most: after that, some networks forget one that was idle."""
UNACKNOWLEDGED_SECONDS = 5
"""How long the other end of a connection may acknowledge nothing that it is sent."""
IDLE_SECONDS = 15
"""How long a connection is idle before the system asks the other end whether it is still there."""

# scheme -> (SQLAlchemy's driver, the module it needs, our extra that installs it)
_DRIVERS = {
    "sqlite": ("sqlite+aiosqlite", "aiosqlite", None),
    "postgresql": ("postgresql+asyncpg", "asyncpg", "postgresql"),
    "postgres": ("postgresql+asyncpg", "asyncpg", "postgresql"),
    "mysql": ("mysql+asyncmy", "asyncmy", "mysql"),
    "mariadb": ("mysql+asyncmy", "asyncmy", "mysql"),
}
DRIVER_MODULES = {"sqlite3", *(module for _, module, _ in _DRIVERS.values())}


def database_url(database: str | Path | None = None) -> URL:
    """Return the SQLAlchemy URL of a setting: a path, `:memory:`, or a URL. `None` reads `MCP_OAUTH_DB`.

    The only place that reads `MCP_OAUTH_DB`. Raises `ConfigurationError` if the database is none that we support.
    """
    if database is None:
        database = os.environ.get("MCP_OAUTH_DB") or DEFAULT_DATABASE
    if isinstance(database, Path) or "://" not in database:
        # make_url() would percent-decode the path
        name = str(database)
        return URL.create("sqlite+aiosqlite", database=name if name == ":memory:" else str(Path(name).expanduser()))
    try:
        url = make_url(database)
    except (exc.ArgumentError, ValueError) as error:
        raise ConfigurationError(
            "the database URL cannot be parsed; expected a path, ':memory:', or a URL such as "
            "postgresql://user:password@host/name"
        ) from error
    scheme, _, driver = url.drivername.partition("+")
    if scheme not in _DRIVERS:
        supported = ", ".join(sorted({f"{name}://" for name in _DRIVERS if name != "postgres"}))
        raise ConfigurationError(
            f"no support for {scheme!r} databases; expected a file's path, ':memory:', or a URL of {supported}"
        )
    drivername, module, extra = _DRIVERS[scheme]
    if driver and driver != drivername.partition("+")[2]:
        raise ConfigurationError(
            f"no support for the driver {driver!r}; expected {drivername}://, or {scheme}:// without a driver"
        )
    if scheme == "sqlite" and url.query:
        raise ConfigurationError("options of an SQLite URL are not supported; expected the file's path alone")
    if extra and importlib.util.find_spec(module) is None:
        raise ConfigurationError(f"{module} is not installed; run: pip install 'fastmcp-oauth-store[{extra}]'")
    if module == "asyncpg" and "sslmode" in url.query:  # libpq's name for it, in the URLs that hosters hand out
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": url.query["sslmode"]})
    return url.set(drivername=drivername)


def display_name(url: URL) -> str:
    """Return the path of a file, or a URL without its password, nor what drivers take for one behind the `?`."""
    if url.get_backend_name() == "sqlite":
        return str(url.database or ":memory:")
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def is_memory(url: URL) -> bool:
    """Tell whether `url` is an SQLite database that lives in this process alone."""
    return url.get_backend_name() == "sqlite" and (
        url.database in (None, "", ":memory:")
        or "mode=memory" in str(url.database)
        or url.query.get("mode") == "memory"
    )


def create_file(url: URL) -> None:
    """Create the SQLite file of `url` with mode 0600, before SQLite opens it; its -wal and -shm inherit the mode.

    Never opens a file that exists: closing any descriptor of it would drop the locks that SQLite holds on it in this
    process. Raises `DatabaseUnavailable` if it cannot be created.
    """
    path = Path(str(url.database))
    if path.is_symlink():  # also to no file yet, which SQLite would create with any mode
        path = Path(os.path.realpath(path))
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if path.is_dir():
            raise DatabaseUnavailable(f"{path} is a directory; set MCP_OAUTH_DB to a file in it") from None
    except OSError as error:
        raise DatabaseUnavailable(
            f"cannot create {path}: {os.strerror(error.errno or 0)}; create its directory and let this user write "
            "there, or set MCP_OAUTH_DB to another path"
        ) from error


def create_engine(url: URL, *, wal: bool = True, **options: Any) -> AsyncEngine:
    """Return an engine for `url` with the settings that we need. Errors never print bound values.

    `wal=False` leaves the journal mode of an SQLite file as it is: for a look at a file that may be none of ours.
    """
    if url.get_backend_name() == "sqlite":
        # autocommit as far as the driver goes: what uses this begins its transactions itself
        file = url.set(database=sqlite_name(url))
        engine = create_async_engine(file, hide_parameters=True, connect_args={"isolation_level": None}, **options)
        configure_sqlite(engine.sync_engine, wal=wal)
        return engine
    pooled = options.get("poolclass") is not NullPool
    if pooled:
        # no overflow: its connections are closed and opened again with every request
        options = {
            "pool_size": POOL_SIZE,
            "max_overflow": 0,
            "pool_timeout": POOL_TIMEOUT_SECONDS,
            "pool_recycle": RECYCLE_SECONDS,
            **options,
        }
    if url.get_backend_name() == "postgresql":
        # asyncpg would wait a minute for a connection, and forever for an answer; so may a migration
        options["connect_args"] = {
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": COMMAND_TIMEOUT_SECONDS if pooled else None,
        }
    else:
        # at MySQL's own REPEATABLE READ, a SELECT after the UPDATE may not see what another transaction committed
        options = {"isolation_level": "READ COMMITTED", **options}
        options["connect_args"] = {
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": COMMAND_TIMEOUT_SECONDS if pooled else None,
            "init_command": f"SET SESSION innodb_lock_wait_timeout = {BUSY_TIMEOUT_SECONDS}",  # its own is 50 s
        }
    engine = create_async_engine(url, hide_parameters=True, **options)
    event.listen(engine.sync_engine, "connect", _watch)
    if url.get_backend_name() == "postgresql":
        _Forgotten().listen(engine.sync_engine)
    return engine


def _watch(connection: DBAPIConnection, _record: object) -> None:
    """Let the system find out, in seconds, that the network has forgotten a connection, also one that is idle.

    No driver has a setting for it; both keep their transport under this name.
    """
    transport = getattr(getattr(connection, "driver_connection", connection), "_transport", None)
    connected = None if transport is None else transport.get_extra_info("socket")
    if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # it may be closed by now: its first command finds out
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (  # those that this system has
            ("TCP_KEEPIDLE", IDLE_SECONDS),
            ("TCP_KEEPINTVL", UNACKNOWLEDGED_SECONDS),
            ("TCP_KEEPCNT", 2),
            ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS * 1000),
        ):
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Forgotten:
    """Connections of asyncpg that the network may have forgotten: one had no answer in time, and so had none older.

    asyncpg gives up the command and keeps the connection; asyncmy gives up the connection, and its pool the others.
    """

    def __init__(self) -> None:
        self._since = 0.0

    def listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._opened)
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "handle_error", self._failed, retval=True)

    def _opened(self, _connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info["opened"] = time.monotonic()

    def _checked_out(self, _connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info["opened"] < self._since:
            _terminate(record.driver_connection)
            raise exc.DisconnectionError  # the pool opens another one

    def _failed(self, context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        if context.connection is None or not isinstance(error, TimeoutError):
            return None
        self._since = time.monotonic()
        _terminate(context.connection.connection.driver_connection)
        return exc.OperationalError(None, None, error, hide_parameters=True, connection_invalidated=True)


def _terminate(connection: Any) -> None:
    """Close a connection of asyncpg without a word to the other end, which would be waited for."""
    connection.terminate()


def sqlite_name(url: URL) -> str:
    return ":memory:" if is_memory(url) else os.path.abspath(str(url.database))


def configure_sqlite(engine: Engine, *, wal: bool) -> None:
    """Give each connection of an SQLite engine the settings that we need."""
    event.listen(engine, "connect", _configure_sqlite)
    if wal:
        event.listen(engine, "connect", _configure_wal)


def _configure_sqlite(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}",
        "synchronous = FULL",  # a revoked token must not come back after a power cut
        "foreign_keys = ON",
        "secure_delete = ON",  # nothing of a deleted row stays in the file
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_wal(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer
    cursor.close()
