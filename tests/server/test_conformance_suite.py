"""The MCP conformance suite, against our servers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest

from tests.clients import need_conformance_suite
from tests.deployments import discover, proxied
from tests.example import ExampleServer
from tests.families import served_family
from tests.serving import free_port

SUITE_SECONDS = 120
CHECKS = {
    "authorization-server-metadata",
    "authorization-server-metadata-cimd",
    "authorization-code-grant",
}


@asynccontextmanager
async def process(directory: Path) -> AsyncIterator[str]:
    """A process of examples/server.py, on an SQLite file."""
    server = ExampleServer(directory / "server.log", str(directory / "oauth.db"))
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


@asynccontextmanager
async def behind_a_proxy(_directory: Path) -> AsyncIterator[str]:
    """A server whose issuer has a path."""
    async with proxied(free_port()) as url:
        yield url


@asynccontextmanager
async def of_a_family(directory: Path, name: str) -> AsyncIterator[str]:
    """A server whose tokens another one issues: it looks them up itself, or asks."""
    async with served_family(str(directory / "oauth.db")) as (family, _):
        yield family.endpoints[name]


DEPLOYMENTS: dict[str, Callable[[Path], AbstractAsyncContextManager[str]]] = {
    "process": process,
    "behind a proxy": behind_a_proxy,
    **{name: partial(of_a_family, name=name) for name in ("wiki", "files", "notes")},
}


@pytest.fixture(params=DEPLOYMENTS.values(), ids=list(DEPLOYMENTS))
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a running server."""
    async with request.param(tmp_path) as url:
        yield url


async def register(endpoint: str, redirect_uri: str) -> str:
    """Register a public client, and return its client_id."""
    async with httpx2.AsyncClient(timeout=60) as http:
        answer = await http.post(
            endpoint,
            json={"redirect_uris": [redirect_uri], "token_endpoint_auth_method": "none", "client_name": "conformance"},
        )
    assert answer.status_code == 201, answer.text
    return str(answer.json()["client_id"])


async def open_authorization_page(output: asyncio.StreamReader) -> str:
    """Do what the suite asks a person for: open the page that it names, once it listens. Return all it wrote."""
    read, page, listening = "", "", False
    while not (page and listening):
        line = (await output.readline()).decode()
        assert line, f"the suite ended without asking for an authorization:\n{read}"
        read += line
        listening = listening or line.startswith("Callback server started")
        if "/authorize?" in line:
            page = line.strip()
    async with httpx2.AsyncClient(follow_redirects=True, timeout=60) as browser:
        assert (await browser.get(page)).status_code == 200
    return read + (await output.read()).decode()


async def test_every_check_of_the_suite_passes(url: str, tmp_path: Path) -> None:
    """The `authorization` command finds no failure and no warning, and leaves nothing out."""
    command = need_conformance_suite()
    port, results = free_port(), tmp_path / "results"
    async with httpx2.AsyncClient(timeout=60) as http:
        metadata = await discover(http, url)
    issuer = metadata["issuer"]
    client_id = await register(metadata["registration_endpoint"], f"http://127.0.0.1:{port}/callback")
    options = ["--url", issuer, "--client-id", client_id, "--resource", url]
    process = await asyncio.create_subprocess_exec(
        *command, "authorization", *options, "--port", str(port), "--output-dir", str(results),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SUITE_SECONDS):
            output = await open_authorization_page(process.stdout)
            assert await process.wait() == 0, output
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    print(output)
    checks = [check for file in results.rglob("checks.json") for check in json.loads(file.read_text())]
    assert {check["id"]: check["status"] for check in checks} == dict.fromkeys(CHECKS, "SUCCESS"), output
    assert len(checks) == len(CHECKS)
