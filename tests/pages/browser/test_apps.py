"""The connected apps in a browser: they are listed, and revoked at once."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import Client
from playwright.async_api import Browser, Page, expect

from tests.clocks import turned
from tests.pages.browser import boxes_in, sign_in
from tests.scopes import wiki_on
from tests.sites import PASSWORD, Site

pytestmark = pytest.mark.asyncio(loop_scope="session")
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


async def call(wiki: Site, access_token: str) -> int:
    """Call the server as a client with this token, and return the status."""
    headers = {"Authorization": f"Bearer {access_token}", "Accept": "application/json, text/event-stream"}
    async with httpx2.AsyncClient(timeout=60) as http:
        return (await http.post(f"{wiki.url}/mcp", json=INITIALIZE, headers=headers)).status_code


def revoke_of(page: Page, name: str) -> Any:
    """Return the Revoke button of an app."""
    return (
        page.get_by_role("listitem")
        .filter(has=page.get_by_role("heading", name=name))
        .get_by_role("button", name="Revoke")
    )


async def test_the_list_is_behind_the_password(wiki: Site, page: Page) -> None:
    """Without the password, no app is shown; a wrong password is reported."""
    await wiki.connect(client_name="Claude")
    await sign_in(wiki, page, "wrong")
    await expect(page.get_by_role("alert")).to_have_text("That password is wrong.")
    await expect(page.get_by_text("Claude")).to_have_count(0)
    await sign_in(wiki, page)
    await expect(page.get_by_role("heading", level=2)).to_have_text("Claude")


async def test_what_is_listed(wiki: Site, page: Page) -> None:
    """Each grant shows the app's name, address, scopes, age and last use."""
    await wiki.connect(client_name="Claude", redirect_uris=["https://claude.ai/cb"], scope="read")
    await sign_in(wiki, page)
    listed = dict(
        zip(
            await page.locator("dt").all_inner_texts(),
            await page.locator("dd").all_inner_texts(),
            strict=True,
        )
    )
    assert list(listed) == ["Address", "Can", "Since", "Last used"]
    assert (listed["Address"], listed["Can"]) == ("claude.ai", "read")
    assert listed["Last used"].startswith(listed["Since"])


async def test_revoking_one(wiki: Site, page: Page) -> None:
    """The next call of a revoked app is a 401; the others keep working."""
    one = await wiki.connect(client_name="One")
    other = await wiki.connect(client_name="Other")
    assert (await call(wiki, one.access_token), await call(wiki, other.access_token)) == (200, 200)
    await sign_in(wiki, page)
    await revoke_of(page, "One").click()
    await expect(page.get_by_role("status")).to_have_text("One no longer has access.")
    assert (await call(wiki, one.access_token), await call(wiki, other.access_token)) == (401, 200)
    await expect(page.get_by_role("heading", level=2)).to_have_text(["Other"])


async def test_two_devices_of_one_app(wiki: Site, page: Page) -> None:
    """Each grant is revoked separately, even if two devices share a registration."""
    await wiki.connect(client_id="shared", client_name="App")
    second = await wiki.connect(client_id="shared", client_name="App")
    await sign_in(wiki, page)
    await expect(page.get_by_role("button", name="Revoke", exact=True)).to_have_count(2)
    await page.get_by_role("button", name="Revoke", exact=True).first.click()
    await expect(page.get_by_role("button", name="Revoke", exact=True)).to_have_count(1)
    await page.get_by_role("button", name="Revoke", exact=True).click()
    await expect(page.get_by_text("No app can use")).to_be_visible()
    assert await call(wiki, second.access_token) == 401


