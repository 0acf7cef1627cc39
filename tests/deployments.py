"""Servers at the root, under a path, behind a proxy and inside `MultiAuth`, and how a client finds its way there."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
from fastmcp import FastMCP
from fastmcp.server.auth import MultiAuth
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from tests.serving import free_port, serving

MACHINE_TOKEN = "machine-token"
SERVED_AS_IT_IS = ("/.well-known/oauth-protected-resource/wiki/mcp", "/.well-known/oauth-authorization-server/wiki")
"""The paths that a proxy must hand on without taking anything away, for a server at /wiki."""


def wiki(auth: Any) -> FastMCP[None]:
    """A server with one tool."""
    mcp: FastMCP[None] = FastMCP("wiki", auth=auth)

    @mcp.tool
    def read_page(title: str) -> str:
        return f"{title}: for authorized clients only"  # what examples/server.py answers

    return mcp


@asynccontextmanager
async def running(app: ASGIApp, port: int, provider: SQLAlchemyOAuthProvider) -> AsyncIterator[None]:
    """Serve an application with its provider."""
    async with provider, serving(app, port):
        yield


@asynccontextmanager
async def at_the_root(port: int) -> AsyncIterator[str]:
    """FastMCP's own application."""
    provider = SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}", approval=AutoApproval())
    async with running(wiki(provider).http_app(stateless_http=True), port, provider):
        yield f"http://127.0.0.1:{port}/mcp"


@asynccontextmanager
async def mounted(port: int) -> AsyncIterator[str]:
    """Two servers under paths of a Starlette application, as FastMCP's documentation says: the yielded one is /wiki."""
    providers, routes, apps = [], [], []
    for name in ("other", "wiki"):
        provider = SQLAlchemyOAuthProvider(
            ":memory:", base_url=f"http://127.0.0.1:{port}/{name}", approval=AutoApproval()
        )
        app = wiki(provider).http_app(path="/mcp", stateless_http=True)
        routes.extend(provider.get_well_known_routes(mcp_path="/mcp"))
        providers.append(provider)
        apps.append((name, app))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for _, app in apps:
                await stack.enter_async_context(app.lifespan(app))
            yield

    outer = Starlette(routes=[*routes, *(Mount(f"/{name}", app=app) for name, app in apps)], lifespan=lifespan)
    async with providers[0], running(outer, port, providers[1]):
        yield f"http://127.0.0.1:{port}/wiki/mcp"


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[str]:
    """A server behind a proxy that answers at /wiki, and takes that away from the path."""
    inner = free_port()
    provider = SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}/wiki", approval=AutoApproval())
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{inner}", timeout=60) as upstream:

        async def forward(request: Request) -> Response:
            path = request.url.path
            if path not in SERVED_AS_IT_IS:
                if not path.startswith("/wiki/"):
                    return Response("the proxy knows no such path", status_code=404)
                path = path.removeprefix("/wiki")
            headers = [(key, value) for key, value in request.headers.items() if key != "host"]
            answer = await upstream.request(
                request.method,
                httpx2.URL(path, query=request.url.query.encode()),
                headers=headers,
                content=await request.body(),
            )
            dropped = ("content-length", "content-encoding", "transfer-encoding")
            kept = {key: value for key, value in answer.headers.items() if key not in dropped}
            return Response(answer.content, answer.status_code, kept)

        proxy = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST", "DELETE", "OPTIONS"])])
        async with running(wiki(provider).http_app(stateless_http=True), inner, provider), serving(proxy, port):
            yield f"http://127.0.0.1:{port}/wiki/mcp"


@asynccontextmanager
async def in_multi_auth(port: int) -> AsyncIterator[str]:
    """A server that takes machine tokens as well."""
    provider = SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}", approval=AutoApproval())
    machines = StaticTokenVerifier({MACHINE_TOKEN: {"client_id": "machine", "scopes": []}})
    auth = MultiAuth(server=provider, verifiers=[machines])
    async with running(wiki(auth).http_app(stateless_http=True), port, provider):
        yield f"http://127.0.0.1:{port}/mcp"


async def discover(http: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    """Find the authorization server as a client does: challenge, RFC 9728, RFC 8414. Return its metadata."""
    challenge = await http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "ping"})
    assert challenge.status_code == 401
    where = challenge.headers["www-authenticate"].split('resource_metadata="')[1].split('"')[0]
    protected = (await http.get(where)).raise_for_status().json()
    assert protected["resource"] == url  # as the user typed it
    [issuer] = protected["authorization_servers"]
    parts = urlsplit(issuer)
    path = f"/.well-known/oauth-authorization-server{parts.path.rstrip('/')}"  # RFC 8414, section 3.1
    metadata = (await http.get(f"{parts.scheme}://{parts.netloc}{path}")).raise_for_status().json()
    assert metadata["issuer"] == issuer
    return dict(metadata)
