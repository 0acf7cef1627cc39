"""A browser's sessions: rows of `oauth_tokens`, for one page or for a browser that stays signed in."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id
from oauth_store.database.models import BROWSER, PASSKEY, SESSION, tokens
from oauth_store.events import emit_after_commit

if TYPE_CHECKING:  # imports the SDK, which takes a second, and the commands do not need it
    from oauth_store.flows.issuer import Issuer

SESSION_SECONDS = 15 * 60
REQUEST_SECONDS = 10 * 60
"""How long a user stays signed in for one request, after the sign-in at an identity provider."""
BROWSER_SECONDS = 30 * 24 * 3600

_key = tokens.alias("passkey")
_live = (
    tokens.c.expires_at > bindparam("b_now"),
    tokens.c.paired_hash.is_(None) | _key.c.token_hash.is_not(None),
)
_sessions = (
    select(tokens)
    .select_from(tokens.outerjoin(_key, (_key.c.token_hash == tokens.c.paired_hash) & (_key.c.kind == PASSKEY)))
    .where(*_live, tokens.c.kind == bindparam("b_kind"))
)
_session_by_hash = _sessions.where(tokens.c.token_hash == bindparam("b_hash"))
_delete = delete(tokens).where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind.in_([SESSION, BROWSER]))
_of_user = select(tokens).where(tokens.c.subject == bindparam("b_user"), tokens.c.kind.in_([SESSION, BROWSER]))
_use = (
    update(tokens)
    .where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == BROWSER)
    .values(first_used_at=bindparam("b_now"))
)


@dataclass(frozen=True, slots=True)
class Browser:
    """A browser that stays signed in."""

    id: bytes
    session_hash: bytes
    user: str
    way: str
    """How the user signed in: with a `passkey` or an `account`."""
    resource: str | None
    created_at: int
    last_used_at: int | None
    expires_at: int


@dataclass(frozen=True, slots=True)
class Began:
    """Who began a session, and how."""

    user: str
    way: str
    """How they signed in; after a space, what let in the user of an account."""
    key_hash: bytes | None
    """Of the passkey, if it was one."""
    resource: str | None


def begin(session: Session, secret: str, began: Began, kind: str, lifetime_seconds: int, now: int) -> None:
    """Store a session, or a browser that stays signed in."""
    row = {
        "token_hash": hash_secret(secret),
        "kind": kind,
        "paired_hash": began.key_hash,
        "grant_id": mint_grant_id(),
        "subject": began.user,
        "resource": began.resource,
        "scopes": began.way,
        "created_at": now,
        "expires_at": now + lifetime_seconds,
    }
    session.execute(insert(tokens), row)
    if kind == BROWSER:
        emit_after_commit(session, "browser_stays", subject=began.user, way=began.way.partition(" ")[0])


async def find(issuer: "Issuer", secret: str, kind: str) -> Row[Any] | None:
    """Return the row of a session of this server whose passkey exists, or None."""
    row = await issuer.store.read(_session, secret, kind, int(time.time()))
    return row if row is not None and issuer.is_ours(row.resource) else None


def _session(session: Session, secret: str, kind: str, now: int) -> Row[Any] | None:
    values = {"b_hash": hash_secret(secret), "b_kind": kind, "b_now": now}
    return session.execute(_session_by_hash, values).one_or_none()


def use(session: Session, secret: str, now: int) -> None:
    """Note that a browser that stays signed in was used."""
    session.execute(_use, {"b_hash": hash_secret(secret), "b_now": now})


def end(session: Session, secret: str) -> None:
    """Delete a session."""
    session.execute(_delete, {"b_hash": hash_secret(secret)})


def browsers(session: Session, now: int) -> list[Browser]:
    """Return the browsers that stay signed in, of all servers on the database, the oldest first."""
    rows = session.execute(_sessions, {"b_kind": BROWSER, "b_now": now})
    found = [
        Browser(
            id=row.grant_id,
            session_hash=row.token_hash,
            user=row.subject,
            way=row.scopes.partition(" ")[0],
            resource=row.resource,
            created_at=row.created_at,
            last_used_at=row.first_used_at,
            expires_at=row.expires_at,
        )
        for row in rows
    ]
    return sorted(found, key=lambda browser: (browser.created_at, browser.id))


def sign_out_everywhere(session: Session, issuer: "Issuer", user: str, *, by: str) -> None:
    """End all sessions of a user at this server: of browsers that stay signed in, and of pages."""
    for row in session.execute(_of_user, {"b_user": user}).all():
        if row.subject == user and issuer.is_ours(row.resource):  # MariaDB pads: 'abc ' equals 'abc'
            session.execute(_delete, {"b_hash": row.token_hash})
    emit_after_commit(session, "browser_signed_out", subject=user, by=by)


def sign_out(session: Session, listed: Collection[Browser], *, by: str) -> int:
    """End the sessions of browsers that stay signed in, and return how many there still were."""
    ended = 0
    for browser in listed:
        if session.execute(_delete, {"b_hash": browser.session_hash}).rowcount:  # type: ignore[attr-defined]
            emit_after_commit(session, "browser_signed_out", subject=browser.user, by=by)
            ended += 1
    return ended
