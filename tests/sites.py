"""A server that asks for a password, and a browser without a screen: what a person's browser sends, in HTTP."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
from argon2 import PasswordHasher
from fastmcp import FastMCP
from mcp.shared.auth import OAuthToken
from pydantic import AnyUrl
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from oauth_store import PasswordApproval, SQLAlchemyOAuthProvider
from oauth_store.pages.approval import PageApproval
from tests.serving import free_port, serving
from tests.steps import REDIRECT_URI, authorization_request, new_client, pkce, query_of

PASSWORD = "correct horse battery"
_quick = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
HASH = _quick.hash(PASSWORD)
"""Of PASSWORD, and quick to check: most tests are not about its cost."""
USERS = {"ada": _quick.hash("ada's password"), "bob": _quick.hash("bob's password")}


@dataclass
class Site:
    """A server with a `PasswordApproval`, in this process, and where it listens."""

    url: str
    """Where browsers reach it: its base_url."""
    provider: SQLAlchemyOAuthProvider
    verifiers: dict[str, str] = field(default_factory=dict)

    async def register(self, **metadata: Any) -> str:
        """Store a client, and return its client_id."""
        client = new_client(**metadata)
        await self.provider.register_client(client)
        return client.client_id

    async def authorize_url(self, *, state: str = "the-state", asks: str | None = None, **metadata: Any) -> str:
        """Register a client, and return the link with which it sends the browser to the server."""
        redirect_uri = metadata.setdefault("redirect_uris", [AnyUrl(REDIRECT_URI)])[0]
        client_id = await self.register(**metadata)
        self.verifiers[client_id], challenge = pkce()
        asked = {} if asks is None else {"scope": asks}
        request = authorization_request(
            client_id, redirect_uri=str(redirect_uri), code_challenge=challenge, state=state, **asked
        )
        return f"{self.url}/authorize?{urlencode(request)}"

    async def redeem(self, authorize_url: str, callback: str) -> OAuthToken:
        """Exchange the code of a redirect as the client of `authorize_url` would, through the provider."""
        client_id = query_of(authorize_url)["client_id"]
        client = await self.provider.get_client(client_id)
        assert client is not None
        code = await self.provider.load_authorization_code(client, query_of(callback)["code"])
        assert code is not None
        return await self.provider.exchange_authorization_code(client, code)

    async def connect(self, *, subject: str | None = "owner", **metadata: Any) -> OAuthToken:
        """Let a client in without a browser, and return its tokens."""
        url = await self.authorize_url(**metadata)
        async with Browser() as browser:
            page = await browser.open(url)
            handle = query_of(str(page.request.url))["handle"]
        return await self.redeem(url, await self.provider.approve(handle, subject=subject))


@asynccontextmanager
async def site(
    database: str | Path | AsyncEngine,
    *,
    base_url: str | None = None,
    approval: dict[str, Any] | PageApproval | None = None,
    port: int | None = None,
    path: str = "",
    certificate: Path | None = None,
    tools: Callable[[FastMCP[None]], None] = lambda _: None,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **settings: Any,
) -> AsyncIterator[Site]:
    """Serve a site with an approval, or a PasswordApproval with these settings, under a path.

    A `base_url` may name another host.
    """
    port = port or free_port()
    if not isinstance(approval, PageApproval):
        approval = PasswordApproval(
            **{**({} if "users" in (approval or {}) else {"password_hash": HASH}), **(approval or {})}
        )
    async with SQLAlchemyOAuthProvider(
        database, base_url=base_url or f"http://127.0.0.1:{port}{path}", approval=approval, **settings
    ) as provider:
        mcp: FastMCP[None] = FastMCP("test", auth=provider)

        @mcp.tool
        def whoami() -> str:
            """Answer."""
            return "you are in"

        tools(mcp)
        app = mcp.http_app(stateless_http=True)
        outer = Starlette(routes=[Mount(path, app=app)], lifespan=app.lifespan) if path else app
        async with serving(wrap(outer), port, ssl_certfile=certificate) as url:
            yield Site(base_url or f"{url}{path}", provider)


class Browser:
    """Keeps cookies, follows the redirect to a page, and sends what the page's form would."""

    def __init__(self, **headers: str) -> None:
        self.http = httpx2.AsyncClient(headers={"Accept": "text/html", **headers}, timeout=60)

    async def __aenter__(self) -> "Browser":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def open(self, url: str, **headers: str) -> httpx2.Response:
        """Navigate: from /authorize to the page that it redirects to."""
        answer = await self.http.get(url, headers=headers)
        if answer.status_code == 302:
            answer = await self.http.get(answer.headers["location"], headers=headers)
        return answer

    async def submit(self, page: httpx2.Response, fields: dict[str, Any], **headers: str) -> httpx2.Response:
        """Send the page's form, with these fields filled in. A redirect is not followed."""
        ticked = [scope for scope, box in boxes_of(page).items() if box == "checked"]
        shown = {"choices": "shown", "scope": ticked} if 'name="choices"' in page.text else {}
        return await self.http.post(action_of(page), data={"csrf": csrf_of(page), **shown, **fields}, headers=headers)

    async def allow(self, page: httpx2.Response, password: str = PASSWORD, **fields: Any) -> httpx2.Response:
        """Type a password, and press Allow."""
        return await self.submit(page, {"answer": "allow", "password": password, **fields})

    async def sign_in(self, url: str, password: str = PASSWORD, **fields: str) -> httpx2.Response:
        """Sign in on the page of connected apps, and return what is shown then."""
        answer = await self.http.post(url, data={"password": password, **fields})
        return await self.open(answer.headers["location"]) if answer.status_code == 303 else answer

    async def create_token(self, page: httpx2.Response, password: str = PASSWORD, **fields: Any) -> httpx2.Response:
        """Make a personal token on the page of connected apps, which asks for the password again."""
        return await self.submit(page, {"create": "token", "password": password, **fields})


def csrf_of(page: httpx2.Response) -> str:
    """The token in a page's forms."""
    found = re.search(r'name="csrf" value="([^"]*)"', page.text)
    return found[1] if found else ""


def boxes_of(page: httpx2.Response) -> dict[str, str]:
    """The scopes that have a checkbox, in their order, and "checked", "checked disabled" or nothing."""
    found = re.findall(r'<input type="checkbox" name="scope" value="([^"]*)"(?: form="consent")?([ a-z]*)>', page.text)
    return {unescape(scope): state.strip() for scope, state in found}


def action_of(page: httpx2.Response) -> str:
    """Where a page's form is sent."""
    found = re.search(r'<form method="post" action="([^"]*)"', page.text)
    assert found, page.text
    return unescape(found[1])


@asynccontextmanager
async def callback_site() -> AsyncIterator[tuple[str, list[str]]]:
    """The callback of a client on this machine, and the URLs that browsers brought there."""
    seen: list[str] = []

    async def callback(request: Request) -> PlainTextResponse:
        seen.append(str(request.url))
        return PlainTextResponse("back in the app")

    async with serving(Starlette(routes=[Route("/callback", callback)]), free_port()) as url:
        yield f"{url}/callback", seen


def handle_of(page: httpx2.Response) -> str:
    """The handle of a page of a request."""
    return query_of(str(page.url))["handle"]
