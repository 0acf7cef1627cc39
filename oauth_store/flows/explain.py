"""Explain why a token works or does not, from what the database knows about it."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from oauth_store.credentials import device_handle, hash_secret, user_code_of
from oauth_store.database.models import ACCESS, ASSERTION, DEVICE, PASSKEY, REFRESH, SCOPES, clients, codes, tokens
from oauth_store.display import one_line, with_age
from oauth_store.flows.connected import described, is_machine, live_grants, presents_users
from oauth_store.flows.scopes import ScopeChange, changes_of
from oauth_store.sealing import unseal

KINDS = {"access": "access token", "refresh": "refresh token", "code": "authorization code"} | {
    "device": "device code",
    "request": "authorization request",
    **{kind: kind for kind in ("session", "enrollment")},
}
"""The prefixes of our secrets, and their meanings."""

_is_presented = tokens.c.kind.not_in((SCOPES, ASSERTION))

AGAIN = "Connect its client again."
NOTHING = "No action is needed."
_MACHINE = "Its client can get a new one with its secret. To prevent that, use `oauth-store clients remove`."
_OF_A_USER = "Its client can get a new one with a new assertion of the identity provider."
_NOT_OF_A_USER = f"{_OF_A_USER} To prevent that, end the user's access there, or use `oauth-store clients remove`."

_ENDED = {
    "reuse detected": (
        "reuse_detected",
        "one of its refresh tokens was presented again after the pair that followed it was in use. A stolen copy looks "
        "like that; so does an app that restored an old copy of its tokens, from a backup or on a second device",
        "If you know of no such copy, treat it as a theft, and check who could read the client's tokens. Either way, "
        "connect its client again.",
    ),
    "code replayed": (
        "code_replayed",
        "its authorization code was presented a second time, with valid proof of the client. Either the client has a "
        "bug, or an attacker can read its data",
        AGAIN,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything that is known about a secret. Never the secret."""

    kind: str
    state: str
    """`live`, `waiting`, `used`, `denied`, `expired`, `rotated`, `revoked`, `reuse_detected`, `code_replayed`,
    `client_gone` or `unknown`."""
    text: str
    advice: str
    client_id: str | None = None
    client_name: str | None = None
    hosts: tuple[str, ...] = ()
    grant_id: bytes | None = None
    grant_live: bool | None = None
    subject: str | None = None
    scopes: tuple[str, ...] = ()
    resource: str | None = None
    created_at: int | None = None
    first_used_at: int | None = None
    """Of a refresh token: when either token of its pair was used first."""
    last_used_at: int | None = None
    """Of an access token, accurate to five minutes."""
    consumed_at: int | None = None
    revoked_at: int | None = None
    revoked_reason: str | None = None
    expires_at: int | None = None
    scope_changes: tuple[ScopeChange, ...] = ()
    """Of its grant."""
    successor: str | None = None
    """The state of the pair that followed an exchanged refresh token: `unused`, `used`, `rotated` or `ended`."""

    @property
    def live(self) -> bool:
        """Whether the server accepts the secret now."""
        return self.state in ("live", "waiting")


def explain(session: Session, secret: str, now: int) -> Explanation:
    """Return what a secret is, whose it is, and why it works or does not. Only reads."""
    hashed = hash_secret(secret)
    token = _first(session, _with_client(tokens).where(tokens.c.token_hash == hashed, _is_presented))
    if token is not None:
        return _token(session, secret, token, now) if token.kind in (ACCESS, REFRESH) else _of_no_grant(token, now)
    code = _first(session, _with_client(codes).where(codes.c.code_hash == hashed))
    if code is not None:
        return _code(session, "device code" if code.redirect_uri == DEVICE else "authorization code", code, now)
    user_code = user_code_of(secret)
    handle = hashed if user_code is None else hash_secret(device_handle(user_code))
    request = _first(session, _with_client(codes).where(codes.c.handle_hash == handle))
    if request is not None:
        return _code(session, "authorization request", request, now)
    client = _first(session, select(clients).where(clients.c.client_secret_hash == hashed))
    return _unknown(secret) if client is None else _client_secret(client, now)


def _with_client(table: Any) -> Select[Any]:
    metadata = clients.c.client_metadata
    return select(table, metadata).join(clients, clients.c.client_id == table.c.client_id, isouter=True)


def _first(session: Session, query: Select[Any]) -> Row[Any] | None:
    row: Row[Any] | None = session.execute(query).first()
    return row


