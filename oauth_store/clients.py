"""A registered client, as the handlers see it: what it may ask for, and where its codes may be sent."""

from urllib.parse import SplitResult, urlsplit

from fastmcp.server.auth.redirect_validation import (
    is_loopback_host,
    is_redirect_uri_allowed_for_application_type,
)
from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import InvalidRedirectUriError, OAuthClientInformationFull
from pydantic import AnyUrl, PrivateAttr

OFFLINE_ACCESS = "offline_access"
"""The scope by which clients ask for a refresh token. Accepted, whatever the server's scopes are."""
REDIRECT_URIS = 50
SCOPES = 100
"""What a registration may have at most."""


class StoredClient(OAuthClientInformationFull):
    """A row of `oauth_clients`. Its secret is known as a hash alone, and never leaves the process."""

    _secret_hash: bytes | None = PrivateAttr(default=None)
    _grantable: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def load(
        cls, metadata: str, *, secret_hash: bytes | None, server_scopes: list[str], required_scopes: list[str]
    ) -> "StoredClient":
        """Return the client of a stored row.

        `server_scopes` are for a client that registered without any. Every client may have the `required_scopes`:
        a token without them is refused for ever.
        """
        client = cls.model_validate_json(metadata)
        client._secret_hash = secret_hash
        own = client.scope.split() if client.scope else server_scopes
        client._grantable = list(dict.fromkeys([*own, *required_scopes]))
        return client

    @property
    def secret_hash(self) -> bytes | None:
        return self._secret_hash

    def validate_scope(self, requested_scope: str | None) -> list[str] | None:
        """Return the scopes to grant (RFC 6749, section 3.3): what was asked for, less what cannot be granted.

        A request that names none that can be granted gets what the client may have: Claude registers without scopes,
        and a token without the server's required ones would be refused for ever.
        """
        asked = dict.fromkeys((requested_scope or "").split())
        grantable = dict.fromkeys(scope for scope in self._grantable if scope != OFFLINE_ACCESS)
        granted = [scope for scope in asked if scope in grantable] or list(grantable)
        return [*granted, OFFLINE_ACCESS] if OFFLINE_ACCESS in asked else granted

    def validate_redirect_uri(self, redirect_uri: AnyUrl | None) -> AnyUrl:
        """Return the redirect URI to use. On loopback any port will do (RFC 8252, section 7.3).

        Raises `InvalidRedirectUriError` for one that the client did not register.
        """
        registered = self.redirect_uris or []
        if redirect_uri is None:
            return super().validate_redirect_uri(None)
        presented = urlsplit(str(redirect_uri))
        if any(_same(presented, urlsplit(str(uri))) for uri in registered):
            return redirect_uri
        raise InvalidRedirectUriError("redirect_uri is not registered for this client")


def check_redirect_uris(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` unless codes may be sent to every redirect URI of a registration.

    https, http on loopback, or a scheme of an application's own; for an `application_type` of web, https alone
    (RFC 7591, section 5; RFC 8252, sections 7 and 8.3). There are at most `REDIRECT_URIS`, and `SCOPES` scopes: every
    request of the client reads them all.
    """
    if not client.redirect_uris:
        raise RegistrationError("invalid_redirect_uri", "redirect_uris is missing")
    if len(client.redirect_uris) > REDIRECT_URIS:
        raise RegistrationError("invalid_redirect_uri", f"there are more than {REDIRECT_URIS} redirect URIs")
    if len((client.scope or "").split()) > SCOPES:
        raise RegistrationError("invalid_client_metadata", f"there are more than {SCOPES} scopes")
    for uri in client.redirect_uris:
        parts = urlsplit(str(uri))
        if parts.fragment or str(uri).endswith("#"):
            raise RegistrationError("invalid_redirect_uri", "a redirect URI has a fragment")
        if "@" in parts.netloc:
            raise RegistrationError("invalid_redirect_uri", "a redirect URI has a user")
        if not is_redirect_uri_allowed_for_application_type(uri, client.application_type):
            raise RegistrationError(
                "invalid_redirect_uri",
                "a redirect URI is neither https, nor http on loopback, nor of an application's own scheme",
            )


def _same(one: SplitResult, other: SplitResult) -> bool:
    if one._replace(path=one.path or "/") == other._replace(path=other.path or "/"):
        return True
    if one.scheme != "http" or not is_loopback_host(other.hostname) or "@" in one.netloc:
        return False
    return (one.scheme, one.hostname, one.path or "/", one.query, one.fragment) == (
        other.scheme,
        other.hostname,
        other.path or "/",
        other.query,
        other.fragment,
    )
