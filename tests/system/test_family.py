"""One authorization server and three MCP servers, in four processes: two share its database, one asks it."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastmcp import Client
from fastmcp.utilities.tests import HeadlessOAuth

from oauth_store.flows.registration import add_client
from tests.families import Family, asking, called, mcp_server
from tests.processes import Process
from tests.steps import provider_on

NAMES = ("wiki", "files", "notes")


def serve() -> None:
    """One of the four, in a process of its own: its name and the ports of all are in the environment."""
    family, name = Family(json.loads(os.environ["TEST_PORTS"])), os.environ["TEST_NAME"]
    auth: Any = family.provider() if name == "auth" else family.protection(name)
    app = mcp_server(name, auth).http_app(stateless_http=True)
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["TEST_PORT"]), log_level="warning", ws="none")


class Processes:
    """The four processes."""

    def __init__(self, database: str, directory: Path) -> None:
        self.family = Family.anywhere()
        self._processes = {
            name: Process(
                serve,
                directory / f"{name}.log",
                port,
                {"MCP_OAUTH_DB": database, "TEST_NAME": name, "TEST_PORTS": json.dumps(self.family.ports)},
            )
            for name, port in zip(("auth", *NAMES), self.family.ports, strict=True)
        }

    def __getitem__(self, name: str) -> Process:
        return self._processes[name]

    def start(self) -> None:
        """Start them all: the authorization server first, which creates the tables."""
        for process in self._processes.values():
            process.start()

    def kill(self) -> None:
        """End them all."""
        for process in self._processes.values():
            process.kill()


@pytest.fixture
async def processes(database_url: str, tmp_path: Path) -> AsyncIterator[Processes]:
    """The four, on each kind of database."""
    processes = Processes(database_url, tmp_path)
    provider = provider_on(database_url)
    await provider.issuer.store.write(add_client, asking(processes.family.endpoints["notes"]))
    await provider.aclose()
    processes.start()
    yield processes
    processes.kill()


class Connection:
    """A client of one server, which keeps its tokens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.oauth = HeadlessOAuth(url)

    async def call(self) -> list[Any]:
        """What the server says of itself and of the caller."""
        async with Client(self.url, auth=self.oauth) as client:
            answer: list[Any] = json.loads((await client.call_tool("whoami")).data)
            return answer

    async def token(self) -> str:
        """The access token."""
        tokens = await self.oauth.token_storage_adapter.get_tokens()
        assert tokens is not None
        return str(tokens.access_token)


@pytest.mark.filterwarnings("ignore:Using in-memory token storage")
async def test_one_login_for_three_servers(processes: Processes, database_url: str) -> None:
    """Every client connects to each; no token crosses; one revocation ends one; and who goes on without the first."""
    endpoints = processes.family.endpoints
    connections = {name: Connection(endpoints[name]) for name in NAMES}
    for name, connection in connections.items():
        assert await connection.call() == [name, None]
    tokens = {name: await connection.token() for name, connection in connections.items()}
    pairs = {(of, at): await called(endpoints[at], tokens[of]) for of in NAMES for at in NAMES}
    assert {pair for pair, status in pairs.items() if status == 200} == {(name, name) for name in NAMES}
    assert set(pairs.values()) == {200, 401}
    assert [await called(f"{processes.family.auth}/mcp", token) for token in tokens.values()] == [401] * 3

    processes["auth"].kill()
    assert await called(endpoints["wiki"], tokens["wiki"]) == 200
    assert await called(endpoints["files"], tokens["files"]) == 200
    assert await called(endpoints["notes"], tokens["notes"]) in (401, 503)  # FastMCP's verifier: see docs
    processes["auth"].start()
    assert await called(endpoints["notes"], tokens["notes"]) == 200

    processes["wiki"].restart()
    assert await connections["wiki"].call() == ["wiki", None]
    assert await connections["wiki"].token() == tokens["wiki"]

    provider = processes.family.provider(database_url)
    provider.set_mcp_path("/mcp")
    access = await provider.load_access_token(tokens["wiki"])
    assert access is not None
    await provider.revoke_token(access)
    await provider.aclose()
    assert [await called(endpoints[name], tokens[name]) for name in NAMES] == [401, 200, 200]
