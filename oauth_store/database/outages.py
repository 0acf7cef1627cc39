"""Classify an error of a database: a conflict with others, a closed connection, or an outage."""

from sqlalchemy import exc

from oauth_store.database.url import DRIVER_MODULES
from oauth_store.errors import DatabaseUnavailable


def is_broken(error: BaseException | None) -> bool:
    """Return whether the connection to a file should be opened anew."""
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    return name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_CORRUPT", "SQLITE_NOTADB"))


_CONFLICT_STATES = {"40001", "40P01"}
"""SQLSTATE of a serialization failure and of a deadlock."""


_CONFLICT_NUMBERS = {1213, 1205, 1020}
"""MySQL's numbers for a deadlock, a timeout while waiting for a lock, and a row that changed since it was read."""

_DUPLICATE_NUMBER = 1062
"""MySQL's number for a key that exists."""


def is_conflict(error: Exception) -> bool:
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return False
    if getattr(error.orig, "sqlstate", None) in _CONFLICT_STATES:
        return True
    return bool(error.orig.args) and error.orig.args[0] in _CONFLICT_NUMBERS


def is_duplicate(error: exc.IntegrityError) -> bool:
    """Return whether a row with this key exists, rather than that one which it refers to is missing."""
    name = getattr(error.orig, "sqlite_errorname", "")
    if name in ("SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_UNIQUE"):
        return True
    if getattr(error.orig, "sqlstate", None) == "23505":
        return True
    return error.orig is not None and bool(error.orig.args) and error.orig.args[0] == _DUPLICATE_NUMBER


def hung_up(error: BaseException) -> bool:
    """Return whether the server closed the connection, maybe long ago: the pool has dropped all of its age by now.

    Testing each connection before it is used (`pool_pre_ping`) takes 3 of a lookup's 4 round trips on PostgreSQL, and
    misses what happens right after.
    """
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def outage(error: Exception, where: str) -> DatabaseUnavailable | None:
    """Return `error` as an operator should read it if the database cannot be used right now, else None."""
    if isinstance(error, RuntimeError) and "attached to a different loop" in str(error):  # as asyncio puts it
        return DatabaseUnavailable(
            f"{where} cannot be used: a connection of the engine that you passed in belongs to another event loop; "
            "await engine.dispose() at the end of each event loop, or pass the URL instead of the engine"
        )
    if isinstance(error, exc.DBAPIError):
        # Unique keys, foreign keys and values concern the step; everything else that a driver reports does not.
        if isinstance(error, exc.IntegrityError | exc.DataError):
            return None
    elif not isinstance(error, exc.TimeoutError | OSError | TimeoutError) and (
        # SQLAlchemy 2.0 does not wrap asyncpg's errors when it cannot connect
        type(error).__module__.partition(".")[0] not in DRIVER_MODULES
    ):
        return None
    cause = cause_of(error)
    if isinstance(error, exc.TimeoutError):  # of the pool, which would quote its settings
        cause = "all connections were in use for too long"
    elif "prepared statement" in cause:  # it is on another connection of the pooler
        cause = f"{cause}; behind PgBouncer or another pooler, add pgbouncer=true to the options of the URL"
    elif "Connect call failed" in cause or "Name or service not known" in cause:
        cause = f"{cause}; check that the database server runs, and the host and the port in the URL"
    elif cause.startswith('database "') and cause.endswith("does not exist"):
        cause = f"{cause}; create it, or correct the URL"
    return DatabaseUnavailable(f"{where} cannot be used: {cause}")


def cause_of(error: Exception) -> str:
    """Return a driver's message in one line, without statements and values."""
    driver_error = getattr(error, "orig", None) or error
    cause = " ".join(str(driver_error).split()) or type(driver_error).__name__
    if cause == "TimeoutError":  # asyncpg's has no text
        return "it did not respond in time"
    if hasattr(driver_error, "sqlite_errorname"):  # there are thirty kinds of "disk I/O error"
        return f"{cause} ({driver_error.sqlite_errorname})"
    return cause
