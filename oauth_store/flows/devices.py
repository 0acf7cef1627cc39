"""Sign in a device without a browser: the owner types its code elsewhere (RFC 8628).

A device's request is a row of `oauth_codes`. Its handle is made of the user code, which the owner types, so typing it
finds the row; `code_hash` is the hash of the device code, which only the device knows. Approvals treat the request as
any other: the browser in which the code was typed last is the one that may answer.
"""

import time
from dataclasses import dataclass
from typing import Any

from mcp.server.auth.provider import TokenError
from mcp.shared.auth import InvalidScopeError, OAuthToken
from sqlalchemy import Row, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import device_handle, hash_secret, mint, mint_grant_id, mint_user_code
from oauth_store.database.models import DEVICE, codes
from oauth_store.events import emit_after_commit
from oauth_store.flows.authorization import REQUEST_EXPIRY_SECONDS
from oauth_store.flows.clients import admit, get_client
from oauth_store.flows.connected import DEVICE_CODE, revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import Pair, check_resource, issue, lookup, names_of, presented, update_one, with_client

INTERVAL_SECONDS = 5
"""How long a device waits between two requests for its tokens."""
TRIES = 3
"""How often a user code is made anew if another request has it: one in 25 billion does."""
ACCESS_DENIED: Any = "access_denied"
EXPIRED_TOKEN: Any = "expired_token"  # noqa: S105 (a code)
"""Error codes of RFC 8628, section 3.5, which the SDK does not know."""

_is_device_code = (codes.c.code_hash == bindparam("b_hash"), codes.c.redirect_uri == DEVICE)
_client_and_request = with_client(codes, *_is_device_code)
_consume = (
    update(codes)
    .where(*_is_device_code, codes.c.approved_at.is_not(None), codes.c.consumed_at.is_(None))
    .values(consumed_at=bindparam("b_now"))
)
_is_waiting = (
    codes.c.handle_hash == bindparam("b_hash"),
    codes.c.redirect_uri == DEVICE,
    codes.c.approved_at.is_(None),
    codes.c.consumed_at.is_(None),
    codes.c.expires_at > bindparam("b_now"),
)
_waiting = select(codes).where(*_is_waiting)
_bind_browser = update(codes).where(*_is_waiting).values(browser_hash=bindparam("b_browser"))


@dataclass(frozen=True, slots=True, repr=False)
class StartedDevice:
    """A device's stored request, with its two codes."""

    device_code: str
    user_code: str


@dataclass(frozen=True, slots=True, repr=False)
class OpenedRequest:
    """A device's request, opened in the browser in which its code was typed."""

    handle: str
    browser: str
    row: Row[Any]


@dataclass(frozen=True, slots=True, repr=False)
class PresentedDeviceCode:
    """A device's request for its tokens."""

    client_id: str
    device_code: str
    secret: str | None = None
    resource: str | None = None


class PendingError(Exception):
    """The owner has not answered a device's request yet."""


async def start(issuer: Issuer, client_id: str, secret: str | None, scope: str, resource: str | None) -> StartedDevice:
    """Store a device's request (RFC 8628, section 3.1). Raises `TokenError`, or `AuthenticationError`."""
    for tries_left in reversed(range(TRIES)):
        started = StartedDevice(mint("device"), mint_user_code())
        try:
            await issuer.store.write(_store, issuer, started, client_id, secret, scope, resource, int(time.time()))
        except IntegrityError:  # another request has this user code
            if not tries_left:
                raise
        else:
            break
    issuer.after_commit()
    return started


def _store(
    session: Session,
    issuer: Issuer,
    started: StartedDevice,
    client_id: str,
    secret: str | None,
    scope: str,
    resource: str | None,
    now: int,
) -> None:
    client = admit(get_client(session, issuer.scopes, client_id), secret, DEVICE_CODE)
    check_resource(issuer, resource, None)
    try:
        scopes = client.validate_scope(scope) or ()
    except InvalidScopeError as error:
        raise TokenError("invalid_scope", error.message) from error
    grant_id = mint_grant_id()
    row = {
        "handle_hash": hash_secret(device_handle(started.user_code)),
        "code_hash": hash_secret(started.device_code),
        "client_id": client_id,
        "grant_id": grant_id,
        "redirect_uri": DEVICE,
        "redirect_uri_provided_explicitly": False,
        "code_challenge": "",
        "scopes": " ".join(scopes),
        "resource": issuer.resource or resource,
        "created_at": now,
        "expires_at": now + REQUEST_EXPIRY_SECONDS,
    }
    session.execute(insert(codes), row)
    emit_after_commit(session, "approval_asked", grant_id=grant_id, client_id=client_id)


async def open_request(issuer: Issuer, user_code: str) -> OpenedRequest | None:
    """Bind the request with this user code to a browser, and return it; None if no request waits for an answer."""
    opened = device_handle(user_code), mint("browser")
    row = await issuer.store.write(_open, issuer, *opened, int(time.time()))
    return None if row is None else OpenedRequest(*opened, row)


def _open(session: Session, issuer: Issuer, handle: str, browser: str, now: int) -> Row[Any] | None:
    """Bind a request to the browser in which its code was typed. Of two browsers, the last one may answer."""
    row = lookup(session, _waiting, b_hash=hash_secret(handle), b_now=now)
    if row is None or not issuer.is_ours(row.resource):
        return None
    update_one(session, _bind_browser, b_hash=row.handle_hash, b_now=now, b_browser=hash_secret(browser))
    return row


async def exchange(issuer: Issuer, device: PresentedDeviceCode) -> OAuthToken:
    """Exchange the device code of an approved request, once (RFC 8628, section 3.5). A second exchange ends its grant.

    Raises `PendingError` until the owner has answered, `TokenError`, or `AuthenticationError`.
    """
    try:
        issued = await issuer.store.write(_exchange, issuer, device, int(time.time()))
    except IntegrityError as error:
        raise TokenError("invalid_client", "the client is no longer registered") from error
    if issued is None:
        raise TokenError("invalid_grant", "the device code was already used")
    issuer.after_commit()
    return issued


def _exchange(session: Session, issuer: Issuer, device: PresentedDeviceCode, now: int) -> OAuthToken | None:
    """Exchange a device code, or end its grant and return None if it was consumed."""
    client, row = presented(session, _client_and_request, issuer, device.client_id, device.device_code, now)
    client = admit(client, device.secret, DEVICE_CODE)
    if row is None or not issuer.is_ours(row.resource):
        raise TokenError("invalid_grant", "the device code is unknown, or expired long ago")
    check_resource(issuer, device.resource, row.resource)
    if row.approved_at is None and row.consumed_at is not None:
        raise TokenError(ACCESS_DENIED, "the owner denied the request")
    if row.expires_at <= now:
        raise TokenError(EXPIRED_TOKEN, "the device code has expired; ask for another")
    if row.approved_at is None:
        raise PendingError
    names = names_of(row)
    if row.consumed_at is not None:
        emit_after_commit(session, "code_replayed", **names)
        revoke_grants(session, [row.grant_id], "code replayed", now)
        return None
    update_one(session, _consume, b_hash=row.code_hash, b_now=now)
    emit_after_commit(session, "tokens_issued", **names)
    pair = Pair.mint(with_refresh_token="refresh_token" in client.grant_types)
    return issue(session, issuer, pair, row, row.scopes.split(), now)
