"""Passkeys in a real browser, with a virtual authenticator: enroll, allow an app with one touch, sign in, confirm."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, CDPSession, Page, expect

from tests.clocks import turned
from tests.pages.browser import press, sign_in
from tests.passkeys import link_of, passkey_site, passkeys_of, remove_passkey
from tests.scopes import wiki_on
from tests.serving import free_port
from tests.sites import PASSWORD, USERS, Site

pytestmark = pytest.mark.asyncio(loop_scope="session")
DEVICE = {
    "protocol": "ctap2",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserVerified": True,
    "automaticPresenceSimulation": True,
}


class Device:
    """The authenticators of a page's browser."""

    def __init__(self, cdp: CDPSession) -> None:
        self._cdp = cdp
        self.id = ""

    async def insert(self, **options: Any) -> str:
        """Plug in another authenticator, and return its id."""
        added = await self._cdp.send("WebAuthn.addVirtualAuthenticator", {"options": {**DEVICE, **options}})
        self.id = added["authenticatorId"]
        return self.id

    async def remove(self) -> None:
        """Unplug the authenticator that was plugged in last."""
        await self._cdp.send("WebAuthn.removeVirtualAuthenticator", {"authenticatorId": self.id})

    async def set(self, method: str, **values: Any) -> None:
        """Change the authenticator."""
        await self._cdp.send(f"WebAuthn.{method}", {"authenticatorId": self.id, **values})

    async def credentials(self) -> list[dict[str, Any]]:
        """The passkeys on it."""
        return list((await self._cdp.send("WebAuthn.getCredentials", {"authenticatorId": self.id}))["credentials"])


@pytest_asyncio.fixture(loop_scope="session")
async def device(page: Page) -> Device:
    """An authenticator in the page's browser, whose user is there and is verified."""
    cdp = await page.context.new_cdp_session(page)
    await cdp.send("WebAuthn.enable")
    device = Device(cdp)
    await device.insert()
    return device


@pytest_asyncio.fixture(loop_scope="session")
async def wiki(tmp_path: Path) -> AsyncIterator[Site]:
    """A server at http://localhost that asks for a password."""
    async with passkey_site(tmp_path / "oauth.db") as served:
        yield served


async def enroll(wiki: Site, page: Page, name: str = "My phone", user: str = "owner") -> None:
    """Open a link that adds a passkey, and add it."""
    await page.goto(await link_of(wiki, user=user, name=name))
    await press(page, "Add a passkey")
    await expect(page.get_by_role("heading", name="Your passkey was added")).to_be_visible()


async def asked(wiki: Site, app: tuple[str, list[str]], **metadata: Any) -> str:
    """The link of an app that asks for access."""
    return await wiki.authorize_url(redirect_uris=[app[0]], **metadata)


async def test_enroll_then_allow_with_one_touch(
    wiki: Site, page: Page, device: Device, app: tuple[str, list[str]]
) -> None:
    """A link adds a passkey; one touch signs in and allows the app, without a name or a password."""
    await enroll(wiki, page)
    [passkey] = await passkeys_of(wiki)
    [credential] = await device.credentials()
    assert (passkey.user, passkey.name, credential["rpId"]) == ("owner", "My phone", "localhost")
    assert credential["isResidentCredential"]
    url = await asked(wiki, app)
    await page.goto(url)
    await press(page, "Allow with a passkey")
    await expect(page.get_by_text("back in the app")).to_be_visible()
    token = await wiki.redeem(url, app[1][-1])
    verified = await wiki.provider.verify_token(token.access_token)
    assert verified is not None
    assert verified.subject == "owner"


async def test_only_where_a_passkey_can_be_used(wiki: Site, page: Page, device: Device) -> None:
    """Without a passkey on the server, its pages have no button for one and no script."""
    for url in (await wiki.authorize_url(), f"{wiki.url}/apps"):
        answered = await page.goto(url)
        assert answered is not None
        assert "script-src" not in answered.headers["content-security-policy"]
        assert await page.locator("script").count() == 0
        await expect(page.get_by_role("button", name="passkey")).to_have_count(0)
    await enroll(wiki, page)
    await page.goto(f"{wiki.url}/apps")
    await expect(page.get_by_role("button", name="Sign in with a passkey")).to_be_visible()


