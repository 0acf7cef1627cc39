"""Authorization requests: stored, looked up, approved or denied (RFC 6749, section 4.1)."""

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fastmcp.server.auth.redirect_validation import build_client_redirect
from mcp.server.auth.provider import AuthorizationParams, AuthorizeError
from mcp.shared.auth import InvalidScopeError
from sqlalchemy import Row, Select, bindparam, insert, null, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, matches, mint, mint_grant_id
from oauth_store.database.models import DEVICE, NEVER, clients, codes
from oauth_store.events import emit_after_commit
from oauth_store.flows.clients import DESCRIPTION_LENGTH, OFFLINE_ACCESS, Standing, StoredClient, is_limited, owners
from oauth_store.flows.issuer import Issuer, UnknownResourceError
from oauth_store.flows.registration import replace_metadata
from oauth_store.flows.tokens import lookup, update_one

REQUEST_EXPIRY_SECONDS = 600
"""How long the owner has to approve a request."""
STATE_LENGTH = 8 * 1024
CODE_CHALLENGE = r"[A-Za-z0-9_-]{43}"
"""RFC 7636, section 4.2."""

_insert_request = insert(codes)
_is_pending = (
    codes.c.handle_hash == bindparam("b_hash"),
    codes.c.consumed_at.is_(None),
    codes.c.expires_at > bindparam("b_now"),
)
_request_by_handle: Select[Any] = (
    select(*codes.c, clients.c.client_id.label("registered_id"), clients.c.client_metadata, clients.c.last_used_at)
    .select_from(codes.outerjoin(clients, clients.c.client_id == codes.c.client_id))
    .where(*_is_pending)
)
_give_code = (
    update(codes)
    .where(*_is_pending)
    .values(
        code_hash=bindparam("b_code_hash"),
        subject=bindparam("b_subject"),
        scopes=bindparam("b_scopes"),
        approved_at=bindparam("b_now"),
        expires_at=bindparam("b_expires_at"),
    )
)
_end_request = update(codes).where(*_is_pending).values(approved_at=null(), consumed_at=bindparam("b_now"))
_stamp_client = (
    update(clients).where(clients.c.client_id == bindparam("b_client_id")).values(last_used_at=bindparam("b_now"))
)


@dataclass(frozen=True, slots=True, repr=False)
class Started:
    """A stored request, with the secrets that name it and the browser that started it."""

    handle: str
    browser: str
    redirect_uri: str
    scopes: str
    resource: str | None
    expires_at: int


async def start(issuer: Issuer, client: StoredClient, params: AuthorizationParams) -> Started:
    """Store a request. Raises `AuthorizeError`."""
    try:
        resource = issuer.target(params.resource)
    except UnknownResourceError as error:
        raise AuthorizeError("invalid_target", str(error)) from error
    if len(params.state or "") > STATE_LENGTH or "\0" in (params.state or ""):
        raise AuthorizeError("invalid_request", f"state is longer than {STATE_LENGTH} characters, or contains a NUL")
    if not re.fullmatch(CODE_CHALLENGE, params.code_challenge):
        raise AuthorizeError("invalid_request", "code_challenge must be for S256: 43 characters of base64url")
    try:
        scopes = " ".join(client.validate_scope(" ".join(params.scopes or ())) or ())
    except InvalidScopeError as error:
        raise AuthorizeError("invalid_scope", error.message) from error
    now = int(time.time())
    started = Started(
        handle=mint("request"),
        browser=mint("browser"),
        redirect_uri=str(params.redirect_uri),
        scopes=scopes,
        resource=resource,
        expires_at=now + REQUEST_EXPIRY_SECONDS,
    )
    await issuer.store.write(_store_request, started, client.client_id, params, now)
    issuer.after_commit()
    return started


def _store_request(session: Session, started: Started, client_id: str, params: AuthorizationParams, now: int) -> None:
    grant_id = mint_grant_id()
    row = {
        "handle_hash": hash_secret(started.handle),
        "browser_hash": hash_secret(started.browser),
        "client_id": client_id,
        "grant_id": grant_id,
        "redirect_uri": started.redirect_uri,
        "redirect_uri_provided_explicitly": params.redirect_uri_provided_explicitly,
        "code_challenge": params.code_challenge,
        "scopes": started.scopes,
        "resource": started.resource,
        "state": params.state,
        "created_at": now,
        "expires_at": started.expires_at,
    }
    session.execute(_insert_request, row)
    emit_after_commit(session, "approval_asked", grant_id=grant_id, client_id=client_id)


