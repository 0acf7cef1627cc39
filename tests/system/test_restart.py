"""Real servers that are killed, and a real client over HTTP."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from fastmcp import Client

from examples.demo import REFRESH, ClientApp
from tests.example import ExampleServer

# the client of the tests is never restarted
pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

StartServer = Callable[..., ExampleServer]


@pytest.fixture
def start_server(database_url: str, tmp_path: Path) -> Iterator[StartServer]:
    """Start processes of examples/server.py on `database_url`; afterwards all of them are killed."""
    servers: list[ExampleServer] = []

    def start(**settings: str) -> ExampleServer:
        server = ExampleServer(tmp_path / f"server-{len(servers)}.log", database_url, **settings)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


async def test_the_same_tokens_work_after_a_kill(start_server: StartServer) -> None:
    """A client goes on with its access token after a SIGKILL, and sends no OAuth request at all."""
    server = start_server()
    app = ClientApp(server.url)
    await app.call_tool()
    before, requests = await app.tokens(), len(app.requests)

    server.restart()
    await app.call_tool()

    assert await app.tokens() == before
    assert app.requests[requests:] == []
    assert app.authorizations == 1


async def test_a_refresh_works_after_a_kill(start_server: StartServer) -> None:
    """A client that has only its refresh token left gets a new pair on /token after a SIGKILL."""
    server = start_server()
    app = ClientApp(server.url)
    await app.call_tool()
    before = await app.tokens()
    await app.keep(refresh_token=True)

    server.restart()
    await app.call_tool()

    after = await app.tokens()
    assert app.requests[-1] == REFRESH
    assert app.authorizations == 1
    assert before.access_token != after.access_token
    assert before.refresh_token != after.refresh_token


async def test_a_client_authorizes_again_without_registering_again(start_server: StartServer) -> None:
    """A registration outlives a SIGKILL: a client without tokens authorizes with the client_id that it has."""
    server = start_server()
    app = ClientApp(server.url)
    await app.call_tool()
    await app.keep(refresh_token=False)

    server.restart()
    await app.call_tool()

    assert app.requests.count("POST /register 201") == 1
    assert app.authorizations == 2


async def test_a_session_goes_on_through_a_kill(start_server: StartServer) -> None:
    """A connected client of an older protocol does not notice a SIGKILL: with `stateless_http` no session is lost."""
    server = start_server()
    app = ClientApp(server.url)

    async with app.connect(mode="legacy") as client:
        await client.call_tool("read_page", {"title": "Home"})
        server.restart()
        await client.call_tool("read_page", {"title": "Home"})

    assert app.authorizations == 1


async def test_replicas_share_tokens_and_revocations(start_server: StartServer) -> None:
    """A token from one process is good at another, and refused there at once when it was revoked through the first."""
    first = start_server()
    second = start_server(BASE_URL=first.url.removesuffix("/mcp"))
    app = ClientApp(first.url)
    await app.call_tool()
    tokens = await app.tokens()

    async with Client(second.url, auth=tokens.access_token) as client:
        result = await client.call_tool("read_page", {"title": "Home"})
    assert result.data == "Home: for authorized clients only"

    client_id = await app.client_id()
    async with httpx2.AsyncClient(timeout=60) as http:
        revoked = await http.post(
            first.url.replace("/mcp", "/revoke"), data={"token": tokens.access_token, "client_id": client_id}
        )
        refused = await http.post(second.url, headers={"Authorization": f"Bearer {tokens.access_token}"}, json={})
        not_refreshed = await http.post(
            second.url.replace("/mcp", "/token"),
            data={"grant_type": "refresh_token", "refresh_token": tokens.refresh_token, "client_id": client_id},
        )
    assert revoked.status_code == 200
    assert refused.status_code == 401
    assert not_refreshed.json()["error"] == "invalid_grant"
