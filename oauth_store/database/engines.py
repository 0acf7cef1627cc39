"""Engines for URLs: files, and the settings of each database."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, event, exc
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from oauth_store.database.files import file_kind
from oauth_store.database.options import UNNAMED, connections, with_driver_arguments
from oauth_store.database.url import sqlite_name
from oauth_store.errors import DatabaseUnavailable

BUSY_TIMEOUT_SECONDS = 5
"""How long a writer waits for its turn."""
POOL_SIZE = 10
CONNECT_TIMEOUT_SECONDS = 10
COMMAND_TIMEOUT_SECONDS = 10
POOL_TIMEOUT_SECONDS = 10
RECYCLE_SECONDS = 300
"""The maximum age of a connection: some networks forget one that is idle for longer."""
UNACKNOWLEDGED_SECONDS = 5
"""How long the other end of a connection may acknowledge nothing that it is sent."""
IDLE_SECONDS = 15
"""How long a connection is idle before the system probes the other end."""

# A server's defaults must not change the meaning of a statement, nor the stored values. asyncmy escapes with
# backslashes, and without strict mode the server truncates a value. MariaDB and every MySQL know these modes.
_MYSQL_SESSION = "SET " + ", ".join(
    f"SESSION {variable} = {value}"
    for variable, value in {
        "sql_mode": "'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'",
        "character_set_client": "utf8mb4",
        "character_set_results": "utf8mb4",
        "collation_connection": "utf8mb4_bin",
        "foreign_key_checks": 1,
        "sql_select_limit": 2**64 - 1,  # no limit
        "innodb_lock_wait_timeout": BUSY_TIMEOUT_SECONDS,  # its own is 50 seconds
    }.items()
)


def take_lock(connection: Connection) -> None:
    """Take SQLite's write lock in a transaction that SQLAlchemy has just begun."""
    driver_connection = connection.connection.driver_connection
    if driver_connection is not None and driver_connection.in_transaction:
        connection.exec_driver_sql("ROLLBACK")  # of a BEGIN that an engine sent itself, which takes no lock
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def create_file(url: URL) -> None:
    """Create the SQLite file of `url` with mode 0600, before SQLite opens it; its -wal and -shm inherit the mode.

    Never opens an existing file: closing any descriptor of it would drop the locks that SQLite holds on it in this
    process. Raises `DatabaseUnavailable` if it cannot be created.
    """
    path = Path(str(url.database))
    if path.is_symlink():  # even to a file that does not exist, which SQLite would create with any mode
        path = Path(os.path.realpath(path))
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        with suppress(OSError):  # SQLite says why it cannot open it
            kind = file_kind(path.stat().st_mode)
            if kind != "a file":
                place = "a file in it" if kind == "a directory" else "a file"
                raise DatabaseUnavailable(f"{path} is {kind}; set MCP_OAUTH_DB to {place}") from None
    except OSError as error:
        raise DatabaseUnavailable(
            f"cannot create {path}: {os.strerror(error.errno or 0)}; create its directory and let this user write "
            "there, or set MCP_OAUTH_DB to another path"
        ) from error


