"""A refresh token is rotated, or answered again (RFC 6749, section 6; RFC 9700, section 4.14)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from mcp.server.auth.provider import RefreshToken, TokenError
from mcp.shared.auth import OAuthToken
from sqlalchemy import Row, bindparam, func, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, seal, unseal
from oauth_store.database.models import ACCESS, REFRESH, tokens
from oauth_store.events import emit_after_commit
from oauth_store.flows.clients import OFFLINE_ACCESS, admit
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.scopes import changes_of
from oauth_store.flows.tokens import (
    Pair,
    answer,
    check_resource,
    issue,
    lookup,
    names_of,
    presented,
    update_one,
    with_client,
)

SET_BACK_SECONDS = 7 * 24 * 3600
"""A clock that is set back by less costs no grant. One that was further ahead must not stretch the grace."""
GENERATIONS = 16
"""How many rotations a token that was used within the grace may be behind."""

_is_known = (
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == REFRESH,
    tokens.c.revoked_at.is_(None),
    tokens.c.expires_at > bindparam("b_now"),
)
_token_by_hash = select(tokens).where(*_is_known)
_client_and_token = with_client(tokens, *_is_known)
_pair = select(tokens).where(tokens.c.token_hash.in_((bindparam("b_access"), bindparam("b_refresh"))))
_consume = (
    update(tokens)
    # with the scopes that were read: where the owner changes them meanwhile, the step begins again
    .where(*_is_known, tokens.c.consumed_at.is_(None), tokens.c.scopes == bindparam("b_granted"))
    .values(
        consumed_at=bindparam("b_now"),
        first_used_at=func.coalesce(tokens.c.first_used_at, bindparam("b_now")),
        replay=bindparam("b_replay"),
    )
)
_consume_access_token = (
    update(tokens)
    .where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == ACCESS, tokens.c.consumed_at.is_(None))
    .values(consumed_at=bindparam("b_now"))
)


@dataclass(frozen=True, slots=True, repr=False)
class PresentedRefreshToken:
    """What a client sends to refresh."""

    client_id: str
    refresh_token: str
    secret: str | None = None
    scope: str = ""
    resource: str | None = None
    address: str | None = None
    """For the log."""
    checked: bool = False
    """The SDK's handler has seen to the client, and to its scopes."""


async def load(issuer: Issuer, client_id: str, refresh_token: str) -> RefreshToken | None:
    """Return a refresh token of a client, or None. A consumed one too, so that its exchange can decide."""
    row = await issuer.store.read(_load_refresh_token, refresh_token, int(time.time()))
    if row is None or row.client_id != client_id:
        return None
    return RefreshToken(
        token=refresh_token,
        client_id=row.client_id,
        scopes=row.scopes.split(),
        expires_at=row.expires_at,
        resource=row.resource,
        subject=row.subject,
    )


def _load_refresh_token(session: Session, refresh_token: str, now: int) -> Row[Any] | None:
    """Return the row of a refresh token that was neither revoked nor has expired, or None."""
    return lookup(session, _token_by_hash, b_hash=hash_secret(refresh_token), b_now=now)


async def refresh(issuer: Issuer, token: PresentedRefreshToken) -> OAuthToken:
    """Rotate a refresh token in one step, or answer it again.

    Raises `AuthenticationError` for a client that is not let in, and `TokenError`: always `invalid_grant` for a dead
    refresh token, since any other code strands clients.
    """
    issued = await issuer.store.write(_refresh, issuer, token, int(time.time()))
    if issued is None:
        raise TokenError("invalid_grant", "the refresh token was used already")
    issuer.after_commit()
    return issued


def _refresh(session: Session, issuer: Issuer, token: PresentedRefreshToken, now: int) -> OAuthToken | None:
    """Rotate a live refresh token. One that was consumed is answered again, or ends its grant: None."""
    client, row = presented(session, _client_and_token, issuer, token.client_id, token.refresh_token, now)
    if not token.checked:
        admit(client, token.secret, "refresh_token")
    if row is None:
        raise TokenError("invalid_grant", "the refresh token is unknown, expired or revoked")
    if not token.checked:
        check_resource(issuer, token.resource, row.resource)
    scopes = _narrowed(session, row.scopes.split(), token, row)
    if not issuer.is_ours(row.resource):
        raise TokenError("invalid_grant", "the refresh token is for another resource")
    if row.consumed_at is not None:
        return _answer_again(session, issuer, token, row, now)
    pair = Pair.mint(with_refresh_token=True)
    sealed = seal(token.refresh_token, pair.access_token, str(pair.refresh_token)) if issuer.grace_seconds else None
    update_one(session, _consume, b_hash=row.token_hash, b_granted=row.scopes, b_replay=sealed, b_now=now)
    if row.paired_hash is not None:
        session.execute(_consume_access_token, {"b_hash": row.paired_hash, "b_now": now})
    emit_after_commit(session, "tokens_refreshed", **names_of(row), address=token.address)
    return issue(session, issuer, pair, row, scopes, now, granted_at=row.granted_at or row.created_at)