def _about(session: Session, kind: str, row: Row[Any], now: int) -> Explanation:
    """Return the fields that a row of a grant provides, for the rest to be filled in."""
    grant, _ = live_grants(session, grant_id=row.grant_id, now=now)
    name, hosts = described(row.client_metadata) if row.client_metadata is not None else (None, ())
    return Explanation(
        kind=kind,
        state="",
        text="",
        advice="",
        client_id=row.client_id,
        client_name=name,
        hosts=hosts,
        grant_id=row.grant_id,
        grant_live=bool(grant),
        subject=row.subject,
        scopes=tuple(row.scopes.split()),
        resource=row.resource,
        created_at=row.created_at,
        consumed_at=row.consumed_at,
        expires_at=row.expires_at,
        scope_changes=tuple(changes_of(session, [row.grant_id]).get(row.grant_id, ())),
    )


def _token(session: Session, secret: str, row: Row[Any], now: int) -> Explanation:
    kind = "access token" if row.kind == ACCESS else "refresh token"
    about = replace(
        _about(session, kind, row, now),
        **{"last_used_at" if row.kind == ACCESS else "first_used_at": row.first_used_at},
        revoked_at=row.revoked_at,
        revoked_reason=row.revoked_reason,
    )
    if row.client_metadata is None:
        return _client_gone(about)
    machine = is_machine(row.client_metadata)
    of_a_user = row.kind == ACCESS and row.paired_hash is None and presents_users(row.client_metadata)
    if row.revoked_at is not None and row.revoked_at < row.expires_at:
        ended = _ended(about, row.revoked_at, row.revoked_reason, now)
        return replace(ended, advice=_MACHINE if machine else _NOT_OF_A_USER if of_a_user else ended.advice)
    if row.consumed_at is not None:
        return _rotated(session, secret, about, row, now)
    if row.expires_at > now:
        text = f"It is valid until {with_age(row.expires_at, now)}."
        advice = (
            "If the server still refuses it, compare the resource with the server's URL, and the scopes with those "
            "that the server requires."
        )
        return replace(about, state="live", text=text, advice=advice)
    about = replace(about, state="expired")
    text = f"It expired at {with_age(row.expires_at, now)}."
    if machine:
        return replace(about, text=f"{text} Its client gets a new one with its secret.", advice=NOTHING)
    if of_a_user:
        return replace(about, text=f"{text} {_OF_A_USER}", advice=NOTHING)
    if row.kind == REFRESH:
        text += " A refresh token expires if its client does not refresh in time."
        return replace(about, text=text, advice=AGAIN)
    if about.grant_live:
        return replace(about, text=f"{text} Its grant is live: the client gets a new one with its refresh token.",
                       advice=NOTHING)  # fmt: skip
    why = "and its grant is over too" if row.paired_hash else "and came without a refresh token"
    return replace(about, text=f"{text[:-1]}, {why}.", advice=AGAIN)


def _client_gone(about: Explanation) -> Explanation:
    text = f"Its client, {one_line(str(about.client_id))}, is no longer registered: it was removed."
    return replace(about, state="client_gone", text=text, advice="Have the client register again, then connect it.")


def _ended(about: Explanation, at: int, reason: str | None, now: int) -> Explanation:
    state, why, advice = _ENDED.get(reason or "", ("revoked", one_line(reason or "for an unknown reason"), AGAIN))
    text = f"Its grant was ended at {with_age(at, now)}: {why}."
    return replace(about, state=state, text=text, advice=advice, revoked_at=at, revoked_reason=reason)


def _rotated(session: Session, secret: str, about: Explanation, row: Row[Any], now: int) -> Explanation:
    at = with_age(row.consumed_at, now)
    grant = "The grant is live." if about.grant_live else "The grant is over too."
    advice = NOTHING if about.grant_live else AGAIN
    about = replace(about, state="rotated")
    if row.kind == ACCESS:
        text = f"Its client refreshed at {at}, and got a new pair. {grant}"
        return replace(about, text=text, advice=advice)
    successor = _successor(session, secret, row, now)
    text = f"It was exchanged for a new pair at {at}"
    if successor == "unused":
        text += (
            ", which has not been used yet: the response may have been lost. Presented again, it gets the same pair."
        )
    elif successor == "used":
        text += (
            ", and the new pair is in use. If it is presented again after the grace (two minutes by default), the "
            "server treats it as a stolen copy and ends the grant."
        )
        advice = f"{NOTHING} If the client still presents this token, it lost the new pair: connect it again."
    elif successor == "rotated":
        text += f", and that pair was exchanged in turn. {grant}"
    elif successor == "ended":
        text += f", and that pair is over. {grant}"
    else:
        text += f". {grant}"
    return replace(about, text=text, advice=advice, successor=successor)


