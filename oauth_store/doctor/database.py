"""What the doctor asks the database itself."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from sqlalchemy import Row, func, select, text
from sqlalchemy.orm import Session

from oauth_store.database import schema
from oauth_store.database.engines import POOL_SIZE
from oauth_store.database.models import Base
from oauth_store.database.purge import BATCH, INTERVAL_SECONDS
from oauth_store.database.store import Store
from oauth_store.doctor.finding import Finding, duration, ok, problem, warning
from oauth_store.errors import OAuthStoreError

FUTURE_SECONDS = 60
"""Two machines may differ by this much."""
CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 5, 60
BACKLOG = 100 * BATCH
"""Expired rows of one table that the server, busy all the time, deletes in a hundred minutes."""


async def examine_database(store: Store) -> AsyncIterator[Finding]:
    """Look at a database that is there: can it be reached, is its schema ours, is it sound, is anything amiss in it."""
    try:
        revision = await schema.state(store)
    except OAuthStoreError as error:
        yield problem("database", str(error), "mend what it says; while it lasts, clients get 503")
        return
    yield ok("database", f"{store.display_name} can be reached")
    if revision == schema.EMPTY:
        yield warning(
            "schema",
            "none: the database is empty",
            "the server creates it at first use. If clients were authorized before, theirs is another database",
        )
        return
    try:
        schema.check(revision, store.display_name)
    except OAuthStoreError as error:
        yield problem("schema", *_split(str(error)))
        return
    yield ok("schema", f"{revision}, which this release needs")
    for finding in await store.transact(_examine, False, store.url.get_backend_name()):
        yield finding


def _split(message: str) -> tuple[str, str]:
    found, separator, advice = message.partition("; ")
    return (found, advice) if separator else (message, "see what it says")


def _examine(session: Session, kind: str) -> list[Finding]:
    findings = list(_KINDS[kind](session))
    now = int(time.time())
    return [*findings, _future(session, now), _backlog(session, now)]


def _sqlite(session: Session) -> Iterator[Finding]:
    mode = session.execute(text("PRAGMA journal_mode")).scalar()
    if mode == "wal":
        yield ok("journal mode", "WAL")
    else:
        yield warning(
            "journal mode",
            f"{mode}, not WAL: readers and the writer wait for each other",
            "start the server, which sets it; if it stays so, the file system does not let it: use a local disk",
        )
    damage = [row[0] for row in session.execute(text("PRAGMA quick_check(3)")) if row[0] != "ok"]
    damage += [f"{row[0]} names no {row[2]}" for row in session.execute(text("PRAGMA foreign_key_check"))][:3]
    if damage:
        yield problem(
            "integrity",
            "the file is damaged: " + "; ".join(" ".join(line.split()) for line in damage),
            "stop the server, and restore a backup (see docs/moving.md). Without one: `sqlite3 FILE .recover`",
        )
    else:
        yield ok("integrity", "quick_check found nothing")


def _postgresql(session: Session) -> Iterator[Finding]:
    for finding in _clock(session, "SELECT extract(epoch FROM clock_timestamp())"):
        yield finding
    row = _one(
        session,
        "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool AS read_only, "
        "current_setting('fsync') = 'off' OR current_setting('synchronous_commit') = 'off' AS loses, "
        "current_setting('server_encoding') AS encoding, "
        "current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int AS slots, "
        "array_to_string(ARRAY(SELECT p || ' on ' || t FROM "
        "unnest(ARRAY['oauth_clients', 'oauth_codes', 'oauth_tokens']) t, "
        "unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p WHERE NOT has_table_privilege(t, p)), ', ') AS lacks",
    )
    for finding in _server(
        row, "set fsync and synchronous_commit to on (not for the session alone)", utf8=row.encoding == "UTF8"
    ):
        yield finding
    if row.lacks:
        yield problem(
            "privileges", f"this user may not: {row.lacks}", "GRANT SELECT, INSERT, UPDATE, DELETE on the three tables"
        )
    else:
        yield ok("privileges", "this user may read and write the tables")


def _mysql(session: Session) -> Iterator[Finding]:
    for finding in _clock(session, "SELECT unix_timestamp(now(6))"):
        yield finding
    row = _one(
        session,
        "SELECT @@read_only AS read_only, @@innodb_flush_log_at_trx_commit <> 1 AS loses, @@max_connections AS slots, "
        "@@sql_mode LIKE '%STRICT_TRANS_TABLES%' OR @@sql_mode LIKE '%STRICT_ALL_TABLES%' AS strict, "
        "(SELECT group_concat(table_name, ' ', engine, ' ', table_collation SEPARATOR ', ') "
        "FROM information_schema.tables WHERE table_schema = database() AND table_name IN "
        "('oauth_clients', 'oauth_codes', 'oauth_tokens') AND NOT (engine = 'InnoDB' AND table_collation LIKE "
        "'utf8mb4%')) AS odd",
    )
    for finding in _server(row, "set innodb_flush_log_at_trx_commit to 1", utf8=True):
        yield finding
    if not row.strict:
        yield warning(
            "strictness",
            "sql_mode is not strict: what is too long is cut off without an error",
            "add STRICT_TRANS_TABLES to sql_mode",
        )
    if row.odd:
        yield problem("tables", f"not InnoDB with utf8mb4: {row.odd}", "convert them with ALTER TABLE")
    else:
        yield ok("tables", "InnoDB, utf8mb4")


def _one(session: Session, query: str) -> Row[Any]:
    return session.execute(text(query)).one()


def _clock(session: Session, query: str) -> list[Finding]:
    session.execute(text(query))  # the first one connects
    before = time.time()
    theirs = float(session.execute(text(query)).scalar_one())
    after = time.time()
    return [clock("database's clock", theirs - (before + after) / 2, after - before)]


def clock(check: str, ahead: float, uncertainty: float) -> Finding:
    """Judge how far another clock is ahead of this machine's, in seconds; negative is behind."""
    differs = max(0.0, abs(ahead) - uncertainty)
    shown = f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "let both machines keep time by NTP: tokens expire too early or too late otherwise"
    if differs > CLOCK_PROBLEM_SECONDS:
        return problem(check, shown, advice)
    if differs > CLOCK_WARNING_SECONDS:
        return warning(check, shown, advice)
    return ok(check, "agrees with this machine's")


