"""A client, and the steps of an OAuth flow as it takes them, on a provider in this process."""

import base64
import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastmcp.server.auth import OAuthProvider
from mcp.server.auth.provider import AuthorizationParams
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from pydantic import AnyUrl
from sqlalchemy.ext.asyncio import AsyncEngine

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider

BASE_URL = "http://127.0.0.1:8000"
RESOURCE = f"{BASE_URL}/mcp"
REDIRECT_URI = "http://127.0.0.1:9000/callback"

Provider = Callable[..., SQLAlchemyOAuthProvider]


def provider_on(database: str | Path | AsyncEngine) -> SQLAlchemyOAuthProvider:
    """A provider that lets everyone in, with its defaults."""
    provider = SQLAlchemyOAuthProvider(database, base_url=BASE_URL, approval=AutoApproval())
    provider.set_mcp_path("/mcp")
    return provider


def new_client(**metadata: Any) -> OAuthClientInformationFull:
    """A public client as dynamic registration would make it."""
    values = {
        "client_id": f"client-{secrets.token_hex(8)}",
        "redirect_uris": [AnyUrl(REDIRECT_URI)],
        "token_endpoint_auth_method": "none",
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "client_name": "Test client",
        "scope": "read write",
    }
    return OAuthClientInformationFull.model_validate({**values, **metadata})


async def registered(provider: OAuthProvider, **metadata: Any) -> Any:
    """A client that the provider knows, as the provider knows it."""
    client = new_client(**metadata)
    await provider.register_client(client)
    return await provider.get_client(client.client_id)


def registration_options(*scopes: str) -> ClientRegistrationOptions:
    """Registration with these valid scopes."""
    return ClientRegistrationOptions(enabled=True, valid_scopes=list(scopes))


def pkce() -> tuple[str, str]:
    """A code verifier and its S256 challenge (RFC 7636)."""
    verifier = secrets.token_urlsafe(32)
    return verifier, challenge_of(verifier)


def challenge_of(verifier: str) -> str:
    """The S256 challenge of a code verifier."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def authorization_request(client_id: str, **params: str) -> dict[str, str]:
    """What a client sends to /authorize over HTTP."""
    values = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": REDIRECT_URI,
        "code_challenge": pkce()[1],
        "code_challenge_method": "S256",
        "state": "the-state",
    }
    return values | params


def authorization_params(**params: Any) -> AuthorizationParams:
    """What /authorize makes of such a request."""
    values: dict[str, Any] = {
        "state": "the-state",
        "scopes": ["read", "write"],
        "code_challenge": pkce()[1],
        "redirect_uri": AnyUrl(REDIRECT_URI),
        "redirect_uri_provided_explicitly": True,
        "resource": None,
    }
    return AuthorizationParams.model_validate({**values, **params})


def token_request(code: str, verifier: str, **params: str) -> dict[str, str]:
    """What a client sends to /token for a code, over HTTP."""
    values = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier, "redirect_uri": REDIRECT_URI}
    return values | params


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
