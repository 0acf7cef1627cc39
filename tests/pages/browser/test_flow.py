"""A user allows or denies a real client: `fastmcp.Client` opens the page in Chromium."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.auth import OAuth
from key_value.aio.stores.memory import MemoryStore
from playwright.async_api import Browser, Page, expect
from pydantic import AnyUrl

from tests.clocks import turned
from tests.pages.browser import PHONE, allow, boxes_in, press
from tests.scopes import wiki_on
from tests.sites import PASSWORD, Site
from tests.steps import query_of

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Using in-memory token storage"),
]
App = tuple[str, list[str]]


class InChromium(OAuth):
    """The client's own OAuth, with Chromium in place of `webbrowser`."""

    def __init__(self, page: Page, **options: Any) -> None:
        super().__init__(client_name="Claude", callback_timeout=30, token_storage=MemoryStore(), **options)
        self.page = page
        self.opened = asyncio.Event()

    async def redirect_handler(self, authorization_url: str) -> None:
        """Open the URL, and leave the rest to the user."""
        await self.page.goto(authorization_url)
        self.opened.set()


@asynccontextmanager
async def connecting(wiki: Site, page: Page) -> AsyncIterator["asyncio.Task[str]"]:
    """A client that calls a tool, and waits for the user at the page."""
    oauth = InChromium(page)

    async def call() -> str:
        async with Client(f"{wiki.url}/mcp", auth=oauth) as client:
            return str((await client.call_tool("whoami")).data)

    task = asyncio.create_task(call())
    await asyncio.wait_for(oauth.opened.wait(), 30)
    try:
        yield task
    finally:
        task.cancel()


class TestClient:
    """`fastmcp.Client`, from its first request to the tool call."""

    async def test_allow(self, wiki: Site, page: Page) -> None:
        """The owner sees the client, types the password and allows: the client calls its tool."""
        async with connecting(wiki, page) as call:
            await expect(page.get_by_role("heading", level=1)).to_have_text(
                f"Allow Claude to use {wiki.url.removeprefix('http://')}?"
            )
            await expect(page.get_by_text("An app on this computer is asking.")).to_be_visible()
            await allow(page)
            assert await asyncio.wait_for(call, 30) == "you are in"

    async def test_deny(self, wiki: Site, page: Page) -> None:
        """The client gets the denial, with its state and the issuer; no password is needed."""
        callbacks: list[str] = []
        page.on("request", lambda request: callbacks.append(request.url) if "/callback" in request.url else None)
        async with connecting(wiki, page) as call:
            await press(page, "Deny")
            with pytest.raises(Exception, match="Access was denied"):
                await asyncio.wait_for(call, 30)
        answer = query_of(callbacks[0])
        assert answer["error"] == "access_denied"
        assert answer["iss"] == f"{wiki.url}/"
        assert len(answer["state"]) > 20
        assert "code" not in answer

    async def test_wrong_then_right(self, wiki: Site, page: Page) -> None:
        """A wrong password is reported and gives no access; the right one, on the same page, does."""
        async with connecting(wiki, page) as call:
            await allow(page, "not the password")
            await expect(page.get_by_role("alert")).to_have_text("That password is wrong.")
            assert not call.done()
            await allow(page)
            assert await asyncio.wait_for(call, 30) == "you are in"


