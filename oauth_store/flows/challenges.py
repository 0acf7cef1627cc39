"""Challenges: what a passkey signs, and the `state` of a sign-in at an identity provider (RFC 6749, section 10.12).

Each is a row of `oauth_tokens` for one purpose. The transaction that uses it deletes it: of any number of requests, in
any number of processes, one wins.
"""

import json
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Update, bindparam, delete, insert
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint, mint_grant_id
from oauth_store.database.models import CHALLENGE, tokens

if TYPE_CHECKING:  # imports the SDK, which takes a second, and the commands do not need it
    from oauth_store.flows.issuer import Issuer

_use = delete(tokens).where(
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == CHALLENGE,
    tokens.c.paired_hash == bindparam("b_about"),
    tokens.c.expires_at > bindparam("b_now"),
)


class RefusedError(Exception):
    """A challenge, or what it is for, cannot be used; the message is the reason, for the log."""


def about(*parts: str) -> str:
    """Return a text for what a challenge is bound to, another one for any other parts."""
    return json.dumps(parts)


async def ask(issuer: "Issuer", purpose: str, lifetime_seconds: int) -> str:
    """Store a new challenge for one purpose (see `about`), and return it: 32 random bytes in base64url."""
    challenge = mint("challenge").removeprefix("challenge_")
    await issuer.store.write(_store, challenge, purpose, issuer.resource, int(time.time()), lifetime_seconds)
    issuer.after_commit()
    return challenge


def _store(
    session: Session, challenge: str, purpose: str, resource: str | None, now: int, lifetime_seconds: int
) -> None:
    row = {
        "token_hash": hash_secret(challenge),
        "kind": CHALLENGE,
        "paired_hash": hash_secret(purpose),
        "grant_id": mint_grant_id(),
        "scopes": "",
        "resource": resource,
        "created_at": now,
        "expires_at": now + lifetime_seconds,
    }
    session.execute(insert(tokens), row)


async def use(issuer: "Issuer", challenge: str, purpose: str) -> None:
    """Use up a challenge, in a step of its own.

    Raises `RefusedError`, and changes nothing, if it is unknown, used, expired or for another purpose.
    """
    await issuer.store.write(use_up, challenge, purpose, int(time.time()))


def use_up(session: Session, challenge: str, purpose: str, now: int) -> None:
    """Use up a challenge in the step of what it is for. Raises `RefusedError`, as `use`."""
    must_change(session, _use, "wrong", b_hash=hash_secret(challenge), b_about=hash_secret(purpose), b_now=now)


def must_change(session: Session, statement: Update | Delete, reason: str, **values: Any) -> None:
    """Execute a statement that changes one row. Raises `RefusedError` if there is none."""
    if not session.execute(statement, values).rowcount:  # type: ignore[attr-defined]  # a CursorResult
        raise RefusedError(reason)
