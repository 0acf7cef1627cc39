"""curl, the least client: with a personal token, as a machine and as a device, through a kill -9 and a revocation."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oauth_store.flows.connected import DEVICE_CODE
from tests.clients.owners import Owner
from tests.commands import run, run_json
from tests.example import ExampleServer
from tests.sites import HASH

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
PING = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ExampleServer]:
    """A process of examples/server.py with a password."""
    server = ExampleServer(tmp_path / "server.log", str(tmp_path / "oauth.db"), MCP_OAUTH_PASSWORD_HASH=HASH)
    server.start()
    yield server
    server.kill()


async def curl(*arguments: str) -> tuple[int, Any]:
    """The status and the body of a response, as curl prints them."""
    process = await asyncio.create_subprocess_exec(
        "curl", "--silent", "--write-out", "\n%{http_code}", *arguments, stdout=asyncio.subprocess.PIPE
    )
    body, _, status = (await process.communicate())[0].decode().rpartition("\n")
    return int(status), json.loads(body) if body.startswith("{") else body


def json_body(text: str) -> tuple[str, ...]:
    """A body, as --json sends it from curl 7.82 on."""
    return "-H", "Content-Type: application/json", "--data", text


async def call(server: ExampleServer, token: str) -> int:
    """The status of a call with this token."""
    accept = "Accept: application/json, text/event-stream"
    status, _ = await curl("-H", f"Authorization: Bearer {token}", "-H", accept, *json_body(PING), server.url)
    return status


async def revoked(server: ExampleServer, token: str, database: str, *command: str) -> None:
    """It is good, also after a kill -9, and refused once it is revoked."""
    assert await call(server, token) == 200
    server.restart()
    assert await call(server, token) == 200
    assert run(*command, "--yes", database=database).returncode == 0
    assert await call(server, token) == 401


async def test_a_personal_token(server: ExampleServer, tmp_path: Path) -> None:
    """It is made by a command, and ended by one."""
    database = str(tmp_path / "oauth.db")
    token = run_json("token", "create", "cron", "--resource", server.url, database=database)["token"]
    await revoked(server, token, database, "token", "revoke", "cron")


async def test_a_machine(server: ExampleServer, tmp_path: Path) -> None:
    """Its secret gets a token."""
    database = str(tmp_path / "oauth.db")
    added = run_json("clients", "add", "Job", "--machine", database=database)
    form = ("-d", "grant_type=client_credentials", "-d", f"client_id={added['client_id']}")
    url = server.url.replace("/mcp", "/token")
    status, issued = await curl(*form, "-d", f"client_secret={added['client_secret']}", url)
    assert (status, "refresh_token" in issued) == (200, False)
    await revoked(server, issued["access_token"], database, "revoke", "--all")


async def test_a_device(server: ExampleServer, tmp_path: Path) -> None:
    """It registers, shows its link, asks until the owner has allowed it, and gets a pair."""
    base = server.url.removesuffix("/mcp")
    metadata = {
        "client_name": "Backup script",
        "token_endpoint_auth_method": "none",
        "redirect_uris": [],
        "grant_types": [DEVICE_CODE, "refresh_token"],
    }
    status, registered = await curl(*json_body(json.dumps(metadata)), f"{base}/register")
    assert status == 201
    client = ("-d", f"client_id={registered['client_id']}")
    _, device = await curl(*client, f"{base}/device_authorization")
    poll = (*client, "-d", f"grant_type={DEVICE_CODE}", "-d", f"device_code={device['device_code']}", f"{base}/token")
    assert (await curl(*poll))[1]["error"] == "authorization_pending"
    server.restart()
    await Owner().answer_device(device["verification_uri_complete"])
    status, issued = await curl(*poll)
    assert status == 200
    await revoked(server, issued["access_token"], str(tmp_path / "oauth.db"), "revoke", "--all")
    refresh = ("-d", "grant_type=refresh_token", "-d", f"refresh_token={issued['refresh_token']}", f"{base}/token")
    assert (await curl(*client, *refresh))[1]["error"] == "invalid_grant"
