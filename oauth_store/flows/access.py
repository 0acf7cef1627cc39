"""Verify an access token on every call, and record its first use (RFC 6750)."""

import time
from typing import Any

from fastmcp.server import auth as fastmcp_auth
from fastmcp.server.auth import AccessToken
from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import ACCESS, tokens
from oauth_store.errors import DatabaseUnavailable, OAuthStoreError
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import lookup
from oauth_store.urls import same_resource

_live_token_by_hash = select(tokens).where(
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == ACCESS,
    tokens.c.consumed_at.is_(None),
    tokens.c.revoked_at.is_(None),
    tokens.c.expires_at > bindparam("b_now"),
)
USE_SECONDS = 5 * 60
"""How often the use of an access token is recorded."""
USES = 10_000
"""Tokens whose last use is remembered, so that it is not recorded again."""

_first_use = (
    update(tokens)
    .where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.first_used_at.is_(None))
    .values(first_used_at=bindparam("b_now"))
)
_use = (
    update(tokens)
    .where(
        tokens.c.token_hash == bindparam("b_hash"),
        tokens.c.first_used_at.is_(None) | (tokens.c.first_used_at <= bindparam("b_now") - USE_SECONDS),
    )
    .values(first_used_at=bindparam("b_now"))
)


_VerificationError: Any = getattr(fastmcp_auth, "TokenVerificationError", RuntimeError)
"""An error that `MultiAuth` does not swallow. FastMCP has it from 4.2 on."""


class _Unverifiable(DatabaseUnavailable, _VerificationError):  # type: ignore[misc]  # a class of Any
    """An outage, inside `MultiAuth` too: a token that cannot be looked up is not refused."""


async def load(issuer: Issuer, token: str) -> AccessToken | None:
    """Return a live access token, or None. It has no side effects: the revocation endpoint calls it too."""
    row = await _look_up(issuer, hash_secret(token))
    return None if row is None else AccessToken(token=token, **_fields(row))


async def verify(issuer: Issuer, token: str, resource: str | None = None) -> AccessToken | None:
    """Return a live access token that was issued for this server's own MCP endpoint, or for `resource`, or None.

    Raises `DatabaseUnavailable` during an outage (RFC 8707, section 2).
    """
    token_hash, now = hash_secret(token), time.time()
    remembered, row = issuer.store.remembered, None
    fields = remembered.recall(token_hash) if remembered is not None else None
    if fields is None or fields["expires_at"] <= now:
        try:
            row = await _look_up(issuer, token_hash)
        except OAuthStoreError as error:
            raise _Unverifiable(*error.args) from error
        if row is None:
            return None
        fields = _fields(row)
    if not (issuer.is_own(fields["resource"]) if resource is None else _is_for(fields["resource"], resource)):
        return None
    if row is not None or now - issuer.uses.get(token_hash, 0) >= USE_SECONDS:
        _note_use(issuer, token_hash, row, now)
    return AccessToken(token=token, **fields)


def _is_for(granted: str | None, resource: str) -> bool:
    return granted is not None and same_resource(granted, resource)


def _note_use(issuer: Issuer, token_hash: bytes, row: Row[Any] | None, now: float) -> None:
    """Record a use, once in five minutes. `row` is None for a remembered token, whose first use is recorded."""
    uses = issuer.uses
    first = row is not None and row.first_used_at is None
    if row is not None and not first:
        uses[token_hash] = max(row.first_used_at, uses.get(token_hash, 0))
    if not first and now - uses.get(token_hash, 0) < USE_SECONDS:
        return
    if len(uses) >= USES:
        uses.clear()
    uses[token_hash] = now
    issuer.store.start_write(_stamp_use, token_hash, row.paired_hash if row is not None and first else None, int(now))


async def _look_up(issuer: Issuer, token_hash: bytes) -> Row[Any] | None:
    remembered = issuer.store.remembered
    version = remembered.version() if remembered is not None else None  # before the row: see Remembered.remember
    row = await issuer.store.read(_live_access_token, token_hash, int(time.time()))
    if remembered is not None and row is not None and row.first_used_at is not None:
        remembered.remember(row.token_hash, _fields(row), version)
    return row


def _live_access_token(session: Session, token_hash: bytes, now: int) -> Row[Any] | None:
    """Return the row of a live access token, or None."""
    return lookup(session, _live_token_by_hash, b_hash=token_hash, b_now=now)


def _stamp_use(session: Session, token_hash: bytes, paired_hash: bytes | None, now: int) -> None:
    """Record the use of an access token. After its first use, its predecessor no longer gets this pair again."""
    if paired_hash is not None:  # the refresh token first, see revoke_grants()
        session.execute(_first_use, {"b_hash": paired_hash, "b_now": now})
    session.execute(_use, {"b_hash": token_hash, "b_now": now})


def _fields(row: Row[Any]) -> dict[str, Any]:
    """Return the fields of an `AccessToken`, except the token itself."""
    return {
        "client_id": row.client_id,
        "scopes": row.scopes.split(),
        "expires_at": row.expires_at,
        "resource": row.resource,
        "subject": row.subject,
    }
