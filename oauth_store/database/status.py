"""The contents of a database: its size, its rows, and the age of its grants."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, func, select, text
from sqlalchemy.orm import Session

from oauth_store.database.models import (
    ACCESS,
    ASSERTION,
    REFRESH,
    SCOPES,
    Base,
    Client,
    Code,
    Token,
    is_expired,
    is_live,
    is_unused,
)
from oauth_store.database.store import Store
from oauth_store.display import iso

_TABLE_SIZE = {
    "postgresql": "SELECT pg_total_relation_size(CAST(CAST(:name AS text) AS regclass))",
    "mysql": "SELECT data_length + index_length FROM information_schema.tables "
    "WHERE table_schema = database() AND table_name = :name",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one table. Each is live, expired or idle."""

    rows: int
    live: int
    """Clients with a live grant; requests and codes that wait; tokens that are accepted."""
    expired: int
    """Rows that the purge deletes."""
    idle: int
    """Kept for a reason: clients that may come back, codes and tokens whose replay or reuse has to be detected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    size_bytes: int
    tables: dict[str, Rows]
    live_grants: int
    oldest_grant_at: int | None
    newest_grant_at: int | None


def take_inventory(session: Session, store: Store, now: int) -> Inventory:
    """Count everything, in one pass over each table, and one more over the live tokens."""
    live = is_live(now) & Token.kind.in_((ACCESS, REFRESH))
    granted_at = func.coalesce(Token.granted_at, Token.created_at)
    grants = (
        session.execute(
            select(
                func.count(Token.grant_id.distinct()),
                func.count(Token.client_id.distinct()),
                func.min(granted_at),
                func.max(granted_at),
            ).where(live)
        )
    ).one()
    tables = {
        Client.__tablename__: _rows(session, Client, live=None, expired=is_unused(now), known_live=grants[1]),
        Code.__tablename__: _rows(
            session, Code, live=Code.consumed_at.is_(None) & (Code.expires_at > now), expired=is_expired(Code, now)
        ),
        Token.__tablename__: _rows(
            session, Token, live=is_live(now) & Token.kind.not_in((SCOPES, ASSERTION)), expired=is_expired(Token, now)
        ),
    }
    return Inventory(
        size_bytes=_size(session, store),
        tables=tables,
        live_grants=grants[0],
        oldest_grant_at=grants[2],
        newest_grant_at=grants[3],
    )


def _rows(
    session: Session,
    model: type[Base],
    *,
    live: ColumnElement[bool] | None,
    expired: ColumnElement[bool],
    known_live: int = 0,
) -> Rows:
    counts = [func.count(), func.count(case((expired, 1)))]
    if live is not None:
        counts.append(func.count(case((live, 1))))
    total, gone, *rest = session.execute(select(*counts).select_from(model)).one()
    in_use = rest[0] if rest else known_live
    return Rows(rows=total, live=in_use, expired=gone, idle=total - in_use - gone)


def _size(session: Session, store: Store) -> int:
    if store.sqlite:
        pages = session.execute(text("PRAGMA page_count")).scalar_one()
        size = int(pages * session.execute(text("PRAGMA page_size")).scalar_one())
        try:
            return size + os.stat(f"{store.url.database}-wal").st_size
        except OSError:  # there is none
            return size
    statement = text(_TABLE_SIZE[store.url.get_backend_name()])
    sizes = [session.execute(statement, {"name": name}).scalar_one() for name in Base.metadata.tables]
    return sum(map(int, sizes))


def as_json(inventory: Inventory) -> dict[str, Any]:
    """Return an inventory as `oauth-store status --json` prints it."""
    return {
        "size_bytes": inventory.size_bytes,
        "tables": {name: asdict(rows) for name, rows in inventory.tables.items()},
        "live_grants": inventory.live_grants,
        "oldest_grant_at": iso(inventory.oldest_grant_at),
        "newest_grant_at": iso(inventory.newest_grant_at),
    }
