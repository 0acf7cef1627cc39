"""Issue an access token for an identity provider's assertion of a user (SEP-990; RFC 7523, sections 2.1 and 3).

The assertion names the user, the client, this server and the scopes; each token is a grant of its own without a refresh
token. The client asks again with a new assertion, and the identity provider decides how long.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastmcp.server.auth.identity_assertion import (
    IdentityAssertion,
    IdentityAssertionError,
    IdentityAssertionValidator,
)
from fastmcp.utilities.auth import decode_jwt_payload
from mcp.server.auth.provider import IdentityAssertionParams, TokenError
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthClientInformationFull, OAuthToken
from pydantic import PrivateAttr
from sqlalchemy import bindparam, insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id
from oauth_store.database.models import ACCESS, clients, tokens
from oauth_store.display import one_line
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret, UsedAssertionError, has_times, spend, use_once
from oauth_store.flows.clients import OFFLINE_ACCESS, offered_to
from oauth_store.flows.issuer import Issuer, check_seconds
from oauth_store.flows.scopes import is_scope
from oauth_store.flows.tokens import Pair, answer, target_of

IDENTITY_BYTES = 16 * 1024
"""The longest assertion of a user that is read."""
SUBJECT_LENGTH = 255
"""The longest name of a user (OpenID Connect Core, section 2)."""
VALIDATION_SECONDS = 10.0
"""How long a request waits for an identity provider's keys: HTTP clients limit each read, and not their number."""
WAITING_IDENTITIES = 20
"""How many assertions of one identity provider wait for its keys."""

REASON_LENGTH = 200
"""The longest reason in the log: it may repeat claims."""

logger = logging.getLogger("oauth_store")

_insert = insert(tokens)
_keep_client = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"), clients.c.last_used_at.is_(None))
    .values(last_used_at=bindparam("b_now"))
)


class PresentedIdentity(IdentityAssertionParams):
    """A client's request for a user's access token, with what the client has authenticated with."""

    _secret: Secret = PrivateAttr(default=None)
    _steps: list[str] = PrivateAttr(default_factory=list)  # shared by copies, which an application may make

    @classmethod
    def of(cls, assertion: str, scope: str, resource: str | None, secret: Secret) -> "PresentedIdentity":
        """Return a request to /token."""
        own = cls(assertion=assertion, scopes=scope.split() or None, resource=resource)
        own._secret = secret
        return own

    @property
    def secret(self) -> Secret:
        return self._secret

    @property
    def is_spent(self) -> bool:
        """Whether a step has used up the client's assertion. An application's own method runs none of ours."""
        return bool(self._steps)

    def spent(self) -> None:
        """Note that a step has used up the client's assertion, and is committed."""
        self._steps.append("spent")


class Identities:
    """The identity providers that may sign users in, as FastMCP's validator checks their assertions.

    Each has its own thread and validator, so that one that does not answer holds up no other's users.
    """

    def __init__(self, config: IdentityAssertion, issuer: str) -> None:
        """`issuer` is this server's, the audience of assertions unless `config` names another."""
        check_seconds(access_token_expiry_seconds=config.access_token_expiry_seconds)
        self.config = config
        self._audience = issuer
        self._providers: dict[tuple[int, str], _IdentityProvider] = {}
        """By process, since a fork has no thread of its parent's, and by issuer."""

    @classmethod
    def of(cls, config: IdentityAssertion | None, issuer: str) -> "Identities | None":
        """Return those of a setting, or None."""
        return None if config is None else cls(config, issuer)

    async def claims(self, assertion: str, client_id: str, resource: str | None) -> dict[str, Any]:
        """Return the claims of a valid assertion for a client and this server. Raises `IdentityAssertionError`."""
        if len(assertion) > IDENTITY_BYTES:
            raise IdentityAssertionError(f"it is longer than {IDENTITY_BYTES} bytes")
        try:
            unverified: Any = decode_jwt_payload(assertion)
        except (ValueError, RecursionError) as error:
            raise IdentityAssertionError("it is not a JWT") from error
        name = unverified.get("iss") if isinstance(unverified, dict) else None
        if not isinstance(name, str) or name not in self.config.trusted_issuers:
            raise IdentityAssertionError(f"untrusted issuer {name!r}")
        key = os.getpid(), name
        if key not in self._providers:
            self._providers[key] = _IdentityProvider(self.config, self._audience)
        return await self._providers[key].claims(assertion, client_id, resource)


