"""Real MCP clients through a kill -9 of their server: nobody is asked to authorize them again."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.clients.apps import ANSWER, CALL_SECONDS, KINDS, METHODS, App, Outcome, TypeScriptApp, make_app
from tests.endpoints import basic
from tests.example import ExampleServer

# the store of the Python client outlives the client object, as a file would
pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExampleServer]:
    """A process of examples/server.py on an SQLite file, at the same port after every restart."""
    directory = tmp_path_factory.mktemp("server")
    server = ExampleServer(directory / "server.log", str(directory / "oauth.db"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=KINDS)
def app(request: pytest.FixtureRequest, server: ExampleServer, tmp_path: Path, method: str) -> App:
    """A client application of each kind that has never met the server."""
    return make_app(request.param, server.url, method, tmp_path)


def oauth_requests(outcome: Outcome) -> list[str]:
    """The requests of a call that are neither refused tool calls nor discovery."""
    return [line for line in outcome.requests if not line.startswith(("POST /mcp 401", "GET /.well-known/"))]


@pytest.mark.parametrize("method", METHODS)
async def test_nobody_authorizes_a_client_again_after_a_kill(app: App, server: ExampleServer, method: str) -> None:
    """A client discovers, registers, is authorized and calls; after a kill -9 its tokens work, and can be refreshed."""
    first = await app.call()
    assert (first.answer, first.authorizations) == (ANSWER, 1)
    assert "GET /.well-known/oauth-protected-resource/mcp 200" in first.requests
    assert "GET /.well-known/oauth-authorization-server 200" in first.requests
    assert oauth_requests(first) == [
        "POST /register 201",
        "GET /authorize 302",
        f"POST /token (authorization_code, {method}) 200",
    ]
    registered, issued = await app.client(), await app.tokens()
    assert registered.token_endpoint_auth_method == method
    assert (registered.client_secret is None) == (method == "none")

    server.restart()
    assert await app.call() == Outcome(ANSWER, [], 0)
    assert await app.tokens() == issued

    await app.lose_access_token()
    refreshed = await app.call()
    assert (refreshed.answer, refreshed.authorizations) == (ANSWER, 0)
    assert oauth_requests(refreshed) == [f"POST /token (refresh_token, {method}) 200"]
    rotated = await app.tokens()
    assert {rotated.access_token, rotated.refresh_token}.isdisjoint({issued.access_token, issued.refresh_token})

    assert await app.call() == Outcome(ANSWER, [], 0)
    assert (await app.client()).client_id == registered.client_id


@pytest.mark.parametrize("method", METHODS)
async def test_a_revoked_grant_leads_to_a_new_authorization(app: App, server: ExampleServer, method: str) -> None:
    """A client whose grant is gone gets invalid_grant, and is authorized anew with the registration that it has."""
    await app.call()
    registered, tokens = await app.client(), await app.tokens()
    form, headers = {"token": str(tokens.refresh_token), "client_id": str(registered.client_id)}, {}
    if method == "client_secret_post":
        form["client_secret"] = str(registered.client_secret)
    if method == "client_secret_basic":
        headers = basic(str(registered.client_id), str(registered.client_secret))
    async with httpx2.AsyncClient(timeout=60) as http:
        revoked = await http.post(server.url.replace("/mcp", "/revoke"), data=form, headers=headers)
    assert revoked.status_code == 200, revoked.text

    await app.lose_access_token()
    again = await app.call()
    assert (again.answer, again.authorizations) == (ANSWER, 1)
    assert oauth_requests(again) == [
        f"POST /token (refresh_token, {method}) 401",
        "GET /authorize 302",
        f"POST /token (authorization_code, {method}) 200",
    ]
    assert (await app.client()).client_id == registered.client_id


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_connected_client_does_not_notice_a_kill(server: ExampleServer, tmp_path: Path, version: str) -> None:
    """A TypeScript client that stays connected through a kill -9 goes on calling, without any OAuth request."""
    app = TypeScriptApp(server.url, "none", version, tmp_path)
    process = await app.start()
    commands, answers = process.stdin, process.stdout
    assert commands is not None
    assert answers is not None

    async def call() -> Outcome:
        commands.write(b"call\n")
        line = await answers.readline()
        assert line, "the client ended"
        return Outcome(**json.loads(line))

    try:
        async with asyncio.timeout(CALL_SECONDS):
            assert (await call()).authorizations == 1
            await asyncio.to_thread(server.restart)
            assert await call() == Outcome(ANSWER, [], 0)
            commands.close()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
