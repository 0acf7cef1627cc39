"""A registered client as the handlers see it: how it authenticates, and the scopes that it may have."""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import RegistrationError, TokenError
from mcp.shared.auth import InvalidRedirectUriError, InvalidScopeError, OAuthClientInformationFull
from pydantic import AnyUrl, PrivateAttr
from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from oauth_store.credentials import matches
from oauth_store.database.models import CLIENT_ID_LENGTH, NEVER, clients
from oauth_store.flows.assertions import Secret, VerifiedAssertion
from oauth_store.flows.connected import CLIENT_CREDENTIALS
from oauth_store.flows.issuer import Issuer, ServerScopes
from oauth_store.flows.redirect_uris import is_same
from oauth_store.flows.scopes import is_scope

OFFLINE_ACCESS = "offline_access"
"""The scope with which clients request a refresh token. Accepted, whatever the server's scopes are."""
PRIVATE_KEY_JWT = "private_key_jwt"
"""The method of a client that signs an assertion with its own key (RFC 7523, section 2.2)."""
SCOPES = 100
"""The most that a registration may have."""

DESCRIPTION_LENGTH = 200
"""The longest error that repeats requested values."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a server knows about a client besides its registration."""

    secret_hash: bytes | None = None
    scopes: ServerScopes = field(default_factory=ServerScopes)
    limited: bool = False
    """Whether the client may have only its registered scopes, like a client that the owner added by hand."""


class OwnersClient(OAuthClientInformationFull):
    """A client that the owner of the server added by hand: it may have only its registered scopes."""

    added_by_owner: Literal[True] = True
    introspects: str | None = None
    """The resource about whose tokens it may ask (RFC 7662)."""


def is_owners(metadata: str) -> bool:
    """Return whether a stored registration is that of an `OwnersClient`."""
    return "added_by_owner" in metadata and json.loads(metadata).get("added_by_owner") is True


def is_limited(row: Row[Any]) -> bool:
    """Return whether the scopes that the client of a row registered are all that it may have."""
    return row.last_used_at == NEVER or is_owners(row.client_metadata)


def owners(metadata: str) -> str:
    """Return a stored registration as that of an `OwnersClient`."""
    return json.dumps(json.loads(metadata) | {"added_by_owner": True})


class StoredClient(OAuthClientInformationFull):
    """A row of `oauth_clients`. Only the hash of its secret is known, and it never leaves the process."""

    _introspects: str | None = PrivateAttr(default=None)
    _standing: Standing = PrivateAttr(default_factory=Standing)  # a default would be copied each time

    @classmethod
    def load(cls, metadata: str, standing: Standing) -> "StoredClient":
        """Return the client of a stored row."""
        client = cls.model_validate_json(metadata)
        client._standing = standing
        if standing.limited and "introspects" in metadata:
            client._introspects = json.loads(metadata).get("introspects")
        return client

    @classmethod
    def of(cls, row: Row[Any], scopes: ServerScopes, *, limited: bool = False) -> "StoredClient":
        """Return the client of a row that has its columns."""
        return cls.load(row.client_metadata, Standing(row.client_secret_hash, scopes, limited))

    @property
    def secret_hash(self) -> bytes | None:
        return self._standing.secret_hash

    @property
    def is_public(self) -> bool:
        """Whether the client does not authenticate."""
        return self.secret_hash is None and self.token_endpoint_auth_method in (None, "none")

    @property
    def introspects(self) -> str | None:
        """The resource about whose tokens the client may ask (RFC 7662): the owner added this other server by hand."""
        return self._introspects

    @property
    def is_limited(self) -> bool:
        """Whether the owner added the client by hand."""
        return self._standing.limited

    @property
    def is_machine(self) -> bool:
        """Whether the owner added the client for client credentials alone (RFC 6749, section 4.4)."""
        return self._standing.limited and self.grant_types == [CLIENT_CREDENTIALS]

    @property
    def _listed(self) -> Mapping[str, None]:
        own = dict.fromkeys((self.scope or "").split())
        valid = self._standing.scopes.valid
        listed = dict.fromkeys([*own, *self._standing.scopes.usual]) if valid is None else valid
        return {scope: None for scope in own if scope in listed} if self._standing.limited and own else listed

    @property
    def offered(self) -> Mapping[str, None]:
        """The scopes that this client can have: those that are required, and see `validate_scope`."""
        return {**dict.fromkeys(self._standing.scopes.required), **self._listed}

    def validate_scope(self, requested_scope: str | None) -> list[str] | None:
        """Return the scopes to grant (RFC 6749, section 3.3): the requested ones that this client can have.

        It can have the server's scopes: the valid ones or, if the server does not list them, its default ones and those
        that the client registered. Of these, a client that the owner added by hand can have only those that the owner
        named. A request that names no scope, or only `offline_access`, gets the scopes that the client registered, or
        else the default ones. The required ones are always included: every request refuses a token without them. Raises
        `InvalidScopeError` if scopes were requested or named by the owner, and none of them can be granted.
        """
        own = dict.fromkeys((self.scope or "").split())
        required, usual = self._standing.scopes.required, self._standing.scopes.usual
        if self._standing.limited and own and not self._listed:
            raise InvalidScopeError("this server has none of the scopes that its owner set for this client")
        offer = self.offered
        asked = dict.fromkeys((requested_scope or "").split())
        wanted = [scope for scope in asked if scope != OFFLINE_ACCESS]
        granted = [scope for scope in wanted if scope in offer]
        if wanted and not granted:
            raise InvalidScopeError(f"this server has no scope {' '.join(wanted)}"[:DESCRIPTION_LENGTH])
        granted = granted or [s for s in own if s in offer] or [s for s in usual if s in offer]
        granted = [scope for scope in dict.fromkeys([*granted, *required]) if scope != OFFLINE_ACCESS]
        return [*granted, OFFLINE_ACCESS] if OFFLINE_ACCESS in asked else granted

    def validate_redirect_uri(self, redirect_uri: AnyUrl | None) -> AnyUrl:
        """Return the redirect URI to use. On loopback, any port matches (RFC 8252, section 7.3).

        Raises `InvalidRedirectUriError` if the client did not register it.
        """
        registered = self.redirect_uris or []
        if redirect_uri is None:
            return super().validate_redirect_uri(None)
        presented = urlsplit(str(redirect_uri))
        if any(is_same(presented, urlsplit(str(uri))) for uri in registered):
            return redirect_uri
        raise InvalidRedirectUriError("redirect_uri is not registered for this client")