def _successor(session: Session, secret: str, row: Row[Any], now: int) -> str | None:
    if row.replay is None:  # the server never returns a pair twice, or the pair was wiped because nothing needs it
        return None
    _, refresh_token = unseal(secret, row.replay)
    after = _first(session, select(tokens).where(tokens.c.token_hash == hash_secret(refresh_token), _is_presented))
    if after is None or after.revoked_at is not None or after.expires_at <= now:
        return "ended"
    if after.consumed_at is not None:
        return "rotated"
    return "unused" if after.first_used_at is None else "used"


_PURPOSES = {
    "session": "It signs {} in on the page of connected apps",
    "browser": "It keeps {} signed in on a browser",
    "enrollment": "It adds a passkey of {} on a device, once",
    "passkey": "It is the id of a passkey of {}, which only its device can use",
}


def _of_no_grant(row: Row[Any], now: int) -> Explanation:
    live, expires_at = row.expires_at > now, None if row.kind == PASSKEY else row.expires_at
    purpose = _PURPOSES.get(row.kind, "It is what a passkey signs, or an identity provider sends back").format(
        one_line(row.subject or "")
    )
    until = f", and {'is valid until' if live else 'expired at'} {with_age(row.expires_at, now)}"
    return Explanation(
        kind=row.kind,
        state="live" if live else "expired",
        text=f"{purpose}{until if expires_at else ''}.",
        advice=NOTHING,
        subject=row.subject,
        created_at=row.created_at,
        expires_at=expires_at,
    )


def _code(session: Session, kind: str, row: Row[Any], now: int) -> Explanation:
    about = _about(session, kind, row, now)
    of_grant = select(func.max(tokens.c.revoked_at), func.max(tokens.c.revoked_reason), func.count()).where(
        tokens.c.grant_id == row.grant_id, tokens.c.kind.in_((ACCESS, REFRESH))
    )
    revoked_at, reason, issued = session.execute(of_grant).one()
    approved = f"It was approved at {with_age(row.approved_at, now)}" if row.approved_at is not None else ""
    if row.consumed_at is not None:
        at = with_age(row.consumed_at, now)
        if not approved:
            return replace(about, state="denied", text=f"It was denied at {at}.", advice=NOTHING)
        if revoked_at is not None:
            return _ended(about, revoked_at, reason, now)
        if not issued and not about.grant_live:
            text = (
                f"{approved}, and its grant was ended at {at} before the client got its tokens, or all of them expired."
            )
            return replace(about, state="revoked", text=text, advice=AGAIN)
        lives = "is live" if about.grant_live else "is over"
        text = f"{approved}, and exchanged for tokens at {at}. The grant {lives}."
        advice = "A code can be exchanged only once." if about.grant_live else AGAIN
        return replace(about, state="used", text=text, advice=advice)
    if row.client_metadata is None and approved:
        return _client_gone(about)
    if row.expires_at <= now:
        missed = "its client did not exchange the code in time" if approved else "the owner did not decide in time"
        text = f"It expired at {with_age(row.expires_at, now)}: {missed}."
        return replace(about, state="expired", text=text, advice=AGAIN)
    waits = f"{approved}, and waits for its client" if approved else "It waits for the owner"
    return replace(about, state="waiting", text=f"{waits} until {with_age(row.expires_at, now)}.", advice=NOTHING)


def _client_secret(row: Row[Any], now: int) -> Explanation:
    name, hosts = described(row.client_metadata)
    expires_at: int | None = json.loads(row.client_metadata).get("client_secret_expires_at") or None
    over = f"It expired at {with_age(expires_at, now)}." if expires_at is not None and expires_at <= now else ""
    return Explanation(
        kind="client secret",
        state="expired" if over else "live",
        text=over or "It is the secret of its client.",
        advice="Have the client register again." if over else NOTHING,
        client_id=row.client_id,
        client_name=name,
        hosts=hosts,
        created_at=row.created_at,
        expires_at=expires_at,
    )


def _unknown(secret: str) -> Explanation:
    prefix, _, rest = secret.partition("_")
    kind = KINDS.get(prefix, "secret") if rest else "secret"
    if secret.count(".") == 2:
        text = "It is a JWT, which this server does not issue: it comes from another authorization server."
    elif kind != "secret" and not re.fullmatch(r"[A-Za-z0-9_-]{43}", rest):
        text = (
            f"This database does not contain it. Our {kind}s have 43 characters after the first _; this one has "
            f"{len(rest)}."
        )
        return Explanation(kind=kind, state="unknown", text=text, advice="Copy all of it, and try again.")
    else:
        text = (
            "This database does not contain it. It expired so long ago that it was deleted, its client was removed "
            "together with its tokens, it belongs to another database or server, or it was not copied exactly."
        )
    advice = "Check that --database is the one that the server uses. If it is, connect its client again."
    return Explanation(kind=kind, state="unknown", text=text, advice=advice)
