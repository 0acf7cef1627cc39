"""Assertions: signed texts that are good once, in any process (RFC 7523, section 3).

A used one is a row of `oauth_tokens` with its own kind until it expires: the primary key decides.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmcp.server.auth import cimd
from fastmcp.utilities.auth import decode_jwt_header, decode_jwt_payload
from mcp.server.auth.middleware.client_auth import AuthenticationError
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id
from oauth_store.database.models import ASSERTION, tokens
from oauth_store.database.outages import is_duplicate

JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
"""The `client_assertion_type` of a JWT (RFC 7523, section 2.2)."""
ASSERTION_BYTES = 8 * 1024
"""The longest assertion of a client that is read."""
ALGORITHMS = sorted(getattr(cimd, "ASSERTION_ALGORITHMS", {"RS256"}))
"""Those that FastMCP's validator takes: before 4.2, one."""
CLOCK_SKEW_SECONDS = 30
"""How long a used assertion is remembered after its expiry: clocks of several servers may differ."""

_LATEST = 10**12
"""More than any time in seconds."""
_insert = insert(tokens)


class UsedAssertionError(Exception):
    """An assertion was used before."""

    def __init__(self) -> None:
        super().__init__("it was used before")


@dataclass(frozen=True, slots=True, repr=False)
class ClaimedAssertion:
    """A client's assertion, before its signature is checked."""

    text: str
    algorithm: str
    client_id: str
    jti: str
    expires_at: int


@dataclass(frozen=True, slots=True, repr=False)
class VerifiedAssertion:
    """A client's assertion, after its signature was checked. The step that the client authenticates for uses it up."""

    client_id: str
    jti: str
    expires_at: int


Secret = str | VerifiedAssertion | None
"""What a client presents to authenticate."""


def claimed_client(text: str) -> str:
    """Return the client that an assertion names (RFC 7521, section 4.2). Raises `AuthenticationError`."""
    subject = _parts(text)[1].get("sub")
    if not isinstance(subject, str) or not subject.isprintable():
        raise AuthenticationError("client_id is missing, and client_assertion has no sub")
    return subject


def read_assertion(text: str, client_id: str, audiences: Sequence[str], now: float) -> ClaimedAssertion:
    """Return an assertion of a client that claims all it must (RFC 7523, section 3). Raises `AuthenticationError`.

    No key is needed for that: nothing is fetched for any other.
    """
    header, claims = _parts(text)
    if header.get("alg") not in ALGORITHMS:
        raise AuthenticationError(f"client_assertion is not signed with one of {', '.join(ALGORITHMS)}")
    if claims.get("iss") != client_id or claims.get("sub") != client_id:
        raise AuthenticationError("iss and sub of client_assertion are not the client_id")
    if any(claims.get(name) not in (None, client_id) for name in ("client_id", "azp")):  # FastMCP logs them
        raise AuthenticationError("client_assertion names two clients")
    named = claims.get("aud")
    if not any(audience in audiences for audience in (named if isinstance(named, list) else [named])):
        raise AuthenticationError("aud of client_assertion is neither this token endpoint nor this issuer")
    expires_at = claims.get("exp")
    if expires_at is None or not all(_is_time(claims.get(name)) for name in ("exp", "iat", "nbf")):
        raise AuthenticationError("exp of client_assertion is missing, or a time in it is not a number of seconds")
    if expires_at <= now:
        raise AuthenticationError("client_assertion has expired")
    if (claims.get("nbf") or 0) > now + CLOCK_SKEW_SECONDS:  # FastMCP checks that from 4.2 on
        raise AuthenticationError("client_assertion is not valid yet")
    jti = claims.get("jti")
    if not isinstance(jti, str) or not jti:
        raise AuthenticationError("client_assertion has no jti")
    return ClaimedAssertion(text, header["alg"], client_id, jti, int(expires_at))


def _parts(text: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the header and the claims of a JWT, unverified."""
    if len(text) <= ASSERTION_BYTES and re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", text, re.ASCII):
        try:
            header, claims = decode_jwt_header(text), decode_jwt_payload(text)
        except (ValueError, RecursionError):
            header, claims = {}, {}
        if isinstance(header, dict) and isinstance(claims, dict) and header:
            return header, claims
    raise AuthenticationError(f"client_assertion is not a signed JWT of at most {ASSERTION_BYTES} bytes")


def _is_time(value: object) -> bool:
    """Return whether a claim is absent or a time. NaN, which JSON can hold, is smaller than nothing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LATEST)


def spend(session: Session, secret: Secret, now: int) -> None:
    """Use up the assertion by which a client has authenticated, at the end of its step: one that fails uses nothing.

    Raises `AuthenticationError` if it was used before.
    """
    if not isinstance(secret, VerifiedAssertion):
        return
    name = json.dumps([JWT_BEARER, secret.client_id, secret.jti])
    try:
        use_once(session, name, secret.client_id, secret.expires_at, now)
    except UsedAssertionError as error:
        raise AuthenticationError("client_assertion was used before") from error
    except IntegrityError as error:
        raise AuthenticationError("the client is no longer registered") from error


def use_once(session: Session, name: str, client_id: str, expires_at: int, now: int) -> None:
    """Store that a client has used the assertion of this name. Raises `UsedAssertionError`, or `IntegrityError`."""
    row = {
        "token_hash": hash_secret(name),
        "kind": ASSERTION,
        "grant_id": mint_grant_id(),
        "client_id": client_id,
        "scopes": "",
        "created_at": now,
        "expires_at": expires_at + CLOCK_SKEW_SECONDS,
    }
    try:
        session.execute(_insert, row)
    except IntegrityError as error:
        if is_duplicate(error):
            raise UsedAssertionError from error
        raise
