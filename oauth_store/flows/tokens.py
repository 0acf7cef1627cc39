"""Codes and tokens of a grant, in a session: consume, issue, answer again. Who may ask is decided elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from mcp.shared.auth import OAuthToken
from sqlalchemy import ColumnElement, Row, Select, Table, Update, and_, bindparam, func, insert, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint, unseal
from oauth_store.database.models import ACCESS, REFRESH, clients, codes, tokens
from oauth_store.database.sqlite import FIRST, LATER, LATER_IF_CHANGED, SEND
from oauth_store.errors import LostRaceError
from oauth_store.events import emit_after_commit
from oauth_store.flows.connected import revoke_grants

GENERATIONS = 16
"""How many rotations a token that was used within the grace may be behind."""

_is_known_code = (
    codes.c.code_hash == bindparam("b_hash"),
    codes.c.approved_at.is_not(None),
    codes.c.expires_at > bindparam("b_now"),
)
_is_known_refresh_token = (
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == REFRESH,
    tokens.c.revoked_at.is_(None),
    tokens.c.expires_at > bindparam("b_now"),
)
code_by_hash = select(codes).where(*_is_known_code)
known_refresh_token = select(tokens).where(*_is_known_refresh_token)
live_access_token = select(tokens).where(
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == ACCESS,
    tokens.c.consumed_at.is_(None),
    tokens.c.revoked_at.is_(None),
    tokens.c.expires_at > bindparam("b_now"),
)


def _presented_by_client(table: Table, *is_known: ColumnElement[bool]) -> Select[Any]:
    """A client, and, if it is known, what it presents: one SELECT for both spares /token a fifth of its time."""
    return (
        select(*table.c, clients.c.client_id.label("registered_id"), clients.c.client_metadata)
        .add_columns(clients.c.client_secret_hash)
        .select_from(clients.outerjoin(table, and_(*is_known)))
        .where(clients.c.client_id == bindparam("b_client_id"))
        .execution_options(**{SEND: FIRST})
    )


client_and_code = _presented_by_client(codes, *_is_known_code)
client_and_refresh_token = _presented_by_client(tokens, *_is_known_refresh_token)
_pair = (
    select(tokens)
    .where(tokens.c.token_hash.in_((bindparam("b_access"), bindparam("b_refresh"))))
    .execution_options(**{SEND: FIRST})
)
_consume_code = (
    update(codes)
    .where(*_is_known_code, codes.c.consumed_at.is_(None))
    .values(consumed_at=bindparam("b_now"))
    .execution_options(**{SEND: LATER_IF_CHANGED})
)
_consume_refresh_token = (
    update(tokens)
    .where(*_is_known_refresh_token, tokens.c.consumed_at.is_(None))
    .values(
        consumed_at=bindparam("b_now"),
        first_used_at=func.coalesce(tokens.c.first_used_at, bindparam("b_now")),
        replay=bindparam("b_replay"),
    )
    .execution_options(**{SEND: LATER_IF_CHANGED})
)
_consume_access_token = (
    update(tokens)
    .where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == ACCESS, tokens.c.consumed_at.is_(None))
    .values(consumed_at=bindparam("b_now"))
    .execution_options(**{SEND: LATER})
)
_insert_tokens = insert(tokens).execution_options(**{SEND: LATER})
_stamp_first_use = (
    update(tokens)
    .where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.first_used_at.is_(None))
    .values(first_used_at=bindparam("b_now"))
    .execution_options(**{SEND: LATER})
)


@dataclass(frozen=True, slots=True)
class Pair:
    """An access token and, where the client uses them, its refresh token, on the way to the client."""

    access_token: str
    refresh_token: str | None

    @classmethod
    def mint(cls, *, with_refresh_token: bool) -> "Pair":
        return cls(mint("access"), mint("refresh") if with_refresh_token else None)


def lookup(session: Session, /, query: Select[Any], **values: Any) -> Row[Any] | None:
    """Return the one row that a SELECT finds, or None."""
    return session.execute(query, values).one_or_none()


def update_one(session: Session, statement: Update, **values: Any) -> None:
    """Run an UPDATE that must change a row: of any number of callers, in any number of processes, one wins.

    The others get a `LostRaceError`, here or, on SQLite, with the COMMIT. `statement` names `LATER_IF_CHANGED`.
    """
    result = session.execute(statement, values)
    if result.rowcount == 0:  # type: ignore[attr-defined]  # an UPDATE's result is a CursorResult
        raise LostRaceError


def consume_code(session: Session, code: Row[Any], now: int) -> None:
    """Consume an approved code, or lose the race for it."""
    update_one(session, _consume_code, b_hash=code.code_hash, b_now=now)


def consume_refresh_token(session: Session, token: Row[Any], replay: bytes | None, now: int) -> None:
    """Consume a live refresh token and its access token, or lose the race for it."""
    update_one(session, _consume_refresh_token, b_hash=token.token_hash, b_replay=replay, b_now=now)
    if token.paired_hash is not None:
        session.execute(_consume_access_token, {"b_hash": token.paired_hash, "b_now": now})


def issue(
    session: Session,
    pair: Pair,
    grant: Row[Any],
    *,
    scopes: Sequence[str],
    resource: str | None,
    granted_at: int | None,
    now: int,
    access_expiry: int,
    refresh_expiry: int,
) -> OAuthToken:
    """Store a pair of the grant that `grant`, a code's or a token's row, belongs to, and return the answer.

    The refresh token keeps the original scopes; only the access token is narrowed to `scopes` (RFC 6749, section 6).
    """
    common = {
        "grant_id": grant.grant_id,
        "client_id": grant.client_id,
        "subject": grant.subject,
        "resource": resource,
        "created_at": now,
        "granted_at": granted_at,
    }
    access_hash = hash_secret(pair.access_token)
    refresh_hash = hash_secret(pair.refresh_token) if pair.refresh_token else None
    access = {
        "token_hash": access_hash,
        "kind": ACCESS,
        "paired_hash": refresh_hash,
        "scopes": " ".join(scopes),
        "expires_at": now + access_expiry,
        **common,
    }
    refresh = {
        "token_hash": refresh_hash,
        "kind": REFRESH,
        "paired_hash": access_hash,
        "scopes": grant.scopes,
        "expires_at": now + refresh_expiry,
        **common,
    }
    session.execute(_insert_tokens, [access, refresh] if pair.refresh_token else [access])
    return _answer(pair, access_expiry, access["scopes"])


def answer_again(
    session: Session,
    presented: str,
    row: Row[Any],
    scopes: Sequence[str],
    *,
    grace: int,
    now: int,
    address: str | None = None,
) -> OAuthToken | None:
    """Answer a refresh token that was consumed already; end its grant if it is reused. `None` means invalid_grant.

    Within the grace, or while the successor was never used (then the answer was lost), it is the same pair again; and
    within the grace, where that pair was rotated meanwhile, the pair that is live now: whoever holds the token could
    get there step by step. Anything else is reuse, a sign of theft (RFC 9700, section 4.14.2).
    """
    within_grace = now - row.consumed_at < grace
    successor = _successor(session, presented, row)
    for _ in range(GENERATIONS if within_grace else 0):
        if successor is None or successor.refresh.consumed_at is None:
            break
        successor = _successor(session, str(successor.pair.refresh_token), successor.refresh)
    live = successor is not None and successor.is_live(now)
    used = successor is None or successor.refresh.first_used_at is not None
    told = {"grant_id": row.grant_id, "client_id": row.client_id, "subject": row.subject, "address": address}
    if not (grace and (within_grace or (live and not used))):
        emit_after_commit(session, "reuse_detected", **told)
        revoke_grants(session, [row.grant_id], "reuse detected", now)
        return None
    if successor is None or not live or not successor.has(scopes):
        return None
    emit_after_commit(session, "used_pair_replayed" if used else "refresh_replayed", **told)
    return successor.answer(now)


@dataclass(frozen=True, slots=True)
class _Successor:
    """The pair that followed a consumed refresh token. An access token that has expired may be purged already."""

    pair: Pair
    access: Row[Any] | None
    refresh: Row[Any]

    def is_live(self, now: int) -> bool:
        return self.refresh.consumed_at is None and self.refresh.revoked_at is None and self.refresh.expires_at > now

    def has(self, scopes: Sequence[str]) -> bool:
        return self.access is None or set(self.access.scopes.split()) == set(scopes)

    def answer(self, now: int) -> OAuthToken:
        if self.access is None:
            return _answer(self.pair, 0, self.refresh.scopes)
        return _answer(self.pair, max(0, self.access.expires_at - now), self.access.scopes)


def _successor(session: Session, presented: str, row: Row[Any]) -> _Successor | None:
    if row.replay is None:
        return None
    try:
        access_token, refresh_token = unseal(presented, row.replay)
    except InvalidTag:
        return None
    hashes = {"b_access": hash_secret(access_token), "b_refresh": hash_secret(refresh_token)}
    rows = {found.kind: found for found in session.execute(_pair, hashes)}
    refresh = rows.get(REFRESH)
    return None if refresh is None else _Successor(Pair(access_token, refresh_token), rows.get(ACCESS), refresh)


def stamp_first_use(session: Session, row: Row[Any], now: int) -> None:
    """Note on both of a pair that its access token was presented: its predecessor is no longer answered again."""
    for token_hash in (row.paired_hash, row.token_hash):  # the refresh token first, see revoke_grants()
        if token_hash is not None:
            session.execute(_stamp_first_use, {"b_hash": token_hash, "b_now": now})


def _answer(pair: Pair, expires_in: int, scopes: str) -> OAuthToken:
    return OAuthToken(
        access_token=pair.access_token, expires_in=expires_in, scope=scopes or None, refresh_token=pair.refresh_token
    )
