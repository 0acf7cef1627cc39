"""Machines with the clients that they use: through a kill -9, a revocation and a removal, and never a browser."""

import asyncio
import os
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.auth import OAuthToken

from tests.clients import DIRECTORY, need_clients
from tests.clients.apps import ANSWER
from tests.clients.mcp_remote import McpRemote
from tests.clients.storage import MemoryStorage
from tests.commands import run, run_json
from tests.example import ExampleServer


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The file of the server."""
    return str(tmp_path / "oauth.db")


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[ExampleServer]:
    """A process of examples/server.py."""
    server = ExampleServer(tmp_path / "server.log", database)
    server.start()
    yield server
    server.kill()


async def command(*arguments: str, database: str) -> Any:
    """What a command prints as JSON."""
    return await asyncio.to_thread(run_json, *arguments, database=database)


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_the_python_sdk(server: ExampleServer, database: str, method: Any) -> None:
    """It calls; after a kill -9 its token works; revoked, it gets a new one by itself; removed, it is refused."""
    added = await command("clients", "add", "Job", "--machine", "--auth-method", method, database=database)
    storage = MemoryStorage()

    async def call() -> OAuthToken:
        auth = ClientCredentialsOAuthProvider(
            server_url=server.url,
            storage=storage,
            client_id=added["client_id"],
            client_secret=added["client_secret"],
            token_endpoint_auth_method=method,
            issuer=server.url.removesuffix("mcp"),
        )
        async with Client(server.url, auth=auth) as client:
            assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
        assert storage.tokens is not None
        return storage.tokens

    issued = await call()
    assert issued.refresh_token is None
    server.restart()
    assert await call() == issued

    (grant,) = (await command("grants", database=database))["grants"]
    await command("revoke", grant["grant_id"], "--yes", database=database)
    assert (await call()).access_token != issued.access_token
    (after,) = (await command("grants", database=database))["grants"]
    assert after["grant_id"] != grant["grant_id"]

    removed = await asyncio.to_thread(run, "clients", "remove", added["client_id"], "--yes", database=database)
    assert removed.returncode == 0
    with pytest.raises(Exception, match="invalid_client"):
        await call()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_the_typescript_sdk(server: ExampleServer, database: str, version: str) -> None:
    """One process calls, also after a kill -9 of the server, and after a revocation with a new token."""
    added = await command("clients", "add", "Job", "--machine", "--auth-method", "client_secret_basic",
                          database=database)  # fmt: skip
    credentials = {"MACHINE_ID": added["client_id"], "MACHINE_SECRET": added["client_secret"]}
    process = await asyncio.create_subprocess_exec(
        *(need_clients(), str(DIRECTORY / "machine.mjs"), version, server.url),
        stdin=PIPE,
        stdout=PIPE,
        env={"PATH": os.environ["PATH"], **credentials},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def call() -> None:
        process.stdin.write(b"call\n")  # type: ignore[union-attr]  # asserted above
        async with asyncio.timeout(60):
            assert (await process.stdout.readline()).decode() == f"{ANSWER}\n"  # type: ignore[union-attr]

    try:
        await call()
        (grant,) = (await command("grants", database=database))["grants"]
        server.restart()
        await call()
        (after,) = (await command("grants", database=database))["grants"]
        assert after == grant
        await command("revoke", grant["grant_id"], "--yes", database=database)
        await call()
        (after,) = (await command("grants", database=database))["grants"]
        assert after["grant_id"] != grant["grant_id"]
    finally:
        process.stdin.close()
        await process.wait()


async def test_mcp_remote(server: ExampleServer, database: str, tmp_path: Path) -> None:
    """With --client-credentials it calls, before and after a kill -9 and a revocation, and opens no browser."""
    added = await command("clients", "add", "Job", "--machine", database=database)
    client = f'{{"client_id": "{added["client_id"]}", "client_secret": "${{MACHINE_SECRET}}"}}'
    options = ["--client-credentials", "--static-oauth-client-info", client]
    remote = McpRemote(server.url, tmp_path, options=options, MACHINE_SECRET=added["client_secret"])

    async def call() -> None:
        async with remote.connected() as connected:
            assert (await connected.call_tool("read_page", {"title": "Home"})).data == ANSWER

    await call()
    async with remote.connected() as connected:
        for _ in range(2):
            assert (await connected.call_tool("read_page", {"title": "Home"})).data == ANSWER
            server.restart()
    (grant,) = (await command("grants", database=database))["grants"]
    assert (grant["client_name"], grant["hosts"]) == ("Job", [])
    await command("revoke", grant["grant_id"], "--yes", database=database)
    await call()
    assert remote.authorizations == 0