def _server(row: Row[Any], durable: str, *, utf8: bool) -> Iterator[Finding]:
    if row.read_only:
        yield problem(
            "writing", "the database takes no writes", "use the primary, not a standby; until then clients get 503"
        )
    else:
        yield ok("writing", "the database takes writes")
    if row.loses:
        yield warning(
            "durability",
            "a crash of the database server may lose what clients were told of",
            f"{durable}, or live with it",
        )
    else:
        yield ok("durability", "commits are on disk before clients are told of them")
    if not utf8:
        yield problem(
            "encoding", f"the database's encoding is {row.encoding}, not UTF8", "create a database with ENCODING 'UTF8'"
        )
    if row.slots < 2 * POOL_SIZE:
        yield warning(
            "connections",
            f"the server allows {row.slots}; each process of yours uses up to {POOL_SIZE}",
            "raise max_connections, or run fewer processes",
        )
    else:
        yield ok("connections", f"the server allows {row.slots}: enough for {row.slots // POOL_SIZE} processes at most")


def _future(session: Session, now: int) -> Finding:
    latest = []
    for table in Base.metadata.sorted_tables:
        created = table.columns["created_at"]
        latest.append((session.execute(select(func.max(created)))).scalar() or 0)
    ahead = max(latest) - now
    if ahead > FUTURE_SECONDS:
        return problem(
            "stored times",
            f"the newest row was created {duration(ahead)} from now",
            "this clock is behind, or that of a server was ahead: let all machines keep time by NTP. What was issued "
            "then expires later than it should",
        )
    return ok("stored times", "none is in the future")


def _backlog(session: Session, now: int) -> Finding:
    expired = {}
    for table in Base.metadata.sorted_tables:
        if "expires_at" in table.columns:
            query = select(func.count()).select_from(table).where(table.columns["expires_at"] <= now)
            expired[table.name] = session.execute(query).scalar_one()
    shown = ", ".join(f"{count:,} of {name}" for name, count in expired.items())
    if max(expired.values()) > BACKLOG:
        return warning(
            "purge backlog",
            f"expired rows that are still there: {shown}",
            f"nothing, if the server has just been idle: it deletes {BATCH} a step until none is left, or else every "
            f"{INTERVAL_SECONDS} seconds of use. `oauth-store purge` deletes them now",
        )
    return ok("purge backlog", f"expired rows: {shown}")


_KINDS = {"sqlite": _sqlite, "postgresql": _postgresql, "mysql": _mysql}