def as_stored(client: OAuthClientInformationFull, scopes: ServerScopes) -> StoredClient:
    """Return a client as a stored one, also one of a `get_client()` that an application has overridden."""
    return (
        client
        if isinstance(client, StoredClient)
        else StoredClient.load(client.model_dump_json(), Standing(scopes=scopes))
    )


def offered_to(client: OAuthClientInformationFull, scopes: ServerScopes) -> Collection[str]:
    """Return the scopes that a client can have, also one of a `get_client()` that an application has overridden."""
    return client.offered if isinstance(client, StoredClient) else scopes.valid or ()


_client_by_id = select(clients).where(clients.c.client_id == bindparam("b_client_id"))


async def find(issuer: Issuer, client_id: str) -> StoredClient | None:
    """Return a registered client, or None."""
    return await issuer.store.read(get_client, issuer.scopes, client_id)


def get_client(session: Session, scopes: ServerScopes, client_id: str) -> StoredClient | None:
    """Return a registered client, or None."""
    if not is_client_id(client_id):
        return None
    row = session.execute(_client_by_id, {"b_client_id": client_id}).one_or_none()
    if row is None or row.client_id != client_id:  # MariaDB pads: 'abc ' equals 'abc'
        return None
    return StoredClient.of(row, scopes, limited=is_limited(row))


def is_client_id(text: str) -> bool:
    """Return whether a text can be a client_id. PostgreSQL cannot store a NUL."""
    return len(text) <= CLIENT_ID_LENGTH and "\0" not in text


def authenticate(client: StoredClient | None, secret: Secret) -> StoredClient:
    """Return the client if the secret matches its hash. The SDK's authenticator would need the secret in plain text.

    A client without a secret needs an assertion if it registered for `private_key_jwt`; its step has to `spend` it.
    Raises `AuthenticationError`.
    """
    if client is None:
        raise AuthenticationError("client_id is not registered")
    if client.secret_hash is None and client.token_endpoint_auth_method == PRIVATE_KEY_JWT:
        if isinstance(secret, VerifiedAssertion) and secret.client_id == client.client_id:
            return client
        raise AuthenticationError("client_assertion is missing: the client registered for private_key_jwt")
    if isinstance(secret, VerifiedAssertion):
        raise AuthenticationError("the client did not register for private_key_jwt")
    if client.is_public:
        return client
    if client.secret_hash is None:
        raise AuthenticationError("this server has lost the client's secret; register again")
    if secret is None or not matches(secret, client.secret_hash):
        raise AuthenticationError("client_secret is missing or wrong")
    if client.client_secret_expires_at and client.client_secret_expires_at < time.time():
        raise AuthenticationError("client_secret has expired")
    return client


def admit(client: StoredClient | None, secret: Secret, grant_type: str) -> StoredClient:
    """Return a client that authenticates and may use this grant type. Its step has to `spend` the secret at its end.

    Raises `AuthenticationError` or `TokenError`.
    """
    admitted = authenticate(client, secret)
    if grant_type not in admitted.grant_types:
        raise TokenError("unauthorized_client", f"the client did not register for {grant_type}")
    return admitted


def check_scopes(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` unless a registration names at most `SCOPES` scopes, all of them well-formed."""
    scopes = (client.scope or "").split()
    if len(scopes) > SCOPES:
        raise RegistrationError("invalid_client_metadata", f"there are more than {SCOPES} scopes")
    if not all(map(is_scope, scopes)):
        raise RegistrationError("invalid_client_metadata", "scope contains an invalid character")