async def test_revoking_all(wiki: Site, page: Page) -> None:
    """Revoke all asks for confirmation, and then ends every app's access at once."""
    tokens = [await wiki.connect(client_name=f"App {number}") for number in range(3)]
    await sign_in(wiki, page)
    await expect(page.get_by_role("button", name="Yes, revoke all")).to_be_hidden()
    await page.get_by_text("Revoke all", exact=True).click()
    await page.locator("#password-revoke").fill(PASSWORD)
    await page.get_by_role("button", name="Yes, revoke all").click()
    await expect(page.get_by_role("status")).to_have_text("3 apps no longer have access.")
    assert [await call(wiki, token.access_token) for token in tokens] == [401, 401, 401]
    await expect(page.get_by_text("No app can use")).to_be_visible()


async def test_revoking_twice(wiki: Site, page: Page) -> None:
    """If another tab has revoked a grant, the page says so; reloading the response is harmless."""
    await wiki.connect(client_name="One")
    await sign_in(wiki, page)
    other = await page.context.new_page()
    await other.goto(f"{wiki.url}/apps")
    await page.get_by_role("button", name="Revoke", exact=True).click()
    await expect(page.get_by_role("status")).to_be_visible()
    await other.get_by_role("button", name="Revoke", exact=True).click()
    await expect(other.get_by_role("status")).to_have_text("It was already revoked.")
    await page.reload()
    await expect(page.get_by_role("status")).to_have_text("It was already revoked.")


async def test_signing_out(wiki: Site, page: Page) -> None:
    """After Sign out, the list needs the password again, even with the back button or copied cookies."""
    await wiki.connect(client_name="Claude")
    await sign_in(wiki, page)
    cookies = await page.context.cookies()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Password")).to_be_visible()
    await page.go_back()
    await expect(page.get_by_text("Claude")).to_have_count(0)
    await page.context.add_cookies(cookies)  # type: ignore[arg-type]  # what it gave
    await page.goto(f"{wiki.url}/apps")
    await expect(page.get_by_text("Claude")).to_have_count(0)


async def test_the_session_ends_after_fifteen_minutes(wiki: Site, page: Page) -> None:
    """Until then the owner is signed in; after that, a button reports the sign-out and does nothing."""
    token = await wiki.connect(client_name="Claude")
    await sign_in(wiki, page)
    with turned(14 * 60):
        await page.reload()
        await expect(page.get_by_role("heading", level=2)).to_have_text("Claude")
    with turned(15 * 60 + 1):
        await page.get_by_role("button", name="Revoke", exact=True).click()
        await expect(page.get_by_role("alert")).to_have_text("You were signed out. Sign in again.")
        assert await call(wiki, token.access_token) == 200
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("heading", level=2)).to_have_text("Claude")


async def test_a_session_is_of_one_browser(wiki: Site, page: Page, chromium: Browser) -> None:
    """Another browser has to sign in too."""
    await sign_in(wiki, page)
    other = await chromium.new_context()
    tab = await other.new_page()
    await tab.goto(f"{wiki.url}/apps")
    await expect(tab.get_by_label("Password")).to_be_visible()
    await other.close()


async def test_without_javascript(wiki: Site, chromium: Browser) -> None:
    """With JavaScript off, signing in, revoking one, revoking all and signing out work."""
    tokens = [await wiki.connect(client_name=f"App {number}") for number in range(2)]
    context = await chromium.new_context(java_script_enabled=False)
    page = await context.new_page()
    await sign_in(wiki, page)
    await revoke_of(page, "App 0").click()
    await expect(page.get_by_role("status")).to_have_text("App 0 no longer has access.")
    await page.get_by_text("Revoke all", exact=True).click()
    await page.locator("#password-revoke").fill(PASSWORD)
    await page.get_by_role("button", name="Yes, revoke all").click()
    await expect(page.get_by_text("No app can use")).to_be_visible()
    assert [await call(wiki, token.access_token) for token in tokens] == [401, 401]
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Password")).to_be_visible()
    await context.close()