async def test_apps(wiki: Site, page: Page, device: Device) -> None:
    """A passkey signs in on the page of apps, and confirms Revoke all and New token."""
    await wiki.connect(client_name="Claude")
    await enroll(wiki, page)
    await page.goto(f"{wiki.url}/apps")
    await press(page, "Sign in with a passkey")
    await expect(page.get_by_role("heading", name="Claude")).to_be_visible()
    await page.get_by_text("New token").click()
    await page.get_by_label("Name").fill("n8n")
    await press(page, "Create token with a passkey")
    text = await page.locator("code.secret").inner_text()
    assert await wiki.provider.verify_token(text) is not None
    await page.get_by_text("Revoke all", exact=True).click()
    await press(page, "Revoke all with a passkey")
    await expect(page.get_by_role("status")).to_have_text("2 apps no longer have access.")
    assert await wiki.provider.verify_token(text) is None


async def test_two_keys_and_a_removed_one(wiki: Site, page: Page, device: Device) -> None:
    """Either of two keys signs in; a removed one no longer does, and its session ends."""
    await enroll(wiki, page, "First")
    await device.remove()
    await device.insert(transport="usb")
    await enroll(wiki, page, "Second")
    await page.goto(f"{wiki.url}/apps")
    await press(page, "Sign in with a passkey")
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    await remove_passkey(wiki, "First")
    await page.reload()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    await remove_passkey(wiki, "Second")
    await page.reload()
    await expect(page.get_by_label("Password")).to_be_visible()
    await expect(page.get_by_role("button", name="passkey")).to_have_count(0)


async def test_a_removed_key_signs_in_no_more(wiki: Site, page: Page, device: Device) -> None:
    """The page says that it does not know the key, and stays signed out."""
    await enroll(wiki, page, "First")
    await device.remove()
    await device.insert()
    await enroll(wiki, page, "Second")
    await remove_passkey(wiki, "Second")
    await page.goto(f"{wiki.url}/apps")
    await press(page, "Sign in with a passkey")
    await expect(page.get_by_role("alert").first).to_contain_text("does not know that passkey")
    await expect(page.get_by_role("button", name="Sign out")).to_have_count(0)


async def test_the_link_twice_and_too_late(wiki: Site, page: Page, device: Device) -> None:
    """A link works once, and for ten minutes; then the page says how to get another."""
    link = await link_of(wiki)
    await page.goto(link)
    await press(page, "Add a passkey")
    await expect(page.get_by_role("heading", name="Your passkey was added")).to_be_visible()
    for url, seconds in ((link, 0), (await link_of(wiki), 601)):
        with turned(seconds):
            await page.goto("about:blank")
            await page.goto(url)
            await press(page, "Add a passkey")
            await expect(page.get_by_role("alert")).to_contain_text("was used already, or is older than 10 minutes")
    assert len(await passkeys_of(wiki)) == 1


async def test_a_device_that_has_one(wiki: Site, page: Page, device: Device) -> None:
    """A device that has a passkey for this server makes no second one, and the link is still good."""
    await enroll(wiki, page)
    await page.goto(await link_of(wiki))
    await press(page, "Add a passkey")
    await expect(page.get_by_role("alert")).to_have_text("This device has a passkey for this server already.")
    await device.remove()
    await device.insert()
    await press(page, "Add a passkey")
    await expect(page.get_by_role("heading", name="Your passkey was added")).to_be_visible()


async def test_a_user_who_is_not_verified(wiki: Site, page: Page, device: Device, app: tuple[str, list[str]]) -> None:
    """Without a fingerprint or a PIN the browser gives no answer; the page says so, and the password still works."""
    await enroll(wiki, page)
    await device.set("setUserVerified", isUserVerified=False)
    await page.goto(await asked(wiki, app))
    await press(page, "Allow with a passkey")
    await expect(page.get_by_role("alert")).to_have_text("No passkey was used. Try again.")
    assert app[1] == []
    await page.get_by_label("Password").fill(PASSWORD)
    await press(page, "Allow")
    await expect(page.get_by_text("back in the app")).to_be_visible()


async def test_a_copied_key(wiki: Site, page: Page, device: Device, app: tuple[str, list[str]]) -> None:
    """A signature counter that goes back shows a copy: the page refuses it, and nothing is allowed."""
    await enroll(wiki, page)
    [credential] = await device.credentials()
    await page.goto(await asked(wiki, app))
    await press(page, "Allow with a passkey")
    await expect(page.get_by_text("back in the app")).to_be_visible()
    await device.set("removeCredential", credentialId=credential["credentialId"])
    await device.set("addCredential", credential={**credential, "signCount": 0})
    await page.goto(await asked(wiki, app))
    await press(page, "Allow with a passkey")
    await expect(page.get_by_role("alert").first).to_contain_text("That passkey was not accepted.")
    assert len(app[1]) == 1


