"""A browser's session on the page of connected apps: a row of `oauth_tokens` with its own kind."""

import time
from typing import Any

from sqlalchemy import Row, bindparam, delete, insert, select
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id
from oauth_store.database.models import SESSION, tokens
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import lookup

SESSION_SECONDS = 15 * 60

_session_by_hash = select(tokens.c.subject, tokens.c.resource).where(
    tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == SESSION, tokens.c.expires_at > bindparam("b_now")
)
_delete = delete(tokens).where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == SESSION)


async def begin(issuer: Issuer, secret: str, user: str) -> None:
    """Store a session of a user."""
    await issuer.store.write(_begin_session, secret, user, issuer.resource, int(time.time()))


def _begin_session(session: Session, secret: str, user: str, resource: str | None, now: int) -> None:
    """Store a session of a user at the server with this resource."""
    row = {
        "token_hash": hash_secret(secret),
        "kind": SESSION,
        "grant_id": mint_grant_id(),
        "subject": user,
        "resource": resource,
        "scopes": "",
        "created_at": now,
        "expires_at": now + SESSION_SECONDS,
    }
    session.execute(insert(tokens), row)


async def user_of(issuer: Issuer, secret: str) -> str | None:
    """Return the user of a session of this server, or None."""
    row = await issuer.store.read(_session_user, secret, int(time.time()))
    return str(row.subject) if row is not None and issuer.is_ours(row.resource) else None


def _session_user(session: Session, secret: str, now: int) -> Row[Any] | None:
    """Return the subject and the resource of a session that has not expired, or None."""
    return lookup(session, _session_by_hash, b_hash=hash_secret(secret), b_now=now)


async def end(issuer: Issuer, secret: str) -> None:
    """Delete a session."""
    await issuer.store.write(_end_session, secret)


def _end_session(session: Session, secret: str) -> None:
    """Delete a session."""
    session.execute(_delete, {"b_hash": hash_secret(secret)})
