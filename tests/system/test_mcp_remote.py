"""mcp-remote, the product itself, through what its server and its owner do."""

from pathlib import Path

import httpx2

from tests.clients.apps import ANSWER
from tests.clients.mcp_remote import McpRemote
from tests.commands import run, run_json
from tests.example import ExampleServer


async def test_nobody_authorizes_mcp_remote_again(tmp_path: Path) -> None:
    """It asks once: through a kill -9 and an expiry it goes on; once revoked it asks anew, as the same client."""
    server = ExampleServer(tmp_path / "server.log", str(tmp_path / "oauth.db"))
    remote = McpRemote(server.url, tmp_path)

    server.start()
    try:
        await remote.stay_authorized(server)
        registered = remote.stored("client_info")
        form = {"client_id": registered["client_id"], "token": remote.stored("tokens")["refresh_token"]}
        assert httpx2.post(server.url.replace("/mcp", "/revoke"), data=form, timeout=60).status_code == 200
        assert await remote.call() == 2
        assert remote.stored("client_info")["client_id"] == registered["client_id"]
    finally:
        server.kill()


async def test_a_personal_token_is_enough(tmp_path: Path) -> None:
    """With --header it asks nobody, also after a kill -9; once the token is revoked, the next call is refused."""
    database = str(tmp_path / "oauth.db")
    server = ExampleServer(tmp_path / "server.log", database)
    server.start()
    try:
        token = run_json("token", "create", "cron", "--resource", server.url, database=database)["token"]
        remote = McpRemote(server.url, tmp_path, options=["--header", f"Authorization: Bearer {token}"])
        for _ in range(2):
            async with remote.connected() as client:
                assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
            server.restart()
        assert remote.authorizations == 0
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}
        ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            assert (await http.post(server.url, json=ping)).status_code == 200
            assert run("token", "revoke", "cron", "--yes", database=database).returncode == 0
            refused = await http.post(server.url, json=ping)
        assert (refused.status_code, 'error="invalid_token"' in refused.headers["www-authenticate"]) == (401, True)
    finally:
        server.kill()
