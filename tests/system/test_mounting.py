"""The server under a path, behind a proxy and inside `MultiAuth`: what clients find there, and that they get in."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fastmcp.server import auth as fastmcp_auth
from fastmcp.server.auth import MultiAuth
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from tests.clients.apps import ANSWER, KINDS, Outcome, make_app
from tests.deployments import MACHINE_TOKEN, at_the_root, discover, in_multi_auth, mounted, proxied, running, wiki
from tests.serving import free_port, serving
from tests.steps import REDIRECT_URI, authorization_request, pkce, query_of, token_request

NOTICE_SECONDS = 1.2
"""Longer than sse-starlette takes to notice that a server is about to end."""
pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


@pytest.fixture(params=[at_the_root, mounted, proxied, in_multi_auth], ids=lambda deploy: deploy.__name__)
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of the MCP endpoint, as its users type it."""
    async with request.param(free_port()) as url:
        yield url


async def test_discovery_leads_to_every_endpoint(url: str) -> None:
    """Challenge, resource metadata and server metadata agree, and each endpoint that they name works."""
    async with httpx2.AsyncClient(timeout=60) as http:
        metadata = await discover(http, url)
        registered = await http.post(
            metadata["registration_endpoint"],
            json={"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"},
        )
        client_id = registered.raise_for_status().json()["client_id"]
        verifier, challenge = pkce()
        request = authorization_request(client_id, code_challenge=challenge, resource=url)
        answer = await http.get(metadata["authorization_endpoint"], params=request)
        callback = query_of(answer.headers["location"])
        assert callback["iss"] == metadata["issuer"]
        form = token_request(callback["code"], verifier, client_id=client_id, resource=url)
        answer = await http.post(metadata["token_endpoint"], data=form)
        tokens = answer.raise_for_status().json()
        headers = {"authorization": f"Bearer {tokens['access_token']}", "accept": "application/json, text/event-stream"}
        call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        assert (await http.post(url, json=call, headers=headers)).status_code not in (401, 403, 404)
        await http.post(metadata["revocation_endpoint"], data={"client_id": client_id, "token": tokens["access_token"]})
        assert (await http.post(url, json=call, headers=headers)).status_code == 401


async def test_an_error_names_the_same_issuer(url: str) -> None:
    """The `iss` of an error redirect is the issuer of the metadata, byte for byte (RFC 9207, section 2.4)."""
    async with httpx2.AsyncClient(timeout=60) as http:
        metadata = await discover(http, url)
        registered = await http.post(
            metadata["registration_endpoint"],
            json={"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"},
        )
        request = authorization_request(registered.json()["client_id"], resource="https://other.example.com/mcp")
        answer = await http.get(metadata["authorization_endpoint"], params=request)
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
    async with in_multi_auth(free_port()) as url, httpx2.AsyncClient(timeout=60) as http:
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
        async with (
            serving(wiki(machines).http_app(stateless_http=True), port) as url,
            httpx2.AsyncClient(timeout=60) as http,
        ):
            answer = await http.post(f"{url}/mcp", json=call, headers=headers)
            assert "T: for authorized clients only" in answer.text
        await asyncio.sleep(NOTICE_SECONDS)
