"""Enterprise sign-in with the MCP SDK's own client, through a kill -9 of the server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from mcp.client.auth.extensions.identity_assertion import IdentityAssertionOAuthProvider

from tests.clients.apps import ANSWER
from tests.clients.storage import MemoryStorage
from tests.commands import run, run_json
from tests.databases import sqlite_rows
from tests.identities import CLIENT_ID, Company, EnterpriseServer

COMPANY = Company("RS256")


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The file of the server."""
    return str(tmp_path / "oauth.db")


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[EnterpriseServer]:
    """A process that trusts the company."""
    server = EnterpriseServer(tmp_path / "server.log", database, ISSUER=COMPANY.issuer)
    assert run("upgrade", database=database).returncode == 0
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_the_python_sdk(server: EnterpriseServer, database: str, method: Any) -> None:
    """It calls; after a kill -9 its token works; revoked, it gets a new one by itself; removed, it is refused."""
    adding = ("clients", "add", "Assistant", "--identity-assertion", "--client-id", CLIENT_ID, "--auth-method", method)
    added = await asyncio.to_thread(run_json, *adding, database=database)
    storage = MemoryStorage()
    signed: list[tuple[str, str]] = []

    async def sign(audience: str, resource: str) -> str:
        signed.append((audience, resource))
        return COMPANY.sign(COMPANY.claims(audience, resource))

    async def call() -> str:
        auth = IdentityAssertionOAuthProvider(
            server_url=server.url,
            storage=storage,
            client_id=CLIENT_ID,
            client_secret=added["client_secret"],
            issuer=server.url.removesuffix("mcp"),
            assertion_provider=sign,
            token_endpoint_auth_method=method,
        )
        async with Client(server.url, auth=auth) as client:
            assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
        assert storage.tokens is not None
        return storage.tokens.access_token

    async with COMPANY.open():
        first = await call()
        assert signed == [(server.url.removesuffix("mcp"), server.url)]
        await asyncio.to_thread(server.restart)
        assert await call() == first
        listed = await asyncio.to_thread(run_json, "grants", database=database)
        assert [grant["subject"] for grant in listed["grants"]] == ["ada@example.com"]
        await asyncio.to_thread(run, "revoke", "--all", "--yes", database=database)
        assert await call() != first
        assert len(signed) == 2
        await asyncio.to_thread(run, "clients", "remove", CLIENT_ID, "--yes", database=database)
        with pytest.raises(Exception, match="invalid_client"):
            await call()
    server.kill()
    assert await asyncio.to_thread(sqlite_rows, database, "SELECT count(*) FROM oauth_tokens") == [(0,)]
