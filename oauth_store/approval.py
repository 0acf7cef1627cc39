"""What an approval may ask of the server, and the approvals that ask nobody."""

import logging
import os
import re
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
from oauth_store.errors import ConfigurationError
from oauth_store.flows import authorization
from oauth_store.flows.authorization import Started
from oauth_store.flows.clients import Standing, StoredClient, foreign
from oauth_store.flows.issuer import Issuer

logger = logging.getLogger("oauth_store")

PASSWORD_HASH = "MCP_OAUTH_PASSWORD_HASH"  # noqa: S105 (its name)


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """What a client asks the owner for: a row of `oauth_codes` that is not approved yet.

    The `handle` names it, in this and in any other process on the same database. It is good for `provider.approve()`
    and `provider.deny()`, never as a code; and as anyone can start a request and send its handle around,
    `provider.pending()` tells whether a browser is the one that started it. `expires_at` is in epoch seconds.
    """

    handle: str
    client: OAuthClientInformationFull
    redirect_uri: str
    scopes: list[str]
    resource: str | None
    expires_at: int


def request_of(handle: str, client: OAuthClientInformationFull, row: Started | Row[Any]) -> AuthorizationRequest:
    """Return the request of a client that was stored, or that a row has."""
    return AuthorizationRequest(
        handle=handle,
        client=client,
        redirect_uri=row.redirect_uri,
        scopes=row.scopes.split(),
        resource=row.resource,
        expires_at=row.expires_at,
    )


async def start(
    issuer: Issuer, client: OAuthClientInformationFull, params: AuthorizationParams
) -> AuthorizationRequest:
    """Store a request of a client, and return it. Raises `AuthorizeError`."""
    if not isinstance(client, StoredClient):  # of a get_client() that an application has overridden
        client = StoredClient.load(client.model_dump_json(), Standing(scopes=issuer.scopes))
    started = await authorization.start(issuer, client, params)
    if isinstance(params, RequestParams):
        params.start(started)
    return request_of(started.handle, client, started)


class Approver(Protocol):
    """What pages, and approvals of ours, ask of the server: a narrow view of `SQLAlchemyOAuthProvider`."""

    @property
    def issuer(self) -> Issuer: ...

    @property
    def cookies(self) -> Cookies: ...

    @property
    def public_name(self) -> str: ...

    def public_url(self, path: str) -> str: ...

    def address_of(self, request: Request) -> str: ...

    async def pending(self, handle: str, request: Request) -> AuthorizationRequest | None: ...

    async def approve(self, handle: str, *, subject: str | None = None) -> str: ...

    async def deny(self, handle: str) -> str: ...


class RequestParams(AuthorizationParams):
    """The parameters of an authorization request, with the HTTP request that had them, and what was stored of it."""

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
        """Keep what was stored."""
        self._started = started


class AutoApproval:
    """Lets in everyone who asks, without asking the owner: what `InMemoryOAuthProvider` does.

    For tests, and for servers that only those can reach who may use them.
    """

    def __init__(self) -> None:
        """Raises `ConfigurationError` where a password is set: its owner believes that it is asked for."""
        if os.environ.get(PASSWORD_HASH):
            raise ConfigurationError(f"{PASSWORD_HASH} is set, but AutoApproval() asks nobody; drop one of the two")

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Approve the request at once."""
        return await provider.approve(request.handle)


class LoopbackApproval(AutoApproval):
    """The default where every URL of the server is loopback: lets in only what runs on this machine.

    A tunnel to localhost, or a web page that registers a redirect URI of its own with the server on the owner's
    machine, gets `access_denied`.
    """

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Refuse a request of which nothing says where it came from."""
        raise AuthorizeError(
            "access_denied",
            "there was no HTTP request to tell where this came from; where that is right, as in a test, pass "
            "approval=AutoApproval() to SQLAlchemyOAuthProvider",
        )

    async def authorize_from(
        self, provider: Approver, request: AuthorizationRequest, params: AuthorizationParams
    ) -> str:
        """Approve the request if it came from this machine and its answer stays there."""
        http_request = params.http_request if isinstance(params, RequestParams) else None
        if http_request is None:
            return await self.authorize(provider, request)
        refused = _leaves_this_machine(http_request, request.redirect_uri)
        if refused:
            logger.warning(
                "authorization refused: %s. Nobody is asked on a server without an approval, so only clients on this "
                "machine get in; pass approval= to SQLAlchemyOAuthProvider to let in others",
                refused,
            )
            raise AuthorizeError("access_denied", "this server lets in clients on its own machine only")
        return await super().authorize(provider, request)


_FORWARDED = re.compile(
    r"forwarded|via|(x-)?(forwarded|original|real|client|cluster|envoy|proxy)-.*|.*-(connecting|client)-ip|cf-.*|cdn-.*"
    r"|fly-.*|fastly-.*|x-(amzn|amz|azure|arr|appengine|cloud|tailscale|ngrok|vercel|railway)-.*|tailscale-.*"
)
"""Headers by which proxies and tunnels give themselves away."""


def _leaves_this_machine(request: Request, redirect_uri: str) -> str | None:
    """Return why a request or its answer crosses this machine's border, or None where nothing says so.

    No proof: a tunnel that copies bytes, or a proxy that adds no header and speaks HTTP/1.1, looks like a local client.
    """
    forwarded = next(filter(_FORWARDED.fullmatch, request.headers), None)
    if forwarded:
        return f"it has the header {forwarded}, so it was forwarded"
    if request.scope.get("http_version") == "1.0":  # which no browser speaks, and nginx does by default
        return "it came as HTTP/1.0, as proxies send it"
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
