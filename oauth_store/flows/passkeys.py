"""Passkeys, and the links that add one: rows of `oauth_tokens`, each with its own kind.

A passkey's row has its public key, which signs in nobody. A link is a hash, and the step that uses it deletes it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint, mint_grant_id
from oauth_store.database.models import ENROLLMENT, PASSKEY, tokens
from oauth_store.display import USER_LENGTH, is_user_name, nfc, one_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit_after_commit
from oauth_store.flows.challenges import RefusedError, must_change, use_up
from oauth_store.flows.personal import NAME_LENGTH, NO_EXPIRY
from oauth_store.webauthn import Created, user_handle

if TYPE_CHECKING:  # imports the SDK, which takes a second, and the commands do not need it
    from oauth_store.flows.issuer import Issuer

LINK_SECONDS = 10 * 60
"""How long a link that adds a passkey is valid."""

_is_passkey = (tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == PASSKEY)
_passkeys = select(tokens).where(tokens.c.kind == PASSKEY, tokens.c.expires_at == NO_EXPIRY)  # which has an index
_passkey_by_hash = select(tokens).where(*_is_passkey)
_remove = delete(tokens).where(*_is_passkey)
_count = (
    update(tokens)
    .where(*_is_passkey, tokens.c.granted_at <= bindparam("b_before"))
    .values(granted_at=bindparam("b_count"), first_used_at=bindparam("b_now"))
)
_is_link = (
    tokens.c.token_hash == bindparam("b_hash"),
    tokens.c.kind == ENROLLMENT,
    tokens.c.expires_at > bindparam("b_now"),
)
_link_by_hash = select(tokens).where(*_is_link)
_use_link = delete(tokens).where(*_is_link)


@dataclass(frozen=True, slots=True)
class Passkey:
    """A passkey of a user, on a device or in a password manager."""

    id: bytes
    key_hash: bytes
    """Of its credential id."""
    credential_id: str
    public_key: bytes
    name: str
    user: str
    url: str
    """The `base_url` at which it was added: it works at that host alone."""
    resource: str | None
    transports: tuple[str, ...]
    created_at: int
    last_used_at: int | None

    @property
    def user_handle(self) -> str:
        """The name of its user, as the passkey itself knows it."""
        return user_handle(self.url, self.user)


@dataclass(frozen=True, slots=True, repr=False)
class Link:
    """A link that adds one passkey. Its secret is not stored: it is shown once."""

    secret: str
    user: str
    name: str
    url: str
    expires_at: int


async def use(issuer: "Issuer", passkey: Passkey, challenge: str, purpose: str, count: int) -> None:
    """Use up a challenge that a passkey has signed, once, and store how many signatures it has made.

    Raises `RefusedError`, and changes nothing, if the challenge is unknown, used, expired or for another purpose, if
    the passkey was removed, or if its count did not grow (WebAuthn, section 6.1.1): it may have been copied.
    """
    await issuer.store.write(_use, passkey.key_hash, challenge, purpose, count, int(time.time()))


def _use(session: Session, key_hash: bytes, challenge: str, purpose: str, count: int, now: int) -> None:
    use_up(session, challenge, purpose, now)
    counted = {"b_hash": key_hash, "b_before": max(count - 1, 0), "b_count": count, "b_now": now}
    must_change(session, _count, "the passkey's count went back", **counted)


# Passkeys


async def find(issuer: "Issuer", credential_id: str) -> Passkey | None:
    """Return the passkey of this server with this credential id, or None."""
    row = await issuer.store.read(_find, credential_id)
    return _passkey(row) if row is not None and issuer.is_ours(row.resource) else None


def _find(session: Session, credential_id: str) -> Row[Any] | None:
    return session.execute(_passkey_by_hash, {"b_hash": hash_secret(credential_id)}).one_or_none()


async def of_server(issuer: "Issuer") -> list[Passkey]:
    """Return the passkeys of this server."""
    return [passkey for passkey in await issuer.store.read(passkeys) if issuer.is_ours(passkey.resource)]


def passkeys(session: Session) -> list[Passkey]:
    """Return the passkeys of all servers on the database, the oldest first."""
    found = [_passkey(row) for row in session.execute(_passkeys)]
    return sorted(found, key=lambda passkey: (passkey.created_at, passkey.id))


def remove(session: Session, passkey: Passkey, *, by: str) -> bool:
    """Delete a passkey, and return whether it still existed. Its sessions end with it."""
    if not session.execute(_remove, {"b_hash": passkey.key_hash}).rowcount:  # type: ignore[attr-defined]
        return False
    emit_after_commit(session, "passkey_removed", subject=passkey.user, passkey=passkey.name, by=by)
    return True


def _passkey(row: Row[Any]) -> Passkey:
    details = json.loads(row.scopes)
    return Passkey(
        id=row.grant_id,
        key_hash=row.token_hash,
        credential_id=details["id"],
        public_key=row.replay,
        name=details["name"],
        user=row.subject,
        url=details["url"],
        resource=row.resource,
        transports=tuple(details["transports"]),
        created_at=row.created_at,
        last_used_at=row.first_used_at,
    )


# Links


def create_link(session: Session, user: str, name: str, url: str) -> Link:
    """Store a link that adds one passkey of a user to the server with this `base_url`. Raises `OAuthStoreError`."""
    name, user, now = one_line(name).strip(), nfc(user[: USER_LENGTH + 1]), int(time.time())
    if not name or len(name) > NAME_LENGTH:
        raise OAuthStoreError(f"the passkey's name is empty or longer than {NAME_LENGTH} characters; choose another")
    if not is_user_name(user) or len(user) > USER_LENGTH:
        raise OAuthStoreError(f"the user is {user[:40]!r}; expected printable text, without spaces around it")
    link = Link(mint("enrollment"), user, name, url, now + LINK_SECONDS)
    row = {
        "token_hash": hash_secret(link.secret),
        "kind": ENROLLMENT,
        "grant_id": mint_grant_id(),
        "subject": user,
        "scopes": json.dumps({"name": name}),
        "resource": url,
        "created_at": now,
        "expires_at": link.expires_at,
    }
    session.execute(insert(tokens), row)
    return link


async def open_link(issuer: "Issuer", secret: str) -> Link | None:
    """Return a link that was not used yet and has not expired, or None."""
    row = await issuer.store.read(_open_link, secret, int(time.time()))
    if row is None:
        return None
    return Link(secret, row.subject, json.loads(row.scopes)["name"], row.resource, row.expires_at)


def _open_link(session: Session, secret: str, now: int) -> Row[Any] | None:
    return session.execute(_link_by_hash, {"b_hash": hash_secret(secret), "b_now": now}).one_or_none()


async def enroll(issuer: "Issuer", link: Link, created: Created, purpose: str) -> None:
    """Use up a link and its challenge, once, and store the passkey. Raises `RefusedError`, and then changes nothing."""
    try:
        await issuer.store.write(_enroll, link, created, purpose, issuer.resource, int(time.time()))
    except IntegrityError as error:
        raise RefusedError("this passkey is known") from error


def _enroll(session: Session, link: Link, created: Created, purpose: str, resource: str | None, now: int) -> None:
    use_up(session, created.challenge, purpose, now)
    must_change(session, _use_link, "the link is over", b_hash=hash_secret(link.secret), b_now=now)
    details = {
        "id": created.credential_id,
        "name": link.name,
        "url": link.url,
        "transports": created.transports,
    }
    row = {
        "token_hash": hash_secret(created.credential_id),
        "kind": PASSKEY,
        "grant_id": mint_grant_id(),
        "subject": link.user,
        "scopes": json.dumps(details),
        "resource": resource,
        "created_at": now,
        "expires_at": NO_EXPIRY,
        "replay": created.public_key,
        "granted_at": created.count,
    }
    session.execute(insert(tokens), row)
    emit_after_commit(session, "passkey_added", subject=link.user, passkey=link.name)


def named(listed: Sequence[Passkey], name_or_id: str, user: str | None) -> list[Passkey]:
    """Return those of some passkeys that have this name, or whose id begins with these hex digits, six or more."""
    of_user = [passkey for passkey in listed if user in (None, passkey.user)]
    found = [passkey for passkey in of_user if passkey.name == one_line(name_or_id).strip()]
    by_id = [passkey for passkey in of_user if passkey.id.hex().startswith(name_or_id.lower())]
    return found or (by_id if len(name_or_id) >= 6 else [])
