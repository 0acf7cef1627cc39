"""A device with the client that people use: its code is typed once, through a kill -9, an expiry and a revocation."""

from pathlib import Path

import httpx2

from tests.clients.mcp_remote import McpRemote
from tests.clients.owners import Owner
from tests.commands import run
from tests.example import ExampleServer
from tests.sites import HASH


async def test_mcp_remote_as_a_device(tmp_path: Path) -> None:
    """With --device-code it asks once, and again only after a revocation, as the same client."""
    database = str(tmp_path / "oauth.db")
    server = ExampleServer(tmp_path / "server.log", database, MCP_OAUTH_PASSWORD_HASH=HASH)
    remote = McpRemote(server.url, tmp_path, Owner(), options=["--device-code"])

    server.start()
    try:
        await remote.stay_authorized(server)
        registered = remote.stored("client_info")
        assert run("revoke", "--all", "--yes", database=database).returncode == 0
        headers = {"Authorization": f"Bearer {remote.stored('tokens')['access_token']}"}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            assert (await http.post(server.url, json={})).status_code == 401
        assert await remote.call() == 2
        assert remote.stored("client_info")["client_id"] == registered["client_id"]
    finally:
        server.kill()