def _narrowed(session: Session, granted: list[str], token: PresentedRefreshToken, presented: Row[Any]) -> list[str]:
    """Return the scopes to grant (RFC 6749, section 6). Raises `TokenError`.

    White space is any, and offline_access alone asks for nothing less: claude.ai sends " offline_access". Clients
    repeat what they once asked for, granted or not. Others repeat what the last token response said, as mcp-remote
    does: they cannot leave out what the owner has added since, for they have never heard of it.
    """
    asked = dict.fromkeys(token.scope.split())
    if token.checked and not asked.keys() <= set(granted):
        raise TokenError("invalid_scope", "the scopes exceed those that were granted")
    if not asked.keys() - {OFFLINE_ACCESS}:
        return granted
    if token.checked:
        return list(asked)
    kept = [scope for scope in granted if scope in asked]
    if len(kept) < len(granted):
        changes = changes_of(session, [presented.grant_id]).get(presented.grant_id, ())
        unheard = {scope for change in changes if change.at >= presented.created_at for scope in change.added}
        kept = [scope for scope in granted if scope in asked or scope in unheard]
    if not set(kept) - {OFFLINE_ACCESS}:
        raise TokenError("invalid_scope", "none of the scopes was granted")
    return kept


def _answer_again(
    session: Session, issuer: Issuer, token: PresentedRefreshToken, row: Row[Any], now: int
) -> OAuthToken | None:
    """Answer a refresh token that was consumed already; end its grant if it is reused. `None` means invalid_grant.

    Within the grace, or while the successor was never used (then the answer was lost), it is the same pair again; and
    within the grace, where that pair was rotated meanwhile, the pair that is live now: whoever holds the token could
    get there step by step. Anything else is reuse, a sign of theft (RFC 9700, section 4.14.2).
    """
    within_grace = -SET_BACK_SECONDS < now - row.consumed_at < issuer.grace_seconds
    successor = _successor(session, token.refresh_token, row)
    for _ in range(GENERATIONS if within_grace else 0):
        if successor is None or successor.refresh.consumed_at is None:
            break
        successor = _successor(session, str(successor.pair.refresh_token), successor.refresh)
    live = successor is not None and successor.is_live(now)
    used = successor is None or successor.refresh.first_used_at is not None
    names = {**names_of(row), "address": token.address}
    if not (issuer.grace_seconds and (within_grace or (live and not used))):
        emit_after_commit(session, "reuse_detected", **names)
        revoke_grants(session, [row.grant_id], "reuse detected", now)
        return None
    # the scopes of now, which the owner may have changed since
    if successor is None or not live:
        return None
    if not successor.has(_narrowed(session, successor.refresh.scopes.split(), token, row)):
        return None
    emit_after_commit(session, "used_pair_replayed" if used else "refresh_replayed", **names)
    return successor.answer(now)


@dataclass(frozen=True, slots=True, repr=False)
class _Successor:
    """The pair that followed a consumed refresh token. An access token that has expired may be purged already."""

    pair: Pair
    access: Row[Any] | None
    refresh: Row[Any]

    def is_live(self, now: int) -> bool:
        return self.refresh.consumed_at is None and self.refresh.revoked_at is None and self.refresh.expires_at > now

    def has(self, scopes: Sequence[str]) -> bool:
        return self.access is None or set(self.access.scopes.split()) >= set(scopes)

    def answer(self, now: int) -> OAuthToken:
        if self.access is None:
            return answer(self.pair, 0, self.refresh.scopes)
        return answer(self.pair, max(0, self.access.expires_at - now), self.access.scopes)


def _successor(session: Session, refresh_token: str, row: Row[Any]) -> _Successor | None:
    if row.replay is None:
        return None
    try:
        access_token, successor_token = unseal(refresh_token, row.replay)
    except InvalidTag:
        return None
    hashes = {"b_access": hash_secret(access_token), "b_refresh": hash_secret(successor_token)}
    rows = {row.kind: row for row in session.execute(_pair, hashes)}
    successor = rows.get(REFRESH)
    return None if successor is None else _Successor(Pair(access_token, successor_token), rows.get(ACCESS), successor)
