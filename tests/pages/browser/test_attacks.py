"""What a hostile page or link can do to the owner's browser: nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any

import pytest
from fastmcp import FastMCP
from playwright.async_api import Browser, Page, expect
from pydantic import AnyUrl
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from oauth_store import SQLAlchemyOAuthProvider
from tests.pages.browser import allow
from tests.serving import free_port, self_signed, serving
from tests.sites import PASSWORD, Site, site
from tests.steps import query_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
App = tuple[str, list[str]]


@asynccontextmanager
async def evil_page(html: str) -> AsyncIterator[str]:
    """Serve a page with this content on every name of this machine, and yield its port."""

    async def show(_request: Request) -> HTMLResponse:
        return HTMLResponse(f"<!doctype html><title>evil</title>{html}")

    async with serving(Starlette(routes=[Route("/", show)]), free_port()) as url:
        yield url.rpartition(":")[2]


CROSS_SITE = pytest.param("evil.example", id="another-site")
SAME_SITE = pytest.param("127.0.0.1", id="another-port")
"""Another origin that gets the same cookies, because browsers ignore the port."""
everywhere = pytest.mark.parametrize("host", [CROSS_SITE, SAME_SITE])


class TestFrames:
    """A page that frames ours, so that the owner clicks on something invisible."""

    @everywhere
    async def test_the_pages_are_in_no_frame(self, wiki: Site, page: Page, host: str) -> None:
        """Neither the consent page nor the connected apps load in a frame of another page."""
        await page.goto(await wiki.authorize_url())
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        frames = "".join(f'<iframe src="{escape(url)}"></iframe>' for url in (page.url, f"{wiki.url}/apps"))
        async with evil_page(frames) as port:
            await page.goto(f"http://{host}:{port}/")
            await page.wait_for_timeout(300)
            for frame in page.frames[1:]:
                assert "password" not in await frame.content()
            assert len([text for text in said if "frame-ancestors" in text]) == 2


class TestForeignForms:
    """A page that sends our forms from the owner's browser."""

    @everywhere
    async def test_an_answer_from_another_page(self, wiki: Site, page: Page, app: App, host: str) -> None:
        """A foreign page that knows the handle, and even the password, cannot allow; nor can it deny."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        ours = page.url
        for answer in ("allow", "deny"):
            form = (
                f'<form method="post" action="{escape(ours)}"><input name="answer" value="{answer}">'
                f'<input name="password" value="{PASSWORD}"><input name="csrf" value=""><button>win</button></form>'
            )
            async with evil_page(form) as port:
                await page.goto(f"http://{host}:{port}/")
                async with page.expect_response(ours) as answered:
                    await page.get_by_role("button").click()
                assert (await answered.value).status == 403
                await expect(page.get_by_role("heading", level=1)).to_be_visible()  # there
        assert app[1] == []
        await page.goto(ours)  # the request is as it was
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")

    async def test_a_stolen_token_of_the_form(self, wiki: Site, page: Page, app: App) -> None:
        """Even with the form's token, an answer from another origin is refused: the browser sends its origin."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        ours, csrf = page.url, await page.locator("[name=csrf]").get_attribute("value")
        form = (
            f'<form method="post" action="{escape(ours)}"><input name="answer" value="allow">'
            f'<input name="password" value="{PASSWORD}"><input name="csrf" value="{csrf}"><button>win</button></form>'
        )
        async with evil_page(form) as port:
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.get_by_role("button").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("This form was not sent from our page")
        assert app[1] == []

    @everywhere
    async def test_revoking_from_another_page(self, wiki: Site, page: Page, host: str) -> None:
        """While the owner is signed in to the connected apps, a foreign page can neither revoke nor sign out."""
        token = await wiki.connect()
        await page.goto(f"{wiki.url}/apps")
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
        for field in ('name="revoke" value="all"', 'name="sign_out" value="yes"'):
            form = f'<form method="post" action="{wiki.url}/apps"><input {field}><button>win</button></form>'
            async with evil_page(form) as port:
                await page.goto(f"http://{host}:{port}/")
                await page.get_by_role("button").click()
                await expect(page.get_by_role("heading", level=1)).to_be_visible()
                assert page.url == f"{wiki.url}/apps"
        assert await wiki.provider.load_access_token(token.access_token) is not None
        await page.goto(f"{wiki.url}/apps")
        await expect(page.get_by_role("button", name="Revoke", exact=True)).to_have_count(1)

    @everywhere
    async def test_reading_the_page(self, wiki: Site, page: Page, host: str) -> None:
        """A script of another page cannot read ours, with or without cookies."""
        await page.goto(await wiki.authorize_url())
        ours = page.url
        async with evil_page("") as port:
            await page.goto(f"http://{host}:{port}/")
            for credentials in ("include", "omit"):
                read = f"fetch({ours!r}, {{credentials: {credentials!r}}}).then(() => 'read', () => 'refused')"
                assert await page.evaluate(read) == "refused"


