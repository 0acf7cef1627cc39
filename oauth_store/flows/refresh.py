"""Rotate a refresh token, or repeat the response to it (RFC 6749, section 6; RFC 9700, section 4.14)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from mcp.server.auth.provider import RefreshToken, TokenError
from mcp.shared.auth import OAuthToken
from sqlalchemy import Row, bindparam, func, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import ACCESS, REFRESH, tokens
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret, spend
from oauth_store.flows.clients import OFFLINE_ACCESS, admit
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.scopes import changes_of
from oauth_store.flows.tokens import (
    Pair,
    answer,
    check_resource,
    in_grace,
    issue,
    lookup,
    names_of,
    presented,
    update_one,
    with_client,
)
from oauth_store.sealing import seal, unseal

GENERATIONS = 16
"""How many rotations behind a token may be that is presented within the grace."""

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
    """A client's request to refresh."""

    client_id: str
    refresh_token: str
    secret: Secret = None
    scope: str = ""
    resource: str | None = None
    address: str | None = None
    """For the log."""
    checked: bool = False
    """Whether the SDK's handler has checked the client and its scopes."""


async def load(issuer: Issuer, client_id: str, refresh_token: str) -> RefreshToken | None:
    """Return a refresh token of a client, even if consumed, so that its exchange can decide; or None."""
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
    """Return the row of a refresh token that is neither revoked nor expired, or None."""
    return lookup(session, _token_by_hash, b_hash=hash_secret(refresh_token), b_now=now)


async def refresh(issuer: Issuer, token: PresentedRefreshToken) -> OAuthToken:
    """Rotate a refresh token in one step, or repeat the response to it.

    Raises `AuthenticationError` if the client cannot authenticate, and `TokenError`: always `invalid_grant` for a dead
    refresh token, since any other code strands clients.
    """
    issued = await issuer.store.write(_refresh, issuer, token, int(time.time()))
    if issued is None:
        raise TokenError("invalid_grant", "the refresh token was already used")
    issuer.after_commit()
    return issued


def _refresh(session: Session, issuer: Issuer, token: PresentedRefreshToken, now: int) -> OAuthToken | None:
    """Rotate a live refresh token. For a consumed one, repeat the response, or end the grant and return None."""
    issued = _rotated(session, issuer, token, now)
    spend(session, token.secret, now)
    return issued


def _rotated(session: Session, issuer: Issuer, token: PresentedRefreshToken, now: int) -> OAuthToken | None:
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

    Any white space separates them, and offline_access alone does not narrow: claude.ai sends " offline_access". Clients
    repeat the scopes that they once requested, granted or not. Others, such as mcp-remote, repeat the scopes of their
    last token response: they cannot leave out a scope that the owner has added since, because they do not know it.
    """
    asked = dict.fromkeys(token.scope.split())
    if token.checked and not asked.keys() <= set(granted):
        raise TokenError("invalid_scope", "the scopes exceed the granted ones")
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
    """Repeat the response to a consumed refresh token, or end its grant if it is reused. None means invalid_grant.

    Within the grace, or while the successor is unused because the response was lost, the response is the same pair.
    Within the grace, if that pair was rotated meanwhile, it is the pair that is live now: a holder of the token could
    get it step by step. Anything else is reuse, a sign of theft (RFC 9700, section 4.14.2).
    """
    within_grace = in_grace(issuer, row.consumed_at, now)
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
    asked = _narrowed(session, successor.refresh.scopes.split(), token, row)
    if not successor.has(asked, row.scopes.split()):
        return None
    emit_after_commit(session, "used_pair_replayed" if used else "refresh_replayed", **names)
    return successor.answer(now)


@dataclass(frozen=True, slots=True, repr=False)
class _Successor:
    """The pair that followed a consumed refresh token. An expired access token may already be purged."""

    pair: Pair
    access: Row[Any] | None
    refresh: Row[Any]

    def is_live(self, now: int) -> bool:
        return self.refresh.consumed_at is None and self.refresh.revoked_at is None and self.refresh.expires_at > now

    def has(self, scopes: Sequence[str], granted: Sequence[str]) -> bool:
        """Return whether the access token has these scopes, of those that were `granted` when it was issued."""
        return self.access is None or not ({*self.access.scopes.split()} ^ {*scopes}) & {*granted}

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
