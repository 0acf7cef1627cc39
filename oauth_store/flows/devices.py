"""Sign in a device without a browser: the owner types its code elsewhere (RFC 8628).

A device's request is a row of `oauth_codes`. Its handle is made of the user code, which the owner types, so typing it
finds the row; `code_hash` is the hash of the device code, which only the device knows. Approvals treat the request as
any other: the browser in which the code was typed last is the one that may answer. Once the device has its tokens,
`state` has them too, sealed under the device code.
"""

import time
from dataclasses import dataclass
from typing import Any

from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import TokenError
from mcp.shared.auth import InvalidScopeError, OAuthClientInformationFull, OAuthToken
from sqlalchemy import Row, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import device_handle, hash_secret, matches, mint, mint_grant_id, mint_user_code
from oauth_store.database.models import ACCESS, DEVICE, codes, is_live, tokens
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret, spend
from oauth_store.flows.authorization import REQUEST_EXPIRY_SECONDS
from oauth_store.flows.clients import admit, as_stored, get_client
from oauth_store.flows.connected import DEVICE_CODE, revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import (
    Pair,
    answer,
    check_resource,
    in_grace,
    issue,
    lookup,
    names_of,
    presented,
    target_of,
    update_one,
    with_client,
)
from oauth_store.sealing import seal, unseal

INTERVAL_SECONDS = 5
"""How long a device waits between two requests for its tokens."""
TRIES = 3
"""How many user codes are made if another request has one: there are 25.6 billion."""
NO_TOKEN = "-"  # noqa: S105 (none)
"""In the place of a refresh token that a client does not get."""
ACCESS_DENIED: Any = "access_denied"
EXPIRED_TOKEN: Any = "expired_token"  # noqa: S105 (a code)
"""Error codes of RFC 8628, section 3.5, which the SDK does not know."""

_is_device_code = (codes.c.code_hash == bindparam("b_hash"), codes.c.redirect_uri == DEVICE)
_client_and_request = with_client(codes, *_is_device_code)
_consume = (
    update(codes)
    .where(*_is_device_code, codes.c.approved_at.is_not(None), codes.c.consumed_at.is_(None))
    .values(consumed_at=bindparam("b_now"), state=bindparam("b_sealed"))
)
_live_token = select(tokens).where(
    tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == ACCESS, is_live(bindparam("b_now"))
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
    secret: Secret = None
    resource: str | None = None


class PendingError(Exception):
    """The owner has not answered a device's request yet."""


async def start(
    issuer: Issuer, client: OAuthClientInformationFull | None, secret: Secret, scope: str, resource: str | None
) -> StartedDevice:
    """Store a device's request (RFC 8628, section 3.1). Raises `TokenError`, or `AuthenticationError`."""
    if client is None:
        raise AuthenticationError("client_id is not registered")
    resource = target_of(issuer, resource)
    try:
        scopes = " ".join(as_stored(client, issuer.scopes).validate_scope(scope) or ())
    except InvalidScopeError as error:
        raise TokenError("invalid_scope", error.message) from error
    for tries_left in range(TRIES - 1, -1, -1):
        started = StartedDevice(mint("device"), mint_user_code())
        try:
            await issuer.store.write(
                _store, issuer, started, client.client_id, secret, scopes, resource, int(time.time())
            )
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
    secret: Secret,
    scopes: str,
    resource: str | None,
    now: int,
) -> None:
    admit(get_client(session, issuer.scopes, client_id), secret, DEVICE_CODE)
    grant_id = mint_grant_id()
    row = {
        "handle_hash": hash_secret(device_handle(started.user_code)),
        "code_hash": hash_secret(started.device_code),
        "client_id": client_id,
        "grant_id": grant_id,
        "redirect_uri": DEVICE,
        "redirect_uri_provided_explicitly": False,
        "code_challenge": "",
        "scopes": scopes,
        "resource": resource,
        "created_at": now,
        "expires_at": now + REQUEST_EXPIRY_SECONDS,
    }
    session.execute(insert(codes), row)
    spend(session, secret, now)
    emit_after_commit(session, "approval_asked", grant_id=grant_id, client_id=client_id)


async def open_request(issuer: Issuer, user_code: str, browser: str | None) -> OpenedRequest | None:
    """Bind the request with this user code to a browser, and return it; None if no request waits for an answer.

    `browser` is the secret of a browser in which the code was typed before, or None.
    """
    handle, now = device_handle(user_code), int(time.time())
    return await issuer.store.write(_open, issuer, handle, browser, mint("browser"), now)


def _open(
    session: Session, issuer: Issuer, handle: str, browser: str | None, new_browser: str, now: int
) -> OpenedRequest | None:
    """Bind a request to the browser in which its code was typed. Of two browsers, the last one may answer."""
    row = lookup(session, _waiting, b_hash=hash_secret(handle), b_now=now)
    if row is None or not issuer.is_ours(row.resource):
        return None
    if browser is not None and row.browser_hash is not None and matches(browser, row.browser_hash):
        return OpenedRequest(handle, browser, row)
    update_one(session, _bind_browser, b_hash=row.handle_hash, b_now=now, b_browser=hash_secret(new_browser))
    return OpenedRequest(handle, new_browser, row)


async def exchange(issuer: Issuer, device: PresentedDeviceCode) -> OAuthToken:
    """Exchange the device code of an approved request (RFC 8628, section 3.5). It gets one pair: see `_again`.

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
    """Exchange a device code, or return None if it was used."""
    issued = _exchanged(session, issuer, device, now)
    spend(session, device.secret, now)
    return issued


def _exchanged(session: Session, issuer: Issuer, device: PresentedDeviceCode, now: int) -> OAuthToken | None:
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
    if row.consumed_at is not None:
        return _again(session, issuer, device, row, now)
    pair = Pair.mint(with_refresh_token="refresh_token" in client.grant_types)
    sealed = seal(device.device_code, pair.access_token, pair.refresh_token or NO_TOKEN).hex()
    update_one(session, _consume, b_hash=row.code_hash, b_now=now, b_sealed=sealed)
    emit_after_commit(session, "tokens_issued", **names_of(row))
    return issue(session, issuer, pair, row, row.scopes.split(), now)


def _again(session: Session, issuer: Issuer, device: PresentedDeviceCode, row: Row[Any], now: int) -> OAuthToken | None:
    """Return the response to a consumed device code, or None.

    Within the grace it is the same pair: the first response may have been lost, and then devices ask again (RFC 8628,
    section 3.5). Later it is a replay, which ends the grant.
    """
    if row.state is None:
        raise TokenError(ACCESS_DENIED, "the owner revoked the request")
    if not in_grace(issuer, row.consumed_at, now):
        emit_after_commit(session, "code_replayed", **names_of(row))
        revoke_grants(session, [row.grant_id], "code replayed", now)
        return None
    access_token, refresh_token = unseal(device.device_code, bytes.fromhex(row.state))
    token = lookup(session, _live_token, b_hash=hash_secret(access_token), b_now=now)
    if token is None:
        return None
    pair = Pair(access_token, None if refresh_token == NO_TOKEN else refresh_token)
    return answer(pair, token.expires_at - now, token.scopes)
