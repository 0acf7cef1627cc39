"""`OidcApproval` with a real OpenID Connect provider and its sign-in form, and in processes that are killed."""

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
import uvicorn
from fastmcp import Client, FastMCP
from fastmcp.server.dependencies import get_access_token
from fastmcp.utilities.tests import HeadlessOAuth

from oauth_store import OidcApproval, SQLAlchemyOAuthProvider
from oauth_store.pages.accounts import CALLBACK_PATH
from tests.openid import CLIENT_ID, CLIENT_SECRET, Browser, OpenIdProvider
from tests.processes import Process
from tests.serving import free_port
from tests.sites import Site, site
from tests.steps import authorization_request, query_of

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "oidc_approval.py"
PORT = free_port()
BASE_URL = f"http://127.0.0.1:{PORT}"
CALLBACK_URL = BASE_URL + CALLBACK_PATH


@pytest.fixture(scope="module")
def upstream() -> Iterator[OpenIdProvider]:
    """A provider that knows our server."""
    with OpenIdProvider(CALLBACK_URL) as provider:
        yield provider


@pytest.fixture
async def browser(upstream: OpenIdProvider) -> AsyncIterator[Browser]:
    """The browser of the owner."""
    async with Browser(BASE_URL, upstream.issuer) as browser:
        yield browser


@asynccontextmanager
async def wiki(upstream: OpenIdProvider, tmp_path: Path, *allow: str, issuer: str = "") -> AsyncIterator[Site]:
    """A wiki whose owner has an account at the provider."""
    approval = OidcApproval(
        issuer=issuer or upstream.issuer,
        client_id=CLIENT_ID,
        client_secret=CLIENT_SECRET,
        allow=allow or ("grace@example.com", "ada@example.com"),
        provider_name="Acme",
    )

    def tools(mcp: FastMCP[None]) -> None:
        @mcp.tool
        def subject() -> str | None:
            token = get_access_token()
            return token.subject if token else None

    async with site(tmp_path / "oauth.db", approval=approval, port=PORT, tools=tools) as served:
        yield served


async def at_the_provider(browser: Browser, url: str) -> httpx2.Response:
    """Open a request, press the button, and return the sign-in form of the provider."""
    return await browser.send(await browser.open(url), {"account": "leave"})


def is_question(page: httpx2.Response) -> bool:
    """Whether a page is the one that asks for Allow or Deny."""
    return page.status_code == 200 and 'value="allow"' in page.text


@pytest.mark.filterwarnings("ignore:Using in-memory token storage")
@pytest.mark.parametrize(
    ("allow", "subject"),
    [((), "ada@example.com"), (("sub:ada",), "sub:ada"), (("group:wheel", "group:family"), "sub:ada")],
    ids=["by email", "by subject", "by group"],
)
async def test_a_client_gets_in(
    upstream: OpenIdProvider, tmp_path: Path, browser: Browser, allow: tuple[str, ...], subject: str
) -> None:
    """From `fastmcp.Client` through the provider's form and our question to a tool call, with the owner's name."""

    class OwnersOAuth(HeadlessOAuth):
        async def redirect_handler(self, authorization_url: str) -> None:
            question = await browser.sign_in(await at_the_provider(browser, authorization_url), "ada")
            assert is_question(question), question.text
            answer = await browser.send(question, {"answer": "allow"})
            assert answer.status_code == 303
            answer.status_code = 302  # the only redirect that HeadlessOAuth knows
            self._stored_response = answer  # type: ignore[assignment]  # it is declared as None

    async with wiki(upstream, tmp_path, *allow) as served:
        url = f"{served.url}/mcp"
        async with Client(url, auth=OwnersOAuth(url)) as client:
            assert (await client.call_tool("subject")).data == subject


@pytest.mark.parametrize("name", ["mallory", "imposter"])
async def test_others(upstream: OpenIdProvider, tmp_path: Path, browser: Browser, name: str) -> None:
    """A stranger, or somebody with the owner's address unverified, gets a page, and can answer nothing."""
    async with wiki(upstream, tmp_path) as served:
        url = await served.authorize_url()
        refused = await browser.sign_in(await at_the_provider(browser, url), name)
        assert refused.status_code == 403
        assert f"as sub:{name}" in refused.text
        again = re.search(r'href="([^"]*)">Go back', refused.text)
        assert again is not None
        assert not is_question(await browser.open(again[1]))


async def test_an_address_is_no_subject(upstream: OpenIdProvider, tmp_path: Path, browser: Browser) -> None:
    """Where users choose their own `sub`, one that is spelled like the owner's address is refused."""
    async with wiki(upstream, tmp_path) as served:
        form = await at_the_provider(browser, await served.authorize_url())
        assert (await browser.sign_in(form, "ada@example.com")).status_code == 403