class TestReload:
    """What users do while a page waits for them."""

    async def test_reload(self, wiki: Site, page: Page, app: App) -> None:
        """A reload shows the same request, and it can still be answered."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        await page.reload()
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        assert query_of(app[1][0])["state"] == "the-state"

    async def test_reload_after_a_wrong_password(self, wiki: Site, page: Page, app: App) -> None:
        """A reload sends the wrong password again, which is refused again; then the right one is accepted."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        await allow(page, "wrong")
        await expect(page.get_by_role("alert")).to_be_visible()
        await page.reload()
        await expect(page.get_by_role("alert")).to_have_text("That password is wrong.")
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")

    async def test_back_after_the_code_was_used(self, wiki: Site, page: Page, app: App) -> None:
        """Going back to a used request shows that it is over, not a form."""
        url = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])])
        await page.goto(url)
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        await wiki.redeem(url, app[1][0])
        await page.go_back()
        await expect(page.get_by_role("heading", level=1)).to_have_text("This request is over")

    async def test_back_before_the_code_was_used(self, wiki: Site, page: Page, app: App) -> None:
        """Going back and allowing again gives a new code; the previous one is invalid."""
        url = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])])
        await page.goto(url)
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        await page.go_back()
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        first, second = (query_of(seen)["code"] for seen in app[1])
        assert first != second
        client = await wiki.provider.get_client(query_of(url)["client_id"])
        assert client is not None
        assert await wiki.provider.load_authorization_code(client, first) is None
        assert (await wiki.redeem(url, app[1][1])).access_token

    async def test_back_after_deny(self, wiki: Site, page: Page, app: App) -> None:
        """A denied request cannot be allowed later."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        await press(page, "Deny")
        await page.wait_for_url(f"{app[0]}?*")
        await page.go_back()
        await expect(page.get_by_role("heading", level=1)).to_have_text("This request is over")

    async def test_a_double_submit(self, wiki: Site, page: Page, app: App) -> None:
        """A double press of Allow brings the browser to the client with a code that works."""
        url = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])])
        await page.goto(url)
        await page.get_by_label("Password").fill(PASSWORD)
        await page.locator("form").hover()
        await page.get_by_role("button", name="Allow").dblclick()
        await page.wait_for_url(f"{app[0]}?*")
        assert (await wiki.redeem(url, page.url)).access_token

    async def test_two_tabs(self, wiki: Site, page: Page, app: App) -> None:
        """Two requests in two tabs of one browser are answered independently, in any order."""
        first = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])], state="first", client_name="First")
        second = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])], state="second", client_name="Second")
        other = await page.context.new_page()
        await page.goto(first)
        await other.goto(second)
        await expect(page.get_by_role("heading", level=1)).to_contain_text("First")
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        await press(other, "Deny")
        await other.wait_for_url(f"{app[0]}?*")
        assert query_of(page.url)["state"] == "first"
        assert (await wiki.redeem(first, page.url)).access_token
        assert query_of(other.url) | {"error": "access_denied", "state": "second"} == query_of(other.url)

    async def test_an_expired_request(self, wiki: Site, page: Page, app: App) -> None:
        """After ten minutes a request cannot be answered, and the page says what to do."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        with turned(601):
            await allow(page)
            await expect(page.get_by_role("heading", level=1)).to_have_text("This request is over")
            await expect(page.get_by_text("go back to your app and connect again")).to_be_visible()
        assert app[1] == []


class TestRedirect:
    """The response reaches the client anywhere: the content security policy does not block it."""

    @pytest.mark.parametrize(
        "redirect_uri",
        [
            "http://localhost:49152/callback",
            "https://client.example/callback",
            "cursor://anysphere.cursor-mcp/oauth/callback",
            "com.example.app:/callback",
        ],
    )
    async def test_chromium_follows_it(self, wiki: Site, page: Page, redirect_uri: str) -> None:
        """After Allow, Chromium navigates to the redirect URI with the code: another origin, or an app's scheme."""
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        url = await wiki.authorize_url(redirect_uris=[AnyUrl(redirect_uri)])
        await page.goto(url)
        async with page.expect_request(lambda request: request.url.startswith(f"{redirect_uri}?")) as navigation:
            await allow(page)
        request = await navigation.value
        assert request.is_navigation_request()
        assert "referer" not in await request.all_headers()
        assert (await wiki.redeem(url, request.url)).access_token
        assert not [text for text in said if "Content Security Policy" in text]


