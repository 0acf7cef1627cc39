"""A browser's session on the page of connected apps: a row of `oauth_tokens` with its own kind."""

import time
from typing import Any

from sqlalchemy import Row, bindparam, delete, insert, select
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id
from oauth_store.database.models import PASSKEY, SESSION, tokens
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import lookup

SESSION_SECONDS = 15 * 60

_key = tokens.alias("passkey")
_session_by_hash = (
    select(tokens.c.subject, tokens.c.resource, tokens.c.scopes.label("way"))
    .select_from(tokens.outerjoin(_key, (_key.c.token_hash == tokens.c.paired_hash) & (_key.c.kind == PASSKEY)))
    .where(
        tokens.c.token_hash == bindparam("b_hash"),
        tokens.c.kind == SESSION,
        tokens.c.expires_at > bindparam("b_now"),
        tokens.c.paired_hash.is_(None) | _key.c.token_hash.is_not(None),
    )
)
_delete = delete(tokens).where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == SESSION)


async def begin(issuer: Issuer, secret: str, user: str, way: str, key_hash: bytes | None) -> None:
    """Store a session of a user, and how they signed in: with `way`, and with which passkey, if it was one."""
    await issuer.store.write(_begin_session, secret, user, way, key_hash, issuer.resource, int(time.time()))


def _begin_session(
    session: Session, secret: str, user: str, way: str, key_hash: bytes | None, resource: str | None, now: int
) -> None:
    """Store a session of a user at the server with this resource."""
    row = {
        "token_hash": hash_secret(secret),
        "kind": SESSION,
        "paired_hash": key_hash,
        "grant_id": mint_grant_id(),
        "subject": user,
        "resource": resource,
        "scopes": way,
        "created_at": now,
        "expires_at": now + SESSION_SECONDS,
    }
    session.execute(insert(tokens), row)


async def find(issuer: Issuer, secret: str) -> Row[Any] | None:
    """Return the `subject` and the `way` of a session of this server whose passkey exists, or None."""
    row = await issuer.store.read(_session, secret, int(time.time()))
    return row if row is not None and issuer.is_ours(row.resource) else None


def _session(session: Session, secret: str, now: int) -> Row[Any] | None:
    return lookup(session, _session_by_hash, b_hash=hash_secret(secret), b_now=now)


async def end(issuer: Issuer, secret: str) -> None:
    """Delete a session."""
    await issuer.store.write(_end_session, secret)


def _end_session(session: Session, secret: str) -> None:
    """Delete a session."""
    session.execute(_delete, {"b_hash": hash_secret(secret)})