async def test_a_canceled_sign_in(upstream: OpenIdProvider, tmp_path: Path, browser: Browser) -> None:
    """Where the provider says no, a page says so, and leads back to the request."""
    async with wiki(upstream, tmp_path) as served:
        form = await at_the_provider(browser, await served.authorize_url())
        cancel = re.search(r'href="([^"]*/abort)"', form.text)
        assert cancel is not None, form.text
        page = await browser.open(cancel[1])
        assert (page.status_code, "The sign-in was canceled." in page.text) == (403, True)
        again = re.search(r'href="([^"]*)">Go back', page.text)
        assert again is not None
        assert is_question(await browser.sign_in(await at_the_provider(browser, again[1]), "ada"))


async def test_an_outage(upstream: OpenIdProvider, tmp_path: Path, browser: Browser) -> None:
    """Where the provider is away, before the sign-in or after it, there is a page; later, all goes on."""
    async with wiki(upstream, tmp_path) as served:
        url = await served.authorize_url()
        page = await browser.open(url)
        upstream.stop()
        try:
            away = await browser.send(page, {"account": "leave"})
        finally:
            upstream.start()
        assert (away.status_code, "Acme cannot sign you in right now" in away.text) == (502, True)
        sent = await browser.sign_in(await browser.send(page, {"account": "leave"}), "ada", stop_before=CALLBACK_URL)
        upstream.stop()
        try:
            late = await browser.open(sent.headers["location"])
        finally:
            upstream.start()
        assert late.status_code == 502
        assert is_question(await browser.sign_in(await browser.send(page, {"account": "leave"}), "ada"))


async def test_another_spelling_of_the_issuer(
    upstream: OpenIdProvider, tmp_path: Path, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    """An issuer that the provider does not call itself lets nobody in, and the log says how it does."""
    async with wiki(upstream, tmp_path, issuer=f"{upstream.issuer}/") as served:
        page = await browser.open(await served.authorize_url())
        assert (await browser.send(page, {"account": "leave"})).status_code == 502
    assert f"the issuer is set to '{upstream.issuer}/', which calls itself '{upstream.issuer}'" in caplog.text


def serve() -> None:
    """A server that is set up by its environment alone, in a process of its own."""
    provider = SQLAlchemyOAuthProvider(base_url=os.environ["TEST_BASE_URL"])
    app = FastMCP("wiki", auth=provider).http_app(stateless_http=True)
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["TEST_PORT"]), log_level="warning", ws="none")


async def test_killed_at_every_step(
    upstream: OpenIdProvider, database_url: str, tmp_path: Path, browser: Browser
) -> None:
    """On every database, each step of a sign-in finds another process than the one before, which was killed."""
    settings = {
        "MCP_OAUTH_OIDC_ISSUER": upstream.issuer,
        "MCP_OAUTH_OIDC_CLIENT_ID": CLIENT_ID,
        "MCP_OAUTH_OIDC_CLIENT_SECRET": CLIENT_SECRET,
        "MCP_OAUTH_OIDC_ALLOW": "bob@example.com, ada@example.com",
        "MCP_OAUTH_DB": database_url,
        "TEST_BASE_URL": BASE_URL,
    }
    process = Process(serve, tmp_path / "server.log", PORT, settings)
    process.start()
    try:
        async with httpx2.AsyncClient(base_url=BASE_URL) as http:
            metadata = {"redirect_uris": ["http://127.0.0.1:9/callback"], "token_endpoint_auth_method": "none"}
            client = (await http.post("/register", json=metadata)).json()
        asked = authorization_request(client["client_id"], redirect_uri="http://127.0.0.1:9/callback")
        url = f"{BASE_URL}/authorize?{urlencode(asked)}"
        page = await browser.open(url)
        process.restart()
        form = await browser.send(page, {"account": "leave"})
        process.restart()
        question = await browser.sign_in(form, "ada")
        assert is_question(question), question.text
        process.restart()
        answer = await browser.send(question, {"answer": "allow", "stay": "30d"})
        assert "code" in query_of(answer.headers["location"])
        process.restart()
        assert is_question(await browser.open(url))
    finally:
        process.kill()


def test_the_example_without_settings(tmp_path: Path) -> None:
    """What is missing is the last line of the error, and an exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCP_")}
    command: list[Any] = [sys.executable, EXAMPLE]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "ConfigurationError: OidcApproval() has no issuer; pass it, or set MCP_OAUTH_OIDC_ISSUER" in done.stderr
