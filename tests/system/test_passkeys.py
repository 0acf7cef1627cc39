"""Passkeys in real processes: a challenge outlives a kill -9, and is good once in all processes together."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastmcp import FastMCP

from oauth_store import PasskeyApproval, SQLAlchemyOAuthProvider
from oauth_store.flows.passkeys import create_link
from tests.passkeys import Authenticator, add, ask, send
from tests.processes import Process
from tests.serving import free_port
from tests.sites import Browser, Site
from tests.steps import provider_on

SECONDS = 60
BASE_URL = "TEST_BASE_URL"


def serve() -> None:
    """A server that asks for passkeys alone, in a process of its own."""
    provider = SQLAlchemyOAuthProvider(
        os.environ["MCP_OAUTH_DB"], base_url=os.environ[BASE_URL], approval=PasskeyApproval()
    )
    app = FastMCP("wiki", auth=provider).http_app(stateless_http=True)
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["TEST_PORT"]), log_level="warning", ws="none")


@pytest.fixture
def processes(database_url: str, tmp_path: Path) -> Iterator[list[Process]]:
    """Two processes of one server, as behind a proxy that picks either."""
    first, second = free_port(), free_port()
    url = f"http://localhost:{first}"
    environment = {"MCP_OAUTH_DB": database_url, BASE_URL: url}
    made = [Process(serve, tmp_path / f"{port}.log", port, environment) for port in (first, second)]
    for process in made:
        process.start()
    yield made
    for process in made:
        process.kill()


async def enrolled(database: str, url: str, browser: Browser) -> tuple[Site, Authenticator]:
    """The site that the processes serve, and a device with a passkey of it."""
    provider = provider_on(database)
    link = await provider._store.write(create_link, "owner", "phone", url)
    await provider.aclose()
    wiki, device = Site(url, provider), Authenticator(url)
    answered = await add(browser, wiki, device, link.secret)
    assert answered.status_code == 303, answered.text
    return wiki, device


async def page_of(browser: Browser, url: str) -> httpx2.Response:
    """The page of a new request of an app."""
    redirect_uri = "http://127.0.0.1:9000/callback"
    form = {"redirect_uris": [redirect_uri], "token_endpoint_auth_method": "none"}
    client_id = (await browser.http.post(f"{url}/register", json=form)).json()["client_id"]
    query: dict[str, Any] = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": redirect_uri,
        "code_challenge": "x" * 43,
        "code_challenge_method": "S256",
    }
    return await browser.open(str(httpx2.URL(f"{url}/authorize", params=query)))


async def test_a_kill_between_challenge_and_answer(processes: list[Process], database_url: str) -> None:
    """On every database, the touch for a challenge of a process that was killed since is accepted by the next one."""
    server, url = processes[0], f"http://localhost:{processes[0].port}"
    async with Browser() as browser:
        _, device = await enrolled(database_url, url, browser)
        page = await page_of(browser, url)
        signed = device.sign((await ask(browser, page)).json())
        server.kill()
        server.start()
        answered = await send(browser, page, passkey=signed)
        assert answered.status_code == 303
        assert "code=" in answered.headers["location"]
        assert (await send(browser, page, passkey=signed)).status_code == 403


async def test_two_processes(processes: list[Process], database_url: str) -> None:
    """On every database, a challenge of one process is answered at the other; of fifty answers at both, one is good."""
    first, second = (process.port for process in processes)
    url = f"http://localhost:{first}"
    async with Browser() as browser:
        _, device = await enrolled(database_url, url, browser)
        for crowd in (1, 50):
            page = await page_of(browser, url)
            signed = device.sign((await ask(browser, page)).json())
            elsewhere = page.text.replace(f"localhost:{first}/consent", f"localhost:{second}/consent")
            other = httpx2.Response(200, text=elsewhere)
            places = [other if number % 2 == 0 else page for number in range(crowd)]
            answers = await asyncio.gather(*(send(browser, place, passkey=signed) for place in places))
            statuses = [answer.status_code for answer in answers]
            assert statuses.count(303) == 1
            assert set(statuses) <= {303, 403, 429}