class _IdentityProvider:
    """One identity provider, in one process.

    It has one thread: the validator fetches keys with HTTP clients, which read the system's certificates, and its locks
    belong to one event loop at a time.
    """

    def __init__(self, config: IdentityAssertion, audience: str) -> None:
        self._validator = IdentityAssertionValidator(config, audience)
        self._thread = ThreadPoolExecutor(1, "identities")
        self._waiting = 0

    async def claims(self, assertion: str, client_id: str, resource: str | None) -> dict[str, Any]:
        """Return the claims of a valid assertion. Raises `IdentityAssertionError`."""
        if self._waiting >= WAITING_IDENTITIES:
            raise IdentityAssertionError("too many assertions of its issuer are being checked")
        self._waiting += 1
        try:
            validated = asyncio.get_running_loop().run_in_executor(
                self._thread, self._validate, assertion, client_id, resource
            )
            return await asyncio.wait_for(validated, VALIDATION_SECONDS)  # its turn may not come at all
        except TimeoutError as error:
            raise IdentityAssertionError(f"no answer of its issuer after {VALIDATION_SECONDS:g} s") from error
        finally:
            self._waiting -= 1

    def _validate(self, assertion: str, client_id: str, resource: str | None) -> dict[str, Any]:
        validation = self._validator.validate(assertion, client_id=client_id, resource_url=resource)
        try:
            claims = asyncio.run(asyncio.wait_for(validation, VALIDATION_SECONDS))
        except (IdentityAssertionError, TimeoutError):
            raise
        except Exception as error:  # of FastMCP, for what an identity provider signs or serves
            raise IdentityAssertionError(f"it, or the keys, cannot be read ({type(error).__name__})") from error
        # The database knows which were used: this memory is one process's, and a step that fails must use up nothing
        getattr(self._validator, "_jti_cache", {}).clear()
        return claims


async def exchange(
    issuer: Issuer,
    identities: Identities | None,
    client: OAuthClientInformationFull,
    params: IdentityAssertionParams,
) -> OAuthToken:
    """Issue an access token in one step, for an assertion that was never used before. Raises `TokenError`.

    `client` has authenticated, with a secret or a key of its own.
    """
    if identities is None:
        raise TokenError("unsupported_grant_type", "this server trusts no identity provider")
    resource = target_of(issuer, params.resource)
    try:
        claims = await identities.claims(params.assertion, str(client.client_id), resource)
        asserted = _asserted(issuer, identities.config, client, params, resource, claims)
        issued = await issuer.store.write(_issue_to_user, asserted, params, int(time.time()))
    except (IdentityAssertionError, UsedAssertionError) as error:
        reason = one_line(str(error))[:REASON_LENGTH]
        logger.warning("identity assertion of the client %s refused: %s", one_line(str(client.client_id)), reason)
        raise TokenError("invalid_grant", "the identity assertion is not valid") from error
    except IntegrityError as error:
        raise TokenError("invalid_client", "the client is no longer registered") from error
    if isinstance(params, PresentedIdentity):
        params.spent()
    issuer.after_commit()
    return issued


@dataclass(frozen=True, slots=True, repr=False)
class _Asserted:
    """What a valid assertion gives to whom."""

    name: str
    """Of the assertion: no other one has it."""
    assertion_expires_at: int
    client_id: str
    subject: str
    scopes: Sequence[str]
    resource: str | None
    lifetime_seconds: int


