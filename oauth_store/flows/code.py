"""Exchange a code for a pair, once (RFC 6749, section 4.1.3; RFC 7636). A second exchange ends its grant."""

import base64
import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from typing import Any

from mcp.server.auth.provider import AuthorizationCode, TokenError
from mcp.shared.auth import OAuthToken
from pydantic import AnyUrl, ValidationError
from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import DEVICE, codes
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret, spend
from oauth_store.flows.clients import admit
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import Pair, check_resource, issue, lookup, names_of, presented, update_one, with_client

CODE_VERIFIER = r"[A-Za-z0-9._~-]{43,128}"
"""RFC 7636, section 4.1."""

_is_known = (
    codes.c.code_hash == bindparam("b_hash"),
    codes.c.redirect_uri != DEVICE,
    codes.c.approved_at.is_not(None),
    codes.c.expires_at > bindparam("b_now"),
)
_code_by_hash = select(codes).where(*_is_known)
_client_and_code = with_client(codes, *_is_known)
_consume = update(codes).where(*_is_known, codes.c.consumed_at.is_(None)).values(consumed_at=bindparam("b_now"))


@dataclass(frozen=True, slots=True, repr=False)
class PresentedCode:
    """A client's request to exchange a code."""

    client_id: str
    code: str
    secret: Secret = None
    code_verifier: str = ""
    redirect_uri: str = ""
    resource: str | None = None
    checked: bool = False
    """Whether the SDK's handler has checked the client, its redirect URI and its verifier."""


async def load(issuer: Issuer, client_id: str, code: str) -> AuthorizationCode | None:
    """Return an approved code of a client until it expires, even if consumed, or None.

    The SDK's handler checks the client and PKCE before the exchange detects the replay of a consumed code.
    """
    row = await issuer.store.read(_load_authorization_code, code, int(time.time()))
    if row is None or row.client_id != client_id:
        return None
    return AuthorizationCode(
        code=code,
        client_id=row.client_id,
        redirect_uri=AnyUrl(row.redirect_uri),
        redirect_uri_provided_explicitly=row.redirect_uri_provided_explicitly,
        code_challenge=row.code_challenge,
        scopes=row.scopes.split(),
        expires_at=row.expires_at,
        resource=row.resource,
        subject=row.subject,
    )


def _load_authorization_code(session: Session, code: str, now: int) -> Row[Any] | None:
    """Return the row of an approved code that has not expired, or None."""
    return lookup(session, _code_by_hash, b_hash=hash_secret(code), b_now=now)


async def exchange(issuer: Issuer, code: PresentedCode) -> OAuthToken:
    """Exchange a code in one step. Raises `TokenError`, or `AuthenticationError` if the client cannot authenticate."""
    try:
        issued = await issuer.store.write(_exchange_authorization_code, issuer, code, int(time.time()))
    except IntegrityError as error:
        raise TokenError("invalid_client", "the client is no longer registered") from error
    if issued is None:
        raise TokenError("invalid_grant", "the authorization code was already used")
    issuer.after_commit()
    return issued


def _exchange_authorization_code(session: Session, issuer: Issuer, code: PresentedCode, now: int) -> OAuthToken | None:
    """Exchange a code, or end its grant and return None if it was consumed."""
    issued = _exchanged(session, issuer, code, now)
    spend(session, code.secret, now)
    return issued


def _exchanged(session: Session, issuer: Issuer, code: PresentedCode, now: int) -> OAuthToken | None:
    client, row = presented(session, _client_and_code, issuer, code.client_id, code.code, now)
    if not code.checked:
        admit(client, code.secret, "authorization_code")
    if client is None:  # otherwise the database would refuse the tokens
        raise TokenError("invalid_client", "the client is no longer registered")
    if row is None:
        raise TokenError("invalid_grant", "the authorization code is unknown or expired")
    if not code.checked:
        _check(issuer, code, row)
    if not issuer.is_ours(row.resource):
        raise TokenError("invalid_grant", "the code is for another resource")
    names = names_of(row)
    if row.consumed_at is not None:
        emit_after_commit(session, "code_replayed", **names)
        revoke_grants(session, [row.grant_id], "code replayed", now)
        return None
    update_one(session, _consume, b_hash=row.code_hash, b_now=now)
    emit_after_commit(session, "tokens_issued", **names)
    pair = Pair.mint(with_refresh_token="refresh_token" in client.grant_types)
    return issue(session, issuer, pair, row, row.scopes.split(), now)


def _check(issuer: Issuer, code: PresentedCode, row: Row[Any]) -> None:
    """Raise `TokenError` unless the client that presents a code is the one that requested it."""
    if row.redirect_uri_provided_explicitly and not _is_uri(code.redirect_uri, row.redirect_uri):
        raise TokenError("invalid_grant", "redirect_uri differs from the one in the authorization request")
    if not re.fullmatch(CODE_VERIFIER, code.code_verifier):
        raise TokenError("invalid_grant", "code_verifier must be 43 to 128 letters, digits and -._~")
    digest = hashlib.sha256(code.code_verifier.encode()).digest()
    challenge = base64.urlsafe_b64encode(digest).rstrip(b"=")  # RFC 7636, section 4.6
    if not hmac.compare_digest(challenge, row.code_challenge.encode()):
        raise TokenError("invalid_grant", "code_verifier does not match the authorization request")
    check_resource(issuer, code.resource, row.resource)


def _is_uri(presented_uri: str, stored: str) -> bool:
    """Compare as URLs: the stored one is normalized, and clients repeat their own spelling."""
    try:
        return AnyUrl(presented_uri) == AnyUrl(stored)
    except ValidationError:
        return False