async def test_by_keyboard(wiki: Site, page: Page) -> None:
    """Tab, Enter and Space are enough to sign in and to revoke; the focus shows."""
    token = await wiki.connect(client_name="Claude")
    await page.goto(f"{wiki.url}/apps")
    await page.keyboard.press("Tab")
    await page.keyboard.type(PASSWORD)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=2)).to_be_visible()
    seen = []
    for _ in range(4):
        await page.keyboard.press("Tab")
        focused = page.locator(":focus")
        seen.append(await focused.inner_text())
        assert await focused.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    assert seen == ["Revoke all", "New token", "Sign out", "Revoke"]
    await page.keyboard.press("Space")
    await expect(page.get_by_role("status")).to_be_visible()
    assert await call(wiki, token.access_token) == 401


async def test_a_connected_client_sees_a_tool_come_and_go(page: Page, tmp_path: Path) -> None:
    """From the very next call after each click on Save, in a client that never reconnects and never refreshes."""
    async with wiki_on(tmp_path / "oauth.db") as wiki:
        token = await wiki.connect(asks="read", client_name="Claude")
        other = await wiki.connect(asks="read", client_name="Cursor")
        await sign_in(wiki, page)
        async with (
            Client(f"{wiki.url}/mcp", auth=token.access_token) as client,
            Client(f"{wiki.url}/mcp", auth=other.access_token) as bystander,
        ):
            for click in range(1, 11):
                await client.list_tools()  # so that the token is remembered
                app = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="Claude"))
                await app.get_by_text("Change what it can do").click()
                write = app.locator("[value=write]")
                if not await write.is_visible():
                    await app.get_by_text("Allow more").click()
                await write.set_checked(click % 2 == 1)
                await app.get_by_role("button", name="Save").click()
                await expect(page.get_by_role("status")).to_have_text(
                    "Claude can do what you chose, from its next call on."
                )
                tools = {tool.name for tool in await client.list_tools()}
                assert tools == {"whoami", "read_page", *(["edit_page"] if click % 2 else [])}
                assert (await boxes_in(app))["write"] == (click % 2 == 1)
            assert {tool.name for tool in await bystander.list_tools()} == {"whoami", "read_page"}


async def test_a_token_by_keyboard(page: Page, tmp_path: Path) -> None:
    """Tab, Space and Enter are enough to make a personal token."""
    async with wiki_on(tmp_path / "oauth.db") as wiki:
        await sign_in(wiki, page)
        await page.get_by_text("New token").focus()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await page.keyboard.type("n8n")
        for key in ("Tab", "Space", "Tab", "Tab", "Tab", "Tab"):  # three boxes, the expiry, the password
            await page.keyboard.press(key)
        await page.keyboard.type(PASSWORD)
        for key in ("Tab", "Enter"):
            await page.keyboard.press(key)
        text = await page.locator("code.secret").inner_text()
        await expect(page.get_by_role("heading", name="n8n")).to_be_visible()
        verified = await wiki.provider.verify_token(text)
        assert verified is not None
        assert verified.scopes == ["read"]


async def test_save_by_keyboard(page: Page, tmp_path: Path) -> None:
    """Tab, Enter and Space are enough to unfold, tick and save; what was ticked and not saved changes nothing."""
    async with wiki_on(tmp_path / "oauth.db") as wiki:
        token = await wiki.connect(asks="read write", client_name="Claude")
        await sign_in(wiki, page)
        await page.get_by_text("Change what it can do").focus()
        for key in ("Enter", "Tab", "Tab", "Space"):  # the boxes are read, write, and a fold with admin
            await page.keyboard.press(key)
        assert await boxes_in(page) == {"read": True, "write": False, "admin": False}
        verified = await wiki.provider.verify_token(token.access_token)
        assert verified is not None
        assert verified.scopes == ["read", "write"]
        for key in ("Tab", "Enter", "Tab", "Space", "Tab", "Enter"):
            assert await page.locator(":focus").evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
            await page.keyboard.press(key)
        await expect(page.get_by_role("status")).to_be_visible()
        verified = await wiki.provider.verify_token(token.access_token)
        assert verified is not None
        assert verified.scopes == ["read", "admin"]