class TestWays:
    """Other ways to use a browser."""

    async def test_keyboard_only(self, wiki: Site, page: Page, app: App) -> None:
        """Tab and Enter are enough: password, Allow, Deny, in that order, with visible focus."""
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        seen = []
        for _ in range(3):
            await page.keyboard.press("Tab")
            focused = page.locator(":focus")
            seen.append(await focused.evaluate("one => one.name + (one.value && '=' + one.value)"))
            assert await focused.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
        assert seen == ["password", "answer=allow", "answer=deny"]
        await page.keyboard.press("Shift+Tab")
        await page.keyboard.press("Shift+Tab")
        await page.keyboard.type(PASSWORD)
        await page.keyboard.press("Enter")
        await page.wait_for_url(f"{app[0]}?*")
        assert "code" in query_of(app[1][0])

    async def test_boxes_by_keyboard(self, page: Page, app: App, tmp_path: Path) -> None:
        """Tab and Space are enough to untick, to unfold and to tick more; a required box is passed over."""
        async with wiki_on(tmp_path / "oauth.db", required_scopes=["read"]) as wiki:
            url = await wiki.authorize_url(asks="read write", redirect_uris=[AnyUrl(app[0])])
            await page.goto(url)
            seen = []
            for keys in (["Space"], ["Enter"], ["Space"], [], [], []):
                await page.keyboard.press("Tab")
                focused = page.locator(":focus")
                seen.append(await focused.evaluate("one => one.tagName + (one.value ? '=' + one.value : '')"))
                assert await focused.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
                for key in keys:
                    await page.keyboard.press(key)
            assert seen == ["INPUT=write", "SUMMARY", "INPUT=admin", "INPUT", "BUTTON=allow", "BUTTON=deny"]
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.type(PASSWORD)
            await page.keyboard.press("Enter")
            await page.wait_for_url(f"{app[0]}?*")
            assert (await wiki.redeem(url, app[1][0])).scope == "read admin"

    async def test_boxes_by_touch(self, chromium: Browser, app: App, tmp_path: Path) -> None:
        """On a phone a tap on the words of a scope unticks it."""
        context = await chromium.new_context(viewport=PHONE, is_mobile=True, has_touch=True)
        page = await context.new_page()
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            url = await wiki.authorize_url(asks="read write", redirect_uris=[AnyUrl(app[0])])
            await page.goto(url)
            await page.get_by_text("write", exact=True).tap()
            await page.get_by_label("Password").fill(PASSWORD)
            await page.get_by_role("button", name="Allow").tap()
            await page.wait_for_url(f"{app[0]}?*")
            assert (await wiki.redeem(url, app[1][0])).scope == "read"
        await context.close()

    async def test_boxes_without_javascript(self, chromium: Browser, app: App, tmp_path: Path) -> None:
        """What is unticked stays so through a wrong password, and the page says so if none is ticked."""
        context = await chromium.new_context(java_script_enabled=False)
        page = await context.new_page()
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            url = await wiki.authorize_url(asks="read write", redirect_uris=[AnyUrl(app[0])])
            await page.goto(url)
            for scope in ("read", "write"):
                await page.locator(f"[value={scope}]").uncheck()
            await allow(page)
            await expect(page.get_by_role("alert")).to_have_text("Choose at least one permission, or Deny.")
            await page.locator("[value=write]").check()
            await allow(page, "wrong")
            await expect(page.get_by_role("alert")).to_have_text("That password is wrong.")
            assert await boxes_in(page) == {"read": False, "write": True, "admin": False}
            await allow(page)
            await page.wait_for_url(f"{app[0]}?*")
            assert (await wiki.redeem(url, app[1][0])).scope == "write"
        await context.close()

    async def test_enter_in_the_password_allows(self, wiki: Site, page: Page) -> None:
        """Nothing has the focus at first: an Enter key held from the previous page allows nothing."""
        await page.goto(await wiki.authorize_url())
        await page.keyboard.press("Enter")
        await page.wait_for_timeout(200)
        await expect(page.get_by_role("button", name="Allow")).to_be_visible()
        assert await page.evaluate("document.activeElement === document.body")

    async def test_without_javascript(self, wiki: Site, chromium: Browser, app: App) -> None:
        """With JavaScript off everything works; the pages have none."""
        context = await chromium.new_context(java_script_enabled=False)
        page = await context.new_page()
        url = await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])])
        await page.goto(url)
        assert "<script" not in await page.content()
        await allow(page, "wrong")
        await expect(page.get_by_role("alert")).to_have_text("That password is wrong.")
        await allow(page)
        await page.wait_for_url(f"{app[0]}?*")
        assert (await wiki.redeem(url, app[1][0])).access_token
        await context.close()

    async def test_by_touch(self, wiki: Site, chromium: Browser, app: App) -> None:
        """On a phone one tap is enough: there is no mouse."""
        context = await chromium.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
        page = await context.new_page()
        await page.goto(await wiki.authorize_url(redirect_uris=[AnyUrl(app[0])]))
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Allow").tap()
        await page.wait_for_url(f"{app[0]}?*")
        assert "code" in query_of(app[1][0])
        await context.close()