async def pending(issuer: Issuer, handle: str, browser: str | None) -> Row[Any] | None:
    """Return the row of a request to this server that can still be approved or denied, or None.

    Also None if `browser` is not the secret of the browser that started it.
    """
    row = await issuer.store.read(_pending, issuer, handle, int(time.time()))
    if row is None or row.browser_hash is None or browser is None or not matches(browser, row.browser_hash):
        return None
    return row


def _pending(session: Session, issuer: Issuer, handle: str, now: int) -> Row[Any] | None:
    """Return the row of such a request, whatever its browser. `registered_id` is null if its client is gone."""
    row = lookup(session, _request_by_handle, b_hash=hash_secret(handle), b_now=now)
    if row is None or not issuer.is_ours(row.resource) or (row.redirect_uri == DEVICE and issuer.device_url is None):
        return None
    return row


async def approve(issuer: Issuer, handle: str, subject: str | None, scopes: Collection[str] | None) -> str:
    """Give a request its code, for these scopes, and return the URL that takes it to the client.

    From now on, its client counts as used. Raises `AuthorizeError`.
    """
    code = mint("code")
    row = await issuer.store.write(_approve, issuer, handle, code, subject, scopes, int(time.time()))
    return _redirect(issuer, row, code=code)


def _approve(
    session: Session,
    issuer: Issuer,
    handle: str,
    code: str,
    subject: str | None,
    scopes: Collection[str] | None,
    now: int,
) -> Row[Any]:
    row = _waiting(session, issuer, handle, now)
    if row.registered_id is None:
        raise AuthorizeError("unauthorized_client", "the client is not registered")
    device = row.redirect_uri == DEVICE  # it asks for its tokens every few seconds
    values: dict[str, Any] = {"b_subject": subject, "b_code_hash": row.code_hash if device else hash_secret(code)}
    values["b_expires_at"] = now + (REQUEST_EXPIRY_SECONDS if device else issuer.code_expiry_seconds)
    values["b_scopes"] = row.scopes if scopes is None else " ".join(_granted(issuer, row, scopes))
    update_one(session, _give_code, b_hash=row.handle_hash, b_now=now, **values)
    if row.last_used_at == NEVER:  # added by the owner before registrations recorded that
        replace_metadata(session, row.client_id, owners(row.client_metadata))
    update_one(session, _stamp_client, b_client_id=row.client_id, b_now=now)
    emit_after_commit(session, "approval_granted", grant_id=row.grant_id, client_id=row.client_id, subject=subject)
    return row


async def deny(issuer: Issuer, handle: str) -> str:
    """End a request, and return the URL that reports this to its client. Raises `AuthorizeError`."""
    row = await issuer.store.write(_deny, issuer, handle, int(time.time()))
    return _redirect(issuer, row, error="access_denied", error_description="the owner denied the request")


def _granted(issuer: Issuer, row: Row[Any], scopes: Collection[str]) -> list[str]:
    """Return the scopes to grant of those that the owner chose: they may be more than the client asked for.

    RFC 6749, sections 3.3 and 5.1. The required ones are always among them, and `offline_access` if it was asked for.
    Raises `AuthorizeError` for one that this server does not have.
    """
    client = StoredClient.load(row.client_metadata, Standing(scopes=issuer.scopes, limited=is_limited(row)))
    asked = row.scopes.split()
    unknown = [scope for scope in scopes if scope not in {*asked, *client.offered}]
    if unknown:
        raise AuthorizeError("invalid_scope", f"this server cannot grant {' '.join(unknown)}"[:DESCRIPTION_LENGTH])
    chosen = {*scopes, *issuer.scopes.required, OFFLINE_ACCESS}
    return [scope for scope in dict.fromkeys([*asked, *client.offered]) if scope in chosen]


def _deny(session: Session, issuer: Issuer, handle: str, now: int) -> Row[Any]:
    row = _waiting(session, issuer, handle, now)
    update_one(session, _end_request, b_hash=row.handle_hash, b_now=now)
    emit_after_commit(session, "approval_denied", grant_id=row.grant_id, client_id=row.client_id)
    return row


def _waiting(session: Session, issuer: Issuer, handle: str, now: int) -> Row[Any]:
    row = _pending(session, issuer, handle, now)
    if row is None:
        raise AuthorizeError("invalid_request", "this request is unknown, expired or already answered; start again")
    return row


def _redirect(issuer: Issuer, row: Row[Any], **params: str) -> str:
    if row.redirect_uri == DEVICE:  # it asks for its tokens by itself
        return f"{issuer.device_url}?answer={'denied' if 'error' in params else 'allowed'}"
    if row.state is not None:
        params["state"] = row.state
    return build_client_redirect(row.redirect_uri, params, iss=issuer.url)
