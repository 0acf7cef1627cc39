"""The steps of an OAuth flow as a client takes them, on a provider in this process."""

import base64
import hashlib
import secrets
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastmcp.server.auth import OAuthProvider
from mcp.server.auth.provider import AuthorizationParams
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from pydantic import AnyUrl

from tests.conftest import REDIRECT_URI


def pkce() -> tuple[str, str]:
    """A code verifier and its S256 challenge (RFC 7636)."""
    verifier = secrets.token_urlsafe(32)
    digest = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(digest).decode().rstrip("=")


def authorization_params(**params: Any) -> AuthorizationParams:
    """What a client sends to /authorize."""
    values: dict[str, Any] = {
        "state": "the-state",
        "scopes": ["read", "write"],
        "code_challenge": pkce()[1],
        "redirect_uri": AnyUrl(REDIRECT_URI),
        "redirect_uri_provided_explicitly": True,
        "resource": None,
    }
    return AuthorizationParams.model_validate({**values, **params})


def query_of(url: str) -> dict[str, str]:
    """The parameters of a redirect."""
    return {key: values[0] for key, values in parse_qs(urlsplit(url).query, keep_blank_values=True).items()}


async def authorize(provider: OAuthProvider, client: OAuthClientInformationFull, **params: Any) -> str:
    """A code of an approved request."""
    return query_of(await provider.authorize(client, authorization_params(**params)))["code"]


async def redeem(provider: OAuthProvider, client: OAuthClientInformationFull, code: str) -> OAuthToken:
    """The tokens of a code."""
    loaded = await provider.load_authorization_code(client, code)
    assert loaded is not None
    return await provider.exchange_authorization_code(client, loaded)


async def sign_in(provider: OAuthProvider, client: OAuthClientInformationFull, **params: Any) -> OAuthToken:
    """The tokens of a new grant."""
    return await redeem(provider, client, await authorize(provider, client, **params))


async def refresh(
    provider: OAuthProvider, client: OAuthClientInformationFull, token: OAuthToken, scopes: list[str] | None = None
) -> OAuthToken:
    """What /token answers to a refresh, for a token that it finds."""
    loaded = await provider.load_refresh_token(client, str(token.refresh_token))
    assert loaded is not None
    return await provider.exchange_refresh_token(client, loaded, loaded.scopes if scopes is None else scopes)
