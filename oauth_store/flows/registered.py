"""Registered clients as their owner sees them: listed, added by hand, removed with their grants."""

import time
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from oauth_store.database.models import ACCESS, NEVER, REFRESH, Client, Code, Token, is_live
from oauth_store.flows.connected import BATCH, GrantName, described, end_grants, grants_to_end, has_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredClient:
    """A client, and how many live grants it has."""

    client_id: str
    client_name: str | None
    hosts: tuple[str, ...]
    confidential: bool
    created_at: int
    last_approved_at: int | None
    live_grants: int


def registered_clients(
    session: Session, limit: int | None, client_id: str | None = None
) -> tuple[list[RegisteredClient], int]:
    """Return the clients, most recently approved or registered first, or just one; and how many there are in all."""
    newest = func.coalesce(func.nullif(Client.last_used_at, NEVER), Client.created_at)
    query = select(Client.__table__, func.count().over().label("total")).order_by(newest.desc(), Client.client_id)
    if client_id is not None:
        query = query.where(Client.client_id == client_id)
    rows = session.execute(query.limit(limit)).all()
    grants = _live_grants(session, [row.client_id for row in rows])
    listed = []
    for row in rows:
        name, hosts = described(row.client_metadata)
        listed.append(
            RegisteredClient(
                client_id=row.client_id,
                client_name=name,
                hosts=hosts,
                confidential=row.client_secret_hash is not None or has_keys(row.client_metadata),
                created_at=row.created_at,
                last_approved_at=row.last_used_at or None,
                live_grants=grants.get(row.client_id, 0),
            )
        )
    return listed, rows[0].total if rows else 0


def _live_grants(session: Session, client_ids: list[str]) -> dict[str, int]:
    """Return the number of live grants of each of these clients."""
    counts: dict[str, int] = {}
    for start in range(0, len(client_ids), BATCH):
        of_these = Token.client_id.in_(client_ids[start : start + BATCH]) & Token.kind.in_((ACCESS, REFRESH))
        query = select(Token.client_id, func.count(Token.grant_id.distinct())).where(
            of_these & is_live(int(time.time()))
        )
        query = query.group_by(Token.client_id)
        counts |= {str(client_id): number for client_id, number in session.execute(query)}
    return counts


def remove_client(session: Session, client_id: str, by: str, now: int) -> list[GrantName]:
    """Delete a client, end its grants, and return them. `by` names the actor in the log."""
    ending = grants_to_end(session, now, client_id=client_id)
    # in the order of the flow steps, refresh tokens first, which the cascade does not keep
    end_grants(session, ending, "its client is removed", by, now)
    session.execute(delete(Code).where(Code.client_id == client_id))
    session.execute(delete(Client).where(Client.client_id == client_id))
    return ending