async def test_boxes_that_were_ticked(page: Page, device: Device, tmp_path: Path, app: tuple[str, list[str]]) -> None:
    """One touch grants exactly the scopes that are ticked; a touch with none of them ticked allows nothing."""
    port = free_port()
    async with wiki_on(tmp_path / "oauth.db", base_url=f"http://localhost:{port}", port=port) as wiki:
        await enroll(wiki, page)
        url = await asked(wiki, app, asks="read write")
        await page.goto(url)
        for scope in ("read", "write"):
            await page.locator(f"[value={scope}]").uncheck()
        await press(page, "Allow with a passkey")
        await expect(page.get_by_role("alert").first).to_have_text("Choose at least one permission, or Deny.")
        await page.locator("[value=read]").check()
        await press(page, "Allow with a passkey")
        await expect(page.get_by_text("back in the app")).to_be_visible()
        assert (await wiki.redeem(url, app[1][-1])).scope == "read"


async def test_another_users_session(page: Page, device: Device, tmp_path: Path) -> None:
    """Ada's passkey does not confirm what Bob's session asks for."""
    async with passkey_site(tmp_path / "oauth.db", approval={"users": USERS}) as wiki:
        await wiki.connect(subject="bob", client_name="Bob's app")
        await enroll(wiki, page, user="ada")
        await page.goto(f"{wiki.url}/apps")
        await page.get_by_label("Your name").fill("bob")
        await page.get_by_label("Your password").fill("bob's password")
        await page.get_by_role("button", name="Sign in", exact=True).click()
        await page.get_by_text("Revoke all", exact=True).click()
        await press(page, "Revoke all with a passkey")
        await expect(page.get_by_role("alert").first).to_have_text("You are signed in as another user.")
        await expect(page.get_by_role("heading", name="Bob's app")).to_be_visible()


async def test_without_script(wiki: Site, page: Page, device: Device, chromium: Browser) -> None:
    """Without JavaScript the password works as before, and no button pretends to work."""
    await enroll(wiki, page)
    context = await chromium.new_context(java_script_enabled=False)
    plain = await context.new_page()
    await plain.goto(await wiki.authorize_url())
    await expect(plain.get_by_role("button", name="passkey")).to_have_count(0)
    await sign_in(wiki, plain)
    await expect(plain.get_by_role("button", name="Sign out")).to_be_visible()
    await plain.goto(await link_of(wiki))
    await expect(plain.get_by_text("This needs JavaScript")).to_be_visible()
    await context.close()


async def test_by_keyboard(wiki: Site, page: Page, device: Device, app: tuple[str, list[str]]) -> None:
    """Tab and Enter add a passkey and allow an app; Enter in the password still allows with the password."""
    await page.goto(await link_of(wiki))
    await page.keyboard.press("Tab")
    assert await page.locator(":focus").evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Your passkey was added")).to_be_visible()
    await page.goto(await asked(wiki, app))
    await page.keyboard.press("Tab")
    assert await page.locator(":focus").get_attribute("name") == "stay"
    await page.keyboard.press("Tab")
    assert await page.locator(":focus").inner_text() == "Allow with a passkey"
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("back in the app")).to_be_visible()
    await page.goto(await asked(wiki, app))
    await page.get_by_label("Password").fill(PASSWORD)
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("back in the app")).to_be_visible()


async def test_another_origin(page: Page, device: Device, tmp_path: Path, wiki: Site) -> None:
    """A page at another address of the same server, such as its IP address, cannot use the passkey."""
    await enroll(wiki, page)
    await page.goto(f"{wiki.url.replace('localhost', '127.0.0.1')}/apps")
    await press(page, "Sign in with a passkey")
    await expect(page.get_by_role("alert")).to_have_text("No passkey was used. Try again.")


async def test_without_a_password(page: Page, device: Device, tmp_path: Path, app: tuple[str, list[str]]) -> None:
    """With PasskeyApproval nobody gets in before the first passkey; then its touch is all there is."""
    async with passkey_site(tmp_path / "oauth.db", passkeys_only=True) as wiki:
        url = await asked(wiki, app)
        await page.goto(url)
        await expect(page.get_by_text("oauth-store passkey add")).to_be_visible()
        await expect(page.get_by_role("button", name="Allow")).to_have_count(0)
        await expect(page.get_by_label("Password")).to_have_count(0)
        await enroll(wiki, page)
        await page.goto(url)
        await press(page, "Allow with a passkey")
        await expect(page.get_by_text("back in the app")).to_be_visible()
        await page.goto(f"{wiki.url}/apps")
        await press(page, "Sign in with a passkey")
        await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
