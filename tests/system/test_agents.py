"""Codex, mcporter and opencode, the products themselves, as far as they go without an account."""

from pathlib import Path

import httpx2
import pytest

from tests.clients.agents import AGENTS, Agent
from tests.databases import sqlite_rows
from tests.example import ExampleServer


@pytest.mark.parametrize("product", AGENTS)
async def test_nobody_authorizes_an_agent_again(product: type[Agent], tmp_path: Path) -> None:
    """It asks once: through two kill -9 and an expiry it goes on; once revoked it signs in anew."""
    database = str(tmp_path / "oauth.db")
    server = ExampleServer(tmp_path / "server.log", database)
    agent = product(server.url, tmp_path)

    def authorizations() -> int:
        """How often the server was asked for one."""
        return len(sqlite_rows(database, "SELECT 1 FROM oauth_codes"))

    server.start()
    try:
        await agent.authorize()
        issued, registered = agent.refresh_token, agent.client_id
        server.restart()
        await agent.use()
        assert agent.refresh_token == issued

        agent.lose_access_token()
        server.restart()
        await agent.use()
        assert agent.refresh_token != issued
        assert authorizations() == 1

        form = {"client_id": registered, "token": agent.refresh_token}
        assert httpx2.post(server.url.replace("/mcp", "/revoke"), data=form, timeout=60).status_code == 200
        await agent.authorize()
        assert authorizations() == 2
        assert (agent.client_id == registered) is product.keeps_registration
    finally:
        server.kill()
