"""The server under a path, behind a proxy and inside `MultiAuth`: what clients find there, and that they get in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastmcp import FastMCP
from fastmcp.server import auth as fastmcp_auth
from fastmcp.server.auth import MultiAuth
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from tests.clients.apps import ANSWER, KINDS, Outcome, make_app
from tests.conftest import REDIRECT_URI
from tests.flows import pkce, query_of
from tests.serving import free_port, serving

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

MACHINE_TOKEN = "machine-token"
NOTICE_SECONDS = 1.2
"""Longer than sse-starlette takes to notice that a server is about to end."""
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
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{inner}") as upstream:

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


@pytest.fixture(params=[at_the_root, mounted, proxied, in_multi_auth], ids=lambda deploy: deploy.__name__)
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of the MCP endpoint, as its users type it."""
    async with request.param(free_port()) as url:
        yield url


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


async def test_discovery_leads_to_every_endpoint(url: str) -> None:
    """Challenge, resource metadata and server metadata agree, and each endpoint that they name works."""
    async with httpx2.AsyncClient() as http:
        metadata = await discover(http, url)
        registered = await http.post(
            metadata["registration_endpoint"],
            json={"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"},
        )
        client_id = registered.raise_for_status().json()["client_id"]
        verifier, challenge = pkce()
        request = {"response_type": "code", "client_id": client_id, "redirect_uri": REDIRECT_URI, "resource": url}
        answer = await http.get(
            metadata["authorization_endpoint"],
            params=request | {"code_challenge": challenge, "code_challenge_method": "S256"},
        )
        callback = query_of(answer.headers["location"])
        assert callback["iss"] == metadata["issuer"]
        form = {"grant_type": "authorization_code", "client_id": client_id, "code": callback["code"], "resource": url}
        answer = await http.post(
            metadata["token_endpoint"], data=form | {"redirect_uri": REDIRECT_URI, "code_verifier": verifier}
        )
        tokens = answer.raise_for_status().json()
        headers = {"authorization": f"Bearer {tokens['access_token']}", "accept": "application/json, text/event-stream"}
        call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        assert (await http.post(url, json=call, headers=headers)).status_code not in (401, 403, 404)
        await http.post(metadata["revocation_endpoint"], data={"client_id": client_id, "token": tokens["access_token"]})
        assert (await http.post(url, json=call, headers=headers)).status_code == 401


async def test_an_error_names_the_same_issuer(url: str) -> None:
    """The `iss` of an error redirect is the issuer of the metadata, byte for byte (RFC 9207, section 2.4)."""
    async with httpx2.AsyncClient() as http:
        metadata = await discover(http, url)
        registered = await http.post(
            metadata["registration_endpoint"],
            json={"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"},
        )
        request = {"response_type": "code", "client_id": registered.json()["client_id"], "redirect_uri": REDIRECT_URI}
        pkce_of = {"code_challenge": pkce()[1], "code_challenge_method": "S256"}
        answer = await http.get(
            metadata["authorization_endpoint"],
            params=request | pkce_of | {"resource": "https://other.example.com/mcp"},
        )
        callback = query_of(answer.headers["location"])
        assert (callback["error"], callback["iss"]) == ("invalid_target", metadata["issuer"])


@pytest.mark.parametrize("kind", KINDS)
async def test_real_clients_get_in_and_refresh(url: str, kind: str, tmp_path: Path) -> None:
    """A real client goes through the whole flow, and refreshes, without a word about where the server stands."""
    app = make_app(kind, url, "none", tmp_path)
    first = await app.call()
    assert (first.answer, first.authorizations) == (ANSWER, 1)
    assert await app.call() == Outcome(ANSWER, [], 0)
    if kind == "fastmcp" and urlsplit(url).path != "/mcp":
        return  # a restarted Python client refreshes at /token of the host, whatever its path (python-sdk issue 3240)
    await app.lose_access_token()
    refreshed = await app.call()
    assert (refreshed.answer, refreshed.authorizations) == (ANSWER, 0)


async def test_machine_tokens_work_beside_ours() -> None:
    """Inside `MultiAuth` the other verifiers are asked for tokens that are not ours."""
    async with in_multi_auth(free_port()) as url, httpx2.AsyncClient() as http:
        call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        for token, refused in ((MACHINE_TOKEN, False), ("nonsense", True)):
            headers = {"authorization": f"Bearer {token}", "accept": "application/json, text/event-stream"}
            assert ((await http.post(url, json=call, headers=headers)).status_code == 401) == refused


async def test_an_outage_inside_multi_auth(tmp_path: Path) -> None:
    """Inside `MultiAuth` the OAuth routes answer 503 during an outage; the MCP endpoint cannot, but refuses nobody."""
    port = free_port()
    provider = SQLAlchemyOAuthProvider(
        tmp_path / "away" / "oauth.db", base_url=f"http://127.0.0.1:{port}", approval=AutoApproval()
    )
    app = wiki(MultiAuth(server=provider)).http_app(stateless_http=True)
    async with running(app, port, provider), httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        form = {"grant_type": "refresh_token", "client_id": "client", "refresh_token": "refresh_x"}
        assert (await http.post("/token", data=form)).status_code == 503
        headers = {"authorization": "Bearer access_x", "accept": "application/json, text/event-stream"}
        call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        answer = await http.post("/mcp", json=call, headers=headers)
        assert answer.status_code == (500 if hasattr(fastmcp_auth, "TokenVerificationError") else 401)


async def test_a_server_that_ended_leaves_the_next_alone() -> None:
    """A server that ended has no hold on the event streams of the next one in the same process.

    sse-starlette before 3.5 remembered the end of the first: each answer of the next was cut off, and the client on the
    TypeScript SDK waited a minute for the rest.
    """
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "read_page", "arguments": {"title": "T"}},
    }
    headers = {"authorization": f"Bearer {MACHINE_TOKEN}", "accept": "application/json, text/event-stream"}
    machines = StaticTokenVerifier({MACHINE_TOKEN: {"client_id": "machine", "scopes": []}})
    for _ in range(2):
        port = free_port()
        async with serving(wiki(machines).http_app(stateless_http=True), port) as url, httpx2.AsyncClient() as http:
            answer = await http.post(f"{url}/mcp", json=call, headers=headers)
            assert "T: for authorized clients only" in answer.text
        await asyncio.sleep(NOTICE_SECONDS)