def create_engine(url: URL, *, wal: bool = True, pools: int = 1, **options: Any) -> AsyncEngine:
    """Return an engine for `url` with the settings that oauth_store needs. Errors never print bound values.

    As one of several `pools`, it gets its share of the connections. `wal=False` leaves the journal mode of an SQLite
    file as it is, to inspect a file that may belong to another program.
    """
    if url.get_backend_name() == "sqlite":
        # autocommit at the driver: callers begin their own transactions
        file = url.set(database=sqlite_name(url))
        engine = create_async_engine(file, hide_parameters=True, connect_args={"isolation_level": None}, **options)
        configure_sqlite(engine.sync_engine, wal=wal)
        return engine
    pooled = options.get("poolclass") is not NullPool
    if pooled:
        # no overflow: such connections are closed and opened again with every request
        options = {
            "pool_size": max(1, connections(url, POOL_SIZE) // pools),
            "max_overflow": 0,
            "pool_timeout": POOL_TIMEOUT_SECONDS,
            "pool_recycle": RECYCLE_SECONDS,
            **options,
        }
    # At REPEATABLE READ, MySQL's default, a SELECT after the UPDATE may not see what another transaction committed; at
    # SERIALIZABLE, which may be a server's default, PostgreSQL refuses most concurrent steps.
    options = {"isolation_level": "READ COMMITTED", **options}
    if url.get_backend_name() == "postgresql":
        # asyncpg would wait a minute for a connection, and forever for a response, as only a migration may
        options["connect_args"] = {
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": COMMAND_TIMEOUT_SECONDS if pooled else None,
        }
    else:
        options["connect_args"] = {
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": COMMAND_TIMEOUT_SECONDS if pooled else None,
            "init_command": _MYSQL_SESSION,
        }
    declared = "pgbouncer" in url.query
    url, options["connect_args"] = with_driver_arguments(url, options["connect_args"])
    engine = create_async_engine(url, hide_parameters=True, **options)
    event.listen(engine.sync_engine, "connect", _watch)
    if url.get_backend_name() in ("mysql", "mariadb"):
        event.listen(engine.sync_engine, "connect", _see_all_nodes)
    if url.get_backend_name() == "postgresql":
        _Forgotten().listen(engine.sync_engine)
        hosts = _Hosts()
        if not declared and options["connect_args"].get("statement_cache_size") != 0:
            event.listen(engine.sync_engine, "do_connect", _Pooler(hosts).connect)
        event.listen(engine.sync_engine, "do_connect", hosts.connect)
    return engine


GALERA = "SHOW VARIABLES WHERE Variable_name IN ('wsrep_on', 'wsrep_sync_wait')"
"""Finds a cluster of MariaDB or MySQL in which each node takes writes (Galera). Elsewhere there are no such variables,
or `wsrep_on` is OFF."""
SYNC_READS = 1
"""The bit of `wsrep_sync_wait` that makes a SELECT wait for what other nodes have committed before it."""


def _see_all_nodes(connection: DBAPIConnection, _record: object) -> None:
    """Make the reads of a session on a Galera node see what another node has acknowledged: a revocation, a refresh.

    The server's default shows them some milliseconds later. Writes need nothing: a commit that another node was faster
    with is refused as a deadlock, and its step runs again.
    """
    cursor = connection.cursor()
    cursor.execute(GALERA)
    if ("wsrep_on", "ON") in {(str(name), str(value)) for name, value in cursor.fetchall()}:
        cursor.execute(f"SET SESSION wsrep_sync_wait = @@SESSION.wsrep_sync_wait | {SYNC_READS}")
    cursor.close()


def _watch(connection: DBAPIConnection, _record: object) -> None:
    """Make the system detect within seconds that the network has dropped a connection, even an idle one.

    No driver has a setting for it; both keep their transport under this name.
    """
    transport = getattr(getattr(connection, "driver_connection", connection), "_transport", None)
    connected = None if transport is None else transport.get_extra_info("socket")
    if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # it may be closed by now, which its first command detects
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (  # those that this system has
            ("TCP_KEEPIDLE", IDLE_SECONDS),
            ("TCP_KEEPINTVL", UNACKNOWLEDGED_SECONDS),
            ("TCP_KEEPCNT", 2),
            ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS * 1000),
        ):
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Hosts:
    """The hosts of a URL that names several, each with a time of its own: the one that was reached last is tried first.

    asyncpg has one time for all, and a machine that is gone without a word uses it up.
    """

    def __init__(self) -> None:
        self._last = 0

    def connect(
        self, dialect: Dialect, _record: object, arguments: Any, options: dict[str, Any]
    ) -> DBAPIConnection | None:
        """Return a connection, or None if there is one host: then the driver connects."""
        hosts, ports = options.get("host"), options.get("port")
        if not isinstance(hosts, list) or not isinstance(ports, list) or len(hosts) < 2:
            return None
        options = {**options, "timeout": options["timeout"] / len(hosts)}
        failures: list[Exception] = []
        for place in sorted(range(len(hosts)), key=lambda place: place != self._last):
            try:
                connection = dialect.connect(*arguments, **{**options, "host": hosts[place], "port": ports[place]})
            except Exception as error:
                failures.append(error)
            else:
                self._last = place
                return connection
        raise failures[-1]


class _Pooler:
    """Whether a pooler such as PgBouncer answers in place of PostgreSQL: checked at the first connection.

    asyncpg numbers its statements. If each transaction may have another connection, a name may lead to a statement of
    another process, which answers another question: a revoked token could pass for a live one. So statements get no
    names if the process that responds is not the one that the driver was given.
    """

    def __init__(self, hosts: _Hosts) -> None:
        self._hosts = hosts
        self._found: bool | None = None

    def connect(self, dialect: Dialect, _record: object, arguments: Any, options: dict[str, Any]) -> None:
        """Change the driver's options before it connects."""
        if self._found is None:
            unnamed = {**options, **UNNAMED}
            connection = self._hosts.connect(dialect, None, arguments, unnamed)
            self._found = self._look(connection or dialect.connect(*arguments, **unnamed))
        if self._found:
            options.update(UNNAMED)

    def _look(self, connection: Any) -> bool:
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT pg_backend_pid()")
            [(process,)] = cursor.fetchall()
            return bool(process != connection.driver_connection.get_server_pid())
        finally:
            connection.close()


class _Forgotten:
    """Connections of asyncpg that the network may have dropped: after a timeout on one, all that are older.

    asyncpg drops the command and keeps the connection; asyncmy drops the connection, and its pool drops the others.
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
    """Close a connection of asyncpg without notifying the other end, which would be waited for."""
    connection.terminate()


def configure_sqlite(engine: Engine, *, wal: bool) -> None:
    """Apply our settings to each connection of an SQLite engine."""
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
        "journal_size_limit = 8388608",  # a -wal that grew during a long read shrinks; SQLite itself aims at 4 MiB
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_wal(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer
    cursor.close()
