"""The server as approvals see it, and the approvals that do not ask the owner."""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import AuthorizationParams, AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import PrivateAttr
from sqlalchemy import Row
from starlette.requests import Request

from oauth_store.browser import Cookies
from oauth_store.credentials import user_code_in
from oauth_store.database.models import DEVICE
from oauth_store.errors import ConfigurationError
from oauth_store.flows import authorization
from oauth_store.flows.authorization import Started
from oauth_store.flows.clients import as_stored
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.redirect_uris import foreign

logger = logging.getLogger("oauth_store")

PASSWORD_HASH = "MCP_OAUTH_PASSWORD_HASH"  # noqa: S105 (its name)
OIDC = "MCP_OAUTH_OIDC"
"""What the variables of an identity provider begin with: see `OidcApproval`."""


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """A client's request for access: a row of `oauth_codes` that is not approved yet.

    The `handle` names the request in every process on the same database. Pass it to `provider.approve()` or
    `provider.deny()`; it never works as a code. Anyone can start a request and send its handle around, so call
    `provider.pending()` to check that the browser is the one that started it. `expires_at` is in epoch seconds.
    """

    handle: str
    client: OAuthClientInformationFull
    redirect_uri: str
    scopes: list[str]
    resource: str | None
    expires_at: int
    user_code: str | None = None
    """The code that a device shows, and that the owner typed (RFC 8628). Its request has no redirect URI: it is ""."""


def request_of(handle: str, client: OAuthClientInformationFull, row: Started | Row[Any]) -> AuthorizationRequest:
    """Return the request that was just stored, or that a row describes."""
    return AuthorizationRequest(
        handle=handle,
        client=client,
        redirect_uri="" if row.redirect_uri == DEVICE else row.redirect_uri,
        scopes=row.scopes.split(),
        resource=row.resource,
        expires_at=row.expires_at,
        user_code=user_code_in(handle) if row.redirect_uri == DEVICE else None,
    )


async def start(
    issuer: Issuer, client: OAuthClientInformationFull, params: AuthorizationParams
) -> AuthorizationRequest:
    """Store a client's request, and return it. Raises `AuthorizeError`."""
    started = await authorization.start(issuer, as_stored(client, issuer.scopes), params)
    if isinstance(params, RequestParams):
        params.start(started)
    return request_of(started.handle, client, started)


class Approver(Protocol):
    """The part of `SQLAlchemyOAuthProvider` that the pages and the built-in approvals use."""

    @property
    def issuer(self) -> Issuer: ...

    @property
    def cookies(self) -> Cookies: ...

    @property
    def public_name(self) -> str: ...

    def public_url(self, path: str) -> str: ...

    def address_of(self, request: Request) -> str: ...

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None: ...

    async def pending(self, handle: str, request: Request) -> AuthorizationRequest | None: ...

    async def approve(
        self, handle: str, *, subject: str | None = None, scopes: Collection[str] | None = None
    ) -> str: ...

    async def deny(self, handle: str) -> str: ...


class RequestParams(AuthorizationParams):
    """The parameters of an authorization request, with their HTTP request and the stored request."""

    _http_request: Request | None = PrivateAttr(default=None)
    _started: Started | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, params: AuthorizationParams, http_request: Request) -> "RequestParams":
        """Return the same parameters, with their HTTP request."""
        own = cls.model_validate(params.model_dump())
        own._http_request = http_request
        return own

    @property
    def http_request(self) -> Request | None:
        return self._http_request

    @property
    def started(self) -> Started | None:
        return self._started

    def start(self, started: Started) -> None:
        """Keep the stored request."""
        self._started = started


def is_provider_set() -> bool:
    """Return whether the environment names an identity provider, or a part of one."""
    return any(os.environ.get(f"{OIDC}_{name}") for name in ("ISSUER", "CLIENT_ID", "CLIENT_SECRET", "ALLOW"))


def check_no_provider(approval: str) -> None:
    """Raise `ConfigurationError` if the environment names an identity provider that an approval would ignore."""
    if is_provider_set():
        raise ConfigurationError(
            f"{OIDC}_ISSUER or another variable of it is set, but {approval}() never asks an identity provider; "
            "remove one of the two, or use OidcApproval()"
        )


class AutoApproval:
    """Approves every client without asking the owner, as `InMemoryOAuthProvider` does.

    For tests, and for servers that only their users can reach.
    """

    def __init__(self) -> None:
        """Raises `ConfigurationError` if a password or an identity provider is set: its owner expects to be asked."""
        if os.environ.get(PASSWORD_HASH):
            raise ConfigurationError(
                f"{PASSWORD_HASH} is set, but AutoApproval() never asks for the password; remove one of the two"
            )
        check_no_provider("AutoApproval")

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Approve the request at once."""
        return await provider.approve(request.handle)


class LoopbackApproval(AutoApproval):
    """The default when every URL of the server is loopback: approves only clients on this machine.

    A client that comes through a tunnel to localhost gets `access_denied`. So does a web page that registers its own
    redirect URI with the server on the owner's machine.
    """

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Refuse a request of unknown origin."""
        raise AuthorizeError(
            "access_denied",
            "no HTTP request shows where this authorization came from; if that is expected, as in a test, pass "
            "approval=AutoApproval() to SQLAlchemyOAuthProvider",
        )

    async def authorize_from(
        self, provider: Approver, request: AuthorizationRequest, params: AuthorizationParams
    ) -> str:
        """Approve the request if it came from this machine and its response stays here."""
        http_request = params.http_request if isinstance(params, RequestParams) else None
        if http_request is None:
            return await self.authorize(provider, request)
        refused = _leaves_this_machine(http_request, request.redirect_uri)
        if refused:
            logger.warning(
                "authorization refused: %s. No approval is set, so only clients on this machine get in; pass approval= "
                "to SQLAlchemyOAuthProvider to let in others",
                refused,
            )
            raise AuthorizeError("access_denied", "this server lets in clients on its own machine only")
        return await super().authorize(provider, request)


_FORWARDED = re.compile(
    r"forwarded|via|(x-)?(forwarded|original|real|client|cluster|envoy|proxy)-.*|.*-(connecting|client)-ip|cf-.*|cdn-.*"
    r"|fly-.*|fastly-.*|x-(amzn|amz|azure|arr|appengine|cloud|tailscale|ngrok|vercel|railway)-.*|tailscale-.*"
)
"""Headers that proxies and tunnels add."""


def _leaves_this_machine(request: Request, redirect_uri: str) -> str | None:
    """Return why a request or its response leaves this machine, or None if nothing shows that it does.

    This is no proof: a tunnel that copies bytes, or a proxy that adds no header and uses HTTP/1.1, looks like a
    local client.
    """
    forwarded = next(filter(_FORWARDED.fullmatch, request.headers), None)
    if forwarded:
        return f"it has the header {forwarded}, so it was forwarded"
    if request.scope.get("http_version") == "1.0":  # no browser uses it, and nginx does by default
        return "it uses HTTP/1.0, as proxies do"
    # a dual-stack listener writes IPv4 as ::ffff:127.0.0.1
    if request.client is None or not is_loopback_host(request.client.host.removeprefix("::ffff:")):
        return "it came from another machine"
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return "its Host header cannot be read"
    if not is_loopback_host(host):
        return "its Host header is not loopback"
    target = urlsplit(redirect_uri)
    if target.scheme in ("http", "https"):
        return None if is_loopback_host(target.hostname) else f"its redirect URI leads to {target.hostname}"
    refused = foreign(target)
    return f"its redirect URI is not safe: {refused}" if refused else None
