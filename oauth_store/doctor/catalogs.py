"""The doctor's checks for each kind of database."""

import time
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.orm import Session

from oauth_store.database.engines import POOL_SIZE
from oauth_store.doctor.finding import RESTORE, Finding, clock, ok, problem, warning

Step = Callable[[Session], list[Finding]]

_NO_TABLES = warning(
    "schema",
    "the database is empty",
    "the server creates the tables at first use. If clients were authorized before, this is the wrong database",
)


def _empty(_session: Session) -> list[Finding]:
    return [_NO_TABLES]


def _empty_postgresql(session: Session) -> list[Finding]:
    """Without USAGE on a schema, a user sees none of its tables."""
    row = session.execute(
        text(
            "SELECT current_schema() AS present, current_user AS name, (SELECT string_agg(schemaname, ', ') "
            "FROM pg_tables WHERE tablename = 'oauth_tokens') AS elsewhere"
        )
    ).one()
    if row.present is None:
        return [
            problem(
                "schema",
                f"{row.name} cannot use any schema of the search_path; oauth_tokens is in {row.elsewhere or 'none'}",
                f"GRANT USAGE ON SCHEMA {row.elsewhere or 'public'} TO {row.name}",
            )
        ]
    if row.elsewhere:
        return [
            warning(
                "schema",
                f"no tables in {row.present}, but oauth_tokens is in {row.elsewhere}",
                f"if clients were authorized before, run: ALTER ROLE {row.name} SET search_path = {row.elsewhere}",
            )
        ]
    return [_NO_TABLES]


def _journal_mode(session: Session) -> list[Finding]:
    mode = session.execute(text("PRAGMA journal_mode")).scalar()
    if mode == "wal":
        return [ok("journal mode", "WAL")]
    return [
        warning(
            "journal mode",
            f"{mode}, not WAL: readers and the writer block each other",
            "start the server, which sets WAL; if the file system does not allow it, move the file to a local disk",
        )
    ]


def _pages(session: Session) -> list[Finding]:
    damage = [row[0] for row in session.execute(text("PRAGMA quick_check(3)")) if row[0] != "ok"]
    return _damage(damage) or [ok("integrity", "quick_check found no damage")]


def _references(session: Session) -> list[Finding]:
    rows = session.execute(text("PRAGMA foreign_key_check")).fetchmany(3)
    return _damage([f"a row of {row[0]} refers to a missing row of {row[2]}" for row in rows])


def _damage(lines: list[str]) -> list[Finding]:
    shown = "; ".join(" ".join(line.split()) for line in lines)
    return [problem("integrity", f"the file is damaged: {shown}", RESTORE)] if lines else []


def _clock(query: str) -> Step:
    def step(session: Session) -> list[Finding]:
        session.execute(text(query))  # the first query connects
        before = time.time()
        theirs = float(session.execute(text(query)).scalar_one())
        after = time.time()
        return [clock("database's clock", theirs - (before + after) / 2, after - before)]

    return step


def _durability(query: str, advice: str) -> Step:
    def step(session: Session) -> list[Finding]:
        if session.execute(text(query)).scalar_one():
            lost = "a crash of the database server may lose writes that were acknowledged"
            return [warning("durability", lost, f"{advice}, or accept the risk")]
        return [ok("durability", "commits are on disk before they are acknowledged")]

    return step


def _connections(query: str) -> Step:
    def step(session: Session) -> list[Finding]:
        slots = int(session.execute(text(query)).scalar_one())
        if slots < 2 * POOL_SIZE:
            shown = f"the database server allows {slots}; each of your processes uses up to {POOL_SIZE}"
            return [warning("connections", shown, "raise max_connections, or run fewer processes")]
        shown = f"the database server allows {slots}, enough for at most {slots // POOL_SIZE} processes"
        return [ok("connections", shown)]

    return step


def _encoding(session: Session) -> list[Finding]:
    encoding = session.execute(text("SELECT current_setting('server_encoding')")).scalar_one()
    if encoding == "UTF8":
        return []
    advice = "create a database with ENCODING 'UTF8'"
    return [problem("encoding", f"the database's encoding is {encoding}, not UTF8", advice)]


def _privileges(session: Session) -> list[Finding]:
    lacks = session.execute(
        text(
            "SELECT string_agg(p || ' on ' || t, ', ') "
            "FROM unnest(ARRAY['oauth_clients', 'oauth_codes', 'oauth_tokens']) t, "
            "unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p WHERE NOT has_table_privilege(t, p)"
        )
    ).scalar()
    if lacks:
        advice = "GRANT SELECT, INSERT, UPDATE, DELETE on the three tables"
        return [problem("privileges", f"this user lacks {lacks}", advice)]
    return [ok("privileges", "this user may read and write the tables")]


def _row_security(session: Session) -> list[Finding]:
    tables = session.execute(
        text(
            "SELECT string_agg(t, ', ') FROM unnest(ARRAY['oauth_clients', 'oauth_codes', 'oauth_tokens']) t "
            "WHERE row_security_active(t)"
        )
    ).scalar()
    if not tables:
        return []
    return [
        warning(
            "row level security",
            f"policies may hide rows of these tables from this user: {tables}",
            "let the server's user own the tables, or ALTER ROLE ... BYPASSRLS",
        )
    ]


def _mysql_tables(session: Session) -> list[Finding]:
    odd = session.execute(
        text(
            "SELECT group_concat(table_name, ' ', engine, ' ', table_collation SEPARATOR ', ') "
            "FROM information_schema.tables WHERE table_schema = database() AND table_name IN "
            "('oauth_clients', 'oauth_codes', 'oauth_tokens') AND NOT (engine = 'InnoDB' AND table_collation LIKE "
            "'utf8mb4%')"
        )
    ).scalar()
    if odd:
        return [problem("tables", f"not InnoDB with utf8mb4: {odd}", "convert them with ALTER TABLE")]
    return [ok("tables", "InnoDB, utf8mb4")]


EMPTY_STEPS = {"sqlite": _empty, "postgresql": _empty_postgresql, "mysql": _empty}
STEPS: dict[str, list[tuple[str, Step]]] = {
    "sqlite": [("journal mode", _journal_mode), ("integrity", _pages), ("integrity", _references)],
    "postgresql": [
        ("database's clock", _clock("SELECT extract(epoch FROM clock_timestamp())")),
        (
            "durability",
            _durability(
                "SELECT current_setting('fsync') = 'off' OR current_setting('synchronous_commit') = 'off'",
                "set fsync and synchronous_commit to on (not for the session alone)",
            ),
        ),
        ("encoding", _encoding),
        (
            "connections",
            _connections(
                "SELECT current_setting('max_connections')::int - "
                "current_setting('superuser_reserved_connections')::int"
            ),
        ),
        ("privileges", _privileges),
        ("row level security", _row_security),
    ],
    "mysql": [
        ("database's clock", _clock("SELECT unix_timestamp(now(6))")),
        (
            "durability",
            _durability("SELECT @@innodb_flush_log_at_trx_commit <> 1", "set innodb_flush_log_at_trx_commit to 1"),
        ),
        ("connections", _connections("SELECT @@max_connections")),
        ("tables", _mysql_tables),
    ],
}
