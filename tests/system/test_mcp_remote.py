"""mcp-remote, the product itself, through what its server and its owner do."""

from pathlib import Path

import httpx2

from tests.clients.apps import ANSWER
from tests.clients.mcp_remote import McpRemote
from tests.example import ExampleServer


async def test_nobody_authorizes_mcp_remote_again(tmp_path: Path) -> None:
    """It asks once: through a kill -9 and an expiry it goes on; once revoked it asks anew, as the same client."""
    server = ExampleServer(tmp_path / "server.log", str(tmp_path / "oauth.db"))
    remote = McpRemote(server.url, tmp_path)

    async def call() -> int:
        """Call a tool by a new process. Return how often it asked until now."""
        async with remote.connected() as client:
            assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
        return remote.authorizations

    server.start()
    try:
        async with remote.connected() as client:
            for _ in range(2):
                assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
                server.restart()
        issued, registered = remote.stored("tokens"), remote.stored("client_info")
        assert await call() == 1
        assert remote.stored("tokens") == issued

        remote.lose_access_token()
        assert await call() == 1
        refreshed = remote.stored("tokens")
        assert refreshed["refresh_token"] != issued["refresh_token"]

        form = {"client_id": registered["client_id"], "token": refreshed["refresh_token"]}
        assert httpx2.post(server.url.replace("/mcp", "/revoke"), data=form, timeout=60).status_code == 200
        assert await call() == 2
        assert remote.stored("client_info")["client_id"] == registered["client_id"]
    finally:
        server.kill()