class TestLinks:
    """A link that an attacker sends to the owner."""

    async def test_a_link_to_a_page_that_another_browser_started(
        self, wiki: Site, page: Page, chromium: Browser, app: App
    ) -> None:
        """An attacker who sends the owner the page of their own request gets nothing: it is another browser's."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        owner = await chromium.new_context()
        tab = await owner.new_page()
        await tab.goto(page.url)
        await expect(tab.get_by_role("heading", level=1)).to_have_text("This page belongs to another browser")
        assert await tab.get_by_role("button").count() == 0
        await owner.close()

    async def test_a_second_click_that_was_meant_for_another_page(self, wiki: Site, page: Page, app: App) -> None:
        """A page that covers ours, and closes between the clicks of a double click, gets no click into Allow.

        The password manager has filled in the password: one click would be all that is missing.
        """
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        button = await page.get_by_role("button", name="Allow").bounding_box()
        assert button is not None
        await page.get_by_label("Password").fill(PASSWORD)
        clock = await page.context.new_cdp_session(page)
        await clock.send("Animation.enable")
        await clock.send("Animation.setPlaybackRate", {"playbackRate": 0.05})  # half a second takes ten
        posts: list[str] = []
        page.on("request", lambda request: posts.append(request.method))
        await page.mouse.click(button["x"] + 20, button["y"] + 20)  # the mouse comes from elsewhere
        await page.mouse.click(button["x"] + 20, button["y"] + 20)
        await page.wait_for_timeout(300)
        assert posts == []
        await clock.send("Animation.setPlaybackRate", {"playbackRate": 1})
        covered = "getComputedStyle(document.querySelector('.rested'), '::after').visibility == 'visible'"
        while await page.evaluate(covered):
            await page.wait_for_timeout(20)
        await page.mouse.click(button["x"] + 20, button["y"] + 20)
        await page.wait_for_url(f"{app[0]}?*")

    @pytest.mark.parametrize(
        ("name", "heading"),
        [
            ("<script>alert(1)</script>", "<script>alert(1)</script>"),
            ("Claude” is verified. “", "Claude” is verified. “"),
            ("\u202eeduaLC\u202c\u200b\u2066", "eduaLC"),
            ("שלום", "שלום"),
            ("C\u0336\u0336\u0336\u0336\u0336laude", "C\u0336\u0336laude"),
            ("\u3164\u2800\u200b", "an app without a name"),
            ("Claude\n\n\nVerified", "Claude Verified"),
        ],
    )
    async def test_a_name_that_lies(self, wiki: Site, page: Page, name: str, heading: str) -> None:
        """A name is plain text in a box, without invisible or direction-changing characters."""
        alerts: list[str] = []
        page.on("dialog", lambda dialog: alerts.append(dialog.message))
        await page.goto(await wiki.authorize_url(client_name=name))
        server = wiki.url.removeprefix("http://")
        await expect(page.get_by_role("heading", level=1)).to_have_text(f"Allow {heading} to use {server}?")
        await expect(page.get_by_text("It is not verified.")).to_be_visible()
        assert await page.locator("h1 bdi.name").count() == 1
        assert alerts == []


class TestSecureCookies:
    """A server on https with a certificate, in a browser."""

    async def test_the_cookies_belong_to_this_host_alone(self, chromium: Browser, tmp_path: Path, app: App) -> None:
        """Each cookie is __Host-, Secure, HttpOnly and SameSite, and the whole flow works."""
        port, certificate = free_port(), tmp_path / "certificate.pem"
        certificate.write_bytes(self_signed("wiki.example"))
        async with site(
            tmp_path / "oauth.db", base_url=f"https://wiki.example:{port}", port=port, certificate=certificate
        ) as wiki:
            context = await chromium.new_context(ignore_https_errors=True)
            page = await context.new_page()
            await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
            await allow(page)
            await page.wait_for_url(f"{app[0]}?code=*")
            await page.goto(f"{wiki.url}/apps")
            await page.get_by_label("Password").fill(PASSWORD)
            await page.get_by_role("button", name="Sign in").click()
            await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
            cookies: dict[str, Any] = {cookie["name"].rpartition("_")[0]: cookie for cookie in await context.cookies()}
            assert all(cookie["secure"] and cookie["httpOnly"] and cookie["path"] == "/" for cookie in cookies.values())
            same_site = {name: cookie["sameSite"] for name, cookie in cookies.items()}
            request = next(name for name in same_site if name not in ("__Host-oauth_store_known", SESSION))
            assert same_site == {"__Host-oauth_store_known": "Lax", SESSION: "Strict", request: "Lax"}
            assert request.startswith("__Host-oauth_store_")
            await context.close()


SESSION = "__Host-oauth_store_session"


class TestLoopback:
    """The default on loopback, which asks no one: a browser on the owner's machine gives no access."""

    async def authorize(self, page: Page, host: str, redirect_uri: str) -> dict[str, str]:
        """Register a client, navigate to /authorize on this host, and return the redirect's parameters."""
        port = free_port()
        async with SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}") as provider:
            mcp: FastMCP[None] = FastMCP("test", auth=provider)
            async with serving(mcp.http_app(stateless_http=True), port) as url:
                wiki = Site(url, provider)
                link = await wiki.authorize_url(redirect_uris=[AnyUrl(redirect_uri)])
                async with page.expect_request(lambda request: request.url.startswith(redirect_uri)) as redirected:
                    with_host = link.replace("127.0.0.1", host, 1)
                    navigation = asyncio.ensure_future(page.goto(with_host))
                    answer = query_of((await redirected.value).url)
                await asyncio.gather(navigation, return_exceptions=True)  # nobody listens there
                return answer

    async def test_the_machine_itself(self, page: Page) -> None:
        """A client on this machine gets its code."""
        assert "code" in await self.authorize(page, "127.0.0.1", "http://127.0.0.1:9000/callback")

    async def test_the_world(self, page: Page) -> None:
        """A tunnel or a rebound name that leads here gets access_denied."""
        answer = await self.authorize(page, "tunnel.example", "http://127.0.0.1:9000/callback")
        assert answer["error"] == "access_denied"

    async def test_a_page_of_the_world(self, page: Page) -> None:
        """A page that registers its own address gets nothing: the browser stays here and shows the reason."""
        port = free_port()
        async with SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}") as provider:
            mcp: FastMCP[None] = FastMCP("test", auth=provider)
            async with serving(mcp.http_app(stateless_http=True), port) as url:
                redirect_uri = AnyUrl("https://evil.example/callback")
                await page.goto(await Site(url, provider).authorize_url(redirect_uris=[redirect_uri]))
                assert page.url.startswith(url)
                await expect(page.get_by_role("heading", level=1)).to_have_text("This request cannot be processed")
                await expect(page.get_by_text("lets in clients on its own machine only")).to_be_visible()