def _asserted(
    issuer: Issuer,
    config: IdentityAssertion,
    client: OAuthClientInformationFull,
    params: IdentityAssertionParams,
    resource: str | None,
    claims: Mapping[str, Any],
) -> _Asserted:
    """Return what the claims of a valid assertion give. Raises `IdentityAssertionError` or `TokenError`."""
    if not has_times(claims):
        raise IdentityAssertionError("a time in it is not a number of seconds")
    subject = claims["sub"]
    if not isinstance(subject, str) or not subject.isprintable() or len(subject) > SUBJECT_LENGTH:
        raise IdentityAssertionError(f"its sub is not a name of at most {SUBJECT_LENGTH} printable characters")
    return _Asserted(
        name=json.dumps([JWT_BEARER_GRANT_TYPE, claims["iss"], claims["jti"]]),
        assertion_expires_at=int(claims["exp"]),
        client_id=str(client.client_id),
        subject=subject,
        scopes=_scopes(issuer, config, client, params.scopes or (), claims),
        resource=resource or str(claims.get("resource") or "") or None,
        lifetime_seconds=config.access_token_expiry_seconds,
    )


def _scopes(
    issuer: Issuer,
    config: IdentityAssertion,
    client: OAuthClientInformationFull,
    requested: Sequence[str],
    claims: Mapping[str, Any],
) -> list[str]:
    """Return the scopes to grant: asserted ones that this server has and the client may have, narrowed by the request.

    The request cannot leave out the required ones. Raises `IdentityAssertionError` if one of these is not asserted, and
    `TokenError` if the assertion or the request names scopes, and none of them can be granted.
    """
    named = claims["scope"] if isinstance(claims.get("scope"), str) else claims.get("scp")
    words = named.split() if isinstance(named, str) else named if isinstance(named, list) else ()
    asserted = dict.fromkeys(word for word in words if isinstance(word, str) and is_scope(word))
    asserted.pop(OFFLINE_ACCESS, None)
    offered = offered_to(client, issuer.scopes) if client.scope or issuer.scopes.valid is not None else asserted
    granted = [scope for scope in asserted if scope in offered]
    required = {*issuer.scopes.required, *(config.required_scopes or ())}
    if not required <= set(granted):
        raise IdentityAssertionError("it lacks a scope that this server requires")
    wanted = set(requested) - {OFFLINE_ACCESS}
    kept = [scope for scope in granted if scope in wanted] if wanted else granted
    if (asserted or wanted) and not kept:
        raise TokenError("invalid_scope", "none of these scopes is both asserted and offered to the client")
    return [scope for scope in granted if scope in kept or scope in required]


def _issue_to_user(session: Session, asserted: _Asserted, params: IdentityAssertionParams, now: int) -> OAuthToken:
    """Issue an access token, and use up the assertion of the user and that of the client."""
    pair = Pair.mint(with_refresh_token=False)
    grant_id, scopes = mint_grant_id(), " ".join(asserted.scopes)
    row = {
        "token_hash": hash_secret(pair.access_token),
        "kind": ACCESS,
        "grant_id": grant_id,
        "client_id": asserted.client_id,
        "subject": asserted.subject,
        "scopes": scopes,
        "resource": asserted.resource,
        "created_at": now,
        "expires_at": now + asserted.lifetime_seconds,
    }
    session.execute(_keep_client, {"b_client_id": asserted.client_id, "b_now": now})
    session.execute(_insert, row)
    use_once(session, asserted.name, asserted.client_id, asserted.assertion_expires_at, now)
    if isinstance(params, PresentedIdentity):
        spend(session, params.secret, now)
    emit_after_commit(
        session, "tokens_issued", grant_id=grant_id, client_id=asserted.client_id, subject=asserted.subject
    )
    return answer(pair, asserted.lifetime_seconds, scopes)


async def use_up(issuer: Issuer, secret: Secret) -> None:
    """Use up a client's assertion in a step of its own, after an application's own method has issued a token.

    Raises `AuthenticationError` if it was used before.
    """
    await issuer.store.write(_use_up, secret, int(time.time()))
    issuer.after_commit()


def _use_up(session: Session, secret: Secret, now: int) -> None:
    spend(session, secret, now)
