"""Who may let a client in: the `Approval` protocol, `AutoApproval`, and the default."""

import logging
import os
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull
from starlette.requests import Request

from oauth_store.errors import ConfigurationError
from oauth_store.flows.clients import foreign

if TYPE_CHECKING:
    from oauth_store.provider import SQLAlchemyOAuthProvider

logger = logging.getLogger("oauth_store")

REQUEST_EXPIRY_SECONDS = 600
"""How long the owner may take to approve a request."""
PASSWORD_HASH = "MCP_OAUTH_PASSWORD_HASH"  # noqa: S105 (its name)

current_request: ContextVar[Request | None] = ContextVar("current_request", default=None)
"""The HTTP request to /authorize under way; None where `authorize()` was called by other means."""


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


class Approval(Protocol):
    """Decides whether a client gets in. Anything with this method will do.

    It may also have a method `routes(provider)` that returns a list of Starlette routes: its pages, each with the
    middleware that it brings. They are served beside /authorize and /token, and while the database is away they answer
    503. examples/oidc_approval.py is an approval that signs the owner in elsewhere.
    """

    async def authorize(self, provider: "SQLAlchemyOAuthProvider", request: AuthorizationRequest) -> str:
        """Return the URL to send the browser to.

        A page of yours, which looks the request up with `provider.pending(handle, request)`, asks the owner, and then
        calls `provider.approve(handle, subject=...)` or `provider.deny(handle)`. Or what these two return, to decide
        at once.
        """
        ...


class AutoApproval:
    """Lets in everyone who asks, without asking the owner: what `InMemoryOAuthProvider` does.

    For tests, and for servers that only those can reach who may use them.
    """

    def __init__(self) -> None:
        """Raises `ConfigurationError` where a password is set: its owner believes that it is asked for."""
        if os.environ.get(PASSWORD_HASH):
            raise ConfigurationError(f"{PASSWORD_HASH} is set, but AutoApproval() asks nobody; drop one of the two")

    async def authorize(self, provider: "SQLAlchemyOAuthProvider", request: AuthorizationRequest) -> str:
        """Approve the request at once."""
        return await provider.approve(request.handle)


class LoopbackApproval(AutoApproval):
    """The default where every URL of the server is loopback: lets in only what runs on this machine.

    A tunnel to localhost, or a web page that registers a redirect URI of its own with the server on the owner's
    machine, gets `access_denied`.
    """

    async def authorize(self, provider: "SQLAlchemyOAuthProvider", request: AuthorizationRequest) -> str:
        """Approve the request if it came from this machine and its answer stays there."""
        http_request = current_request.get()
        if http_request is None:
            raise AuthorizeError(
                "access_denied",
                "there was no HTTP request to tell where this came from; where that is right, as in a test, pass "
                "approval=AutoApproval() to SQLAlchemyOAuthProvider",
            )
        refused = _leaves_this_machine(http_request, request.redirect_uri)
        if refused:
            logger.warning(
                "authorization refused: %s. Nobody is asked on a server without an approval, so only clients on this "
                "machine get in; pass approval= to SQLAlchemyOAuthProvider to let in others",
                refused,
            )
            raise AuthorizeError("access_denied", "this server lets in clients on its own machine only")
        return await super().authorize(provider, request)


def default_approval(urls: list[str]) -> Approval:
    """Return the approval of a server with these public URLs where its owner has not chosen one.

    Raises `ConfigurationError` where there is no password and one of them is not loopback.
    """
    if os.environ.get(PASSWORD_HASH):
        from oauth_store.pages.password import PasswordApproval  # argon2 and jinja2 are for those who need them

        return PasswordApproval()
    public = [url for url in urls if not is_loopback_host(urlsplit(url).hostname)]
    if public:
        raise ConfigurationError(
            f"who may let a client in at {public[0]}? Anyone who finds the URL could get a token. Set {PASSWORD_HASH} "
            "to what `oauth-store hash-password` prints, pass approval=<your own Approval> to ask the owner otherwise, "
            "or approval=AutoApproval() to let in everyone"
        )
    logger.warning("no approval= is set: clients on this machine are let in without asking, all others are refused")
    return LoopbackApproval()


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
