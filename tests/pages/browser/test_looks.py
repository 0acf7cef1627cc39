"""How every page looks: no accessibility violations in light and in dark, and it fits on a phone.

With OAUTH_STORE_SCREENSHOTS the tests write a picture of each into that directory, where it exists. Those that the
documentation shows are in docs/images, under the same names.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect
from pydantic import AnyUrl

from tests.accounts import AccountProvider, account_site
from tests.clocks import turned
from tests.devices import asking
from tests.pages.browser import DESK, PHONE, allow, boxes_in, press, screenshot, sign_in
from tests.passkeys import enroll, link_of, passkey_site
from tests.scopes import WORDS, add_many_tools, wiki_on
from tests.serving import free_port
from tests.sites import HASH, PASSWORD, USERS, site
from tests.steps import registration_options

pytestmark = pytest.mark.asyncio(loop_scope="session")

FINGER = 44
"""The least height of what a finger has to hit, in pixels (WCAG 2.2, success criterion 2.5.5)."""
MOUSE = 36
"""The same of a mouse: more boxes fit on its screen."""
FAR = 12
"""The least distance of two buttons one above the other."""
FORTY = [f"space-{number}:{'write' if number % 2 else 'read'}" for number in range(40)]
CHOICE = {"name": "Our family wiki", "scope_descriptions": WORDS}
WIKI = {
    "name": "Our family wiki",
    "scope_descriptions": {"read": "read every page", "write": "write and delete pages"},
}
CLAUDE = {"client_name": "Claude", "redirect_uris": [AnyUrl("https://claude.ai/api/mcp/auth_callback")]}
LONG_HOST = f"claude.ai.{'.'.join(['long-label-in-a-name'] * 10)}.evil.example"
LOGO = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' width='24' height='24'%3E"
    "%3Crect width='24' height='24' rx='6' fill='%23238636'/%3E%3C/svg%3E"
)
TARGETS: dict[str, dict[str, Any]] = {
    "known": CLAUDE,
    "loopback": {"client_name": "Claude Code", "redirect_uris": [AnyUrl("http://127.0.0.1:53682/callback")]},
    "app": {"client_name": "Cursor", "redirect_uris": [AnyUrl("cursor://anysphere.cursor-mcp/oauth/callback")]},
    "unknown": {"client_name": "Claude", "redirect_uris": [AnyUrl("https://claude-ai.example/callback")]},
    "document": {
        **CLAUDE,
        "client_id": "https://client.example/oauth/claude.json",
        "scope": "read offline_access",
    },
    "long": {
        "client_name": "A name that goes on and on " * 5,
        "redirect_uris": [AnyUrl(f"https://{LONG_HOST}/cb")],
        "scope": " ".join(f"scope-number-{number}" for number in range(40)),
    },
}


@asynccontextmanager
async def people(chromium: Browser, *, phone: bool = False, dark: bool = False) -> AsyncIterator[Page]:
    """A page of a browser with a user's settings."""
    context = await chromium.new_context(
        viewport=PHONE if phone else DESK,
        color_scheme="dark" if dark else "light",
        is_mobile=phone,
        has_touch=phone,
        bypass_csp=True,  # for axe, a script of ours
    )
    context.set_default_timeout(15_000)
    yield await context.new_page()
    await context.close()


async def check(page: Page, name: str) -> None:
    """Check that a page has no accessibility violations and no horizontal overflow."""
    found = await Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    width, window = await page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window
    await screenshot(page, name)


async def heights(place: Page | Locator, boxes: int) -> float:
    """Return the least height of the boxes in sight with their words, of which there are so many, and of the folds."""
    found = [await box.bounding_box() for box in await place.locator("label.choice:visible").all()]
    assert len(found) == boxes
    folds = [await fold.bounding_box() for fold in await place.locator("summary:visible").all()]
    return min(one["height"] for one in (*found, *folds) if one is not None)


LIGHT_DARK_PHONE = [
    pytest.param(False, False, id="light"),
    pytest.param(False, True, id="dark"),
    pytest.param(True, False, id="phone"),
]
looks = pytest.mark.parametrize(("phone", "dark"), LIGHT_DARK_PHONE)


def named(what: str, phone: bool, dark: bool) -> str:
    """Return the name of a screenshot."""
    return f"{what}-{'phone' if phone else 'dark' if dark else 'light'}"


class TestConsent:
    """The consent page."""

    @looks
    @pytest.mark.parametrize("target", TARGETS)
    async def test_every_target(self, chromium: Browser, tmp_path: Path, target: str, phone: bool, dark: bool) -> None:
        """For every kind of redirect URI, the page is accessible, and fits on a usual screen."""
        async with site(tmp_path / "oauth.db", approval=WIKI) as wiki, people(chromium, phone=phone, dark=dark) as page:
            await page.goto(await wiki.authorize_url(**TARGETS[target]))
            await check(page, named(f"consent-{target}", phone, dark))
            if target != "long":
                buttons = await page.get_by_role("button", name="Deny").bounding_box()
                assert buttons is not None
                assert buttons["y"] + buttons["height"] <= (PHONE["height"] if phone else 720)

    @looks
    async def test_a_wrong_password(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """The error is read aloud, comes before the password, and the password has the focus."""
        async with site(tmp_path / "oauth.db", approval=WIKI) as wiki, people(chromium, phone=phone, dark=dark) as page:
            await page.goto(await wiki.authorize_url(**TARGETS["known"]))
            await allow(page, "wrong")
            await expect(page.get_by_role("alert")).to_be_visible()
            password = page.get_by_label("Password")
            assert await password.evaluate("field => field === document.activeElement")
            described_by = await password.get_attribute("aria-describedby")
            assert await page.locator(f"#{described_by}[role=alert]").inner_text() == "That password is wrong."
            await check(page, named("consent-wrong", phone, dark))

    @looks
    async def test_several_users(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """With users, the page asks for a name too, and has the owner's logo and color."""
        approval = {"users": USERS, "name": "Wiki", "logo_url": LOGO, "accent": "#ffd43b"}
        async with (
            site(tmp_path / "oauth.db", approval=approval) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await page.goto(await wiki.authorize_url(**TARGETS["unknown"]))
            assert await page.get_by_label("Your name").is_visible()
            assert await page.locator("img").evaluate("image => image.naturalWidth") > 0
            await check(page, named("consent-users", phone, dark))

    @looks
    async def test_boxes(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """With a box for each scope, its tools and a fold, the page is accessible, and a thumb hits each box."""
        async with (
            wiki_on(tmp_path / "oauth.db", approval=CHOICE, tools=add_many_tools, required_scopes=["read"]) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await page.goto(await wiki.authorize_url(asks="read write", **CLAUDE))
            await check(page, named("consent-scopes-folded", phone, dark))
            await page.get_by_text("Allow more than it asked for").click()
            await expect(page.get_by_label("delete pages, for good")).to_be_visible()
            await check(page, named("consent-scopes", phone, dark))
            assert await heights(page, 3) >= (FINGER if phone else MOUSE)
            assert await boxes_in(page) == {"read": True, "write": True, "admin": False}
            await allow(page, "wrong")
            await expect(page.get_by_role("alert")).to_be_visible()
            await check(page, named("consent-scopes-wrong", phone, dark))

    @looks
    async def test_forty_boxes(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """Forty scopes leave the warning and the buttons within one scroll, and unfold to boxes that fit."""
        options = {"approval": CHOICE, "client_registration_options": registration_options(*FORTY)}
        async with (
            wiki_on(tmp_path / "oauth.db", **options) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await page.goto(await wiki.authorize_url(asks=" ".join(FORTY[:20]), scope=None, **CLAUDE))
            await check(page, named("consent-forty-folded", phone, dark))
            assert await heights(page, 8) >= (FINGER if phone else MOUSE)
            buttons = await page.get_by_role("button", name="Deny").bounding_box()
            assert buttons is not None
            assert buttons["y"] < 1.35 * (PHONE["height"] if phone else 720)
            for fold in ("and 12 more", "Allow more than it asked for"):
                await page.get_by_text(fold).click()
            await check(page, named("consent-forty", phone, dark))
            assert await heights(page, 40) >= (FINGER if phone else MOUSE)


class TestPasskeys:
    """The pages where a passkey can be used."""

    @looks
    async def test_all(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """The page that adds one, and those that ask for one, next to the password, are accessible, and fit."""
        async with (
            passkey_site(tmp_path / "oauth.db", approval=WIKI) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await page.goto(await link_of(wiki))
            await check(page, named("passkey-add", phone, dark))
            device = await enroll(wiki)
            await page.goto(f"{wiki.url}/passkey?answer=added")
            await check(page, named("passkey-added", phone, dark))
            await page.goto(await wiki.authorize_url(**TARGETS["known"]))
            await check(page, named("consent-passkey", phone, dark))
            buttons = await page.get_by_role("button", name="Deny").bounding_box()
            assert buttons is not None
            assert buttons["y"] + buttons["height"] <= (PHONE["height"] if phone else 820)
            await press(page, "Allow with a passkey")  # there is no device: the browser gives up
            await expect(page.get_by_role("alert")).to_be_visible()
            await check(page, named("consent-passkey-failed", phone, dark))
            await wiki.connect(**TARGETS["known"])
            await page.goto(f"{wiki.url}/apps")
            await check(page, named("sign-in-passkey", phone, dark))
            await page.get_by_label("Password").fill(PASSWORD)
            await page.get_by_role("button", name="Sign in", exact=True).click()
            await page.get_by_text("Revoke all", exact=True).click()
            await page.get_by_text("New token").click()
            await check(page, named("apps-passkey", phone, dark))
            assert device.user_handle

    @looks
    async def test_without_a_password(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """So are the pages of a server that has passkeys alone, before the first one and after."""
        async with (
            passkey_site(tmp_path / "oauth.db", passkeys_only=True, approval=WIKI) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await page.goto(await wiki.authorize_url(**TARGETS["known"]))
            await check(page, named("consent-no-passkey-yet", phone, dark))
            await enroll(wiki)
            await page.reload()
            await check(page, named("consent-passkey-only", phone, dark))
            await page.goto(f"{wiki.url}/apps")
            await check(page, named("sign-in-passkey-only", phone, dark))


class TestAccounts:
    """The pages of a server whose users have accounts at an identity provider."""

    @looks
    @pytest.mark.parametrize("more", [True, False], ids=["three ways", "one way"])
    async def test_all(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool, more: bool) -> None:
        """The button before the other ways, the question after it, and the page of apps, are accessible, and fit."""
        ways = "-and-more" if more else ""
        port = free_port()
        settings: dict[str, Any] = {**WIKI, **({"password_hash": HASH} if more else {})}
        settings["provider_name"] = "Google"
        async with (
            AccountProvider().open() as acme,
            account_site(
                tmp_path / "oauth.db", acme, approval=settings, port=port, base_url=f"http://localhost:{port}"
            ) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            if more:
                await enroll(wiki, user="ada@example.com")
            await page.goto(await wiki.authorize_url(**TARGETS["known"]))
            await check(page, named(f"consent-account{ways}", phone, dark))
            await page.get_by_role("button", name="Sign in with Google").click()
            await expect(page.get_by_text("You are signed in as ada@example.com")).to_be_visible()
            await check(page, named(f"consent-signed-in{ways}", phone, dark))
            await page.get_by_label("Stay signed in on this browser for 30 days").check()
            await press(page, "Allow")
            await page.wait_for_url(lambda url: "/consent" not in url)
            await page.goto(await wiki.authorize_url(**TARGETS["known"]))
            await check(page, named(f"consent-stays{ways}", phone, dark))
            await page.goto(f"{wiki.url}/apps")
            await check(page, named(f"sign-in-account{ways}", phone, dark))
            await page.get_by_role("button", name="Sign in with Google").click()
            await expect(page.get_by_text("You stay signed in on one browser")).to_be_visible()
            await page.get_by_text("New token").click()
            await check(page, named(f"apps-account{ways}", phone, dark))
            acme.user |= {"email": "eve@example.com"}
            await page.get_by_role("button", name="Sign out everywhere").click()
            await page.get_by_role("button", name="Sign in with Google").click()
            await expect(page.get_by_text("does not let you in")).to_be_visible()
            await check(page, named(f"account-refused{ways}", phone, dark))


class TestApps:
    """The page of connected apps."""

    @looks
    async def test_boxes(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """Each app unfolds to its boxes and Save; all of it is accessible, also after Save."""
        async with (
            wiki_on(tmp_path / "oauth.db", approval=CHOICE, tools=add_many_tools, required_scopes=["read"]) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await wiki.connect(asks="read write", **TARGETS["loopback"])
            await wiki.connect(asks="read write", **CLAUDE)
            await sign_in(wiki, page)
            await check(page, named("apps-scopes-folded", phone, dark))
            app = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="Claude", exact=True))
            await app.get_by_text("Change what it can do").click()
            await app.get_by_text("Allow more").click()
            await check(page, named("apps-scopes", phone, dark))
            assert await heights(app, 3) >= (FINGER if phone else MOUSE)
            await app.get_by_text("write pages", exact=True).last.click()
            await app.get_by_role("button", name="Save").click()
            await expect(page.get_by_role("status")).to_contain_text("from its next call on")
            await check(page, named("apps-scopes-saved", phone, dark))

    @looks
    async def test_a_new_token(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """Its form, the token that is shown once, and what is refused are accessible."""
        async with (
            wiki_on(tmp_path / "oauth.db", approval=CHOICE) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await wiki.connect(asks="read write", **CLAUDE)
            await sign_in(wiki, page)
            await page.get_by_text("New token").click()
            await page.get_by_label("Name").fill("n8n")
            await check(page, named("apps-new-token", phone, dark))
            await page.locator("#password-create").fill(PASSWORD)
            await page.get_by_role("button", name="Create token").click()
            await expect(page.get_by_role("alert")).to_contain_text("choose at least one permission")
            await check(page, named("apps-no-token", phone, dark))
            await page.get_by_text("New token").click()
            await page.get_by_label("Name").fill("n8n")
            await page.locator("[value=read]:visible").check()
            await page.locator("#password-create").fill(PASSWORD)
            await page.get_by_role("button", name="Create token").click()
            await expect(page.get_by_role("status")).to_contain_text("Copy it now")
            await check(page, named("apps-token", phone, dark))

    @looks
    async def test_forty_boxes(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """Forty scopes fit, and their boxes do not touch Revoke."""
        options = {"approval": CHOICE, "client_registration_options": registration_options(*FORTY)}
        async with (
            wiki_on(tmp_path / "oauth.db", **options) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            await wiki.connect(asks=" ".join(FORTY[:20]), scope=None, **CLAUDE)
            await sign_in(wiki, page)
            for fold in ("Change what it can do", "and 12 more", "Allow more"):
                await page.get_by_text(fold).click()
            await check(page, named("apps-forty", phone, dark))
            assert await heights(page.locator(".app"), 40) >= (FINGER if phone else MOUSE)
            save = await page.get_by_role("button", name="Save").bounding_box()
            revoke = await page.get_by_role("button", name="Revoke", exact=True).bounding_box()
            assert save is not None
            assert revoke is not None
            assert abs(revoke["y"] - save["y"] - save["height"]) >= FAR

    @looks
    @pytest.mark.parametrize("connected", [0, 1, 3, 7])
    async def test_any_number(self, chromium: Browser, tmp_path: Path, connected: int, phone: bool, dark: bool) -> None:
        """With no, one or many apps, the list is accessible, before and after a revocation."""
        names = list(TARGETS)
        async with site(tmp_path / "oauth.db", approval=WIKI) as wiki, people(chromium, phone=phone, dark=dark) as page:
            for number in range(connected):
                await wiki.connect(**{**TARGETS[names[number % len(names)]], "client_id": f"client-{number}"})
            await page.goto(f"{wiki.url}/apps")
            if not connected:
                await check(page, named("sign-in", phone, dark))
                await page.get_by_label("Password").fill("wrong")
                await page.get_by_role("button", name="Sign in").click()
                await expect(page.get_by_role("alert")).to_be_visible()
                await check(page, named("sign-in-wrong", phone, dark))
            await page.get_by_label("Password").fill(PASSWORD)
            await page.get_by_role("button", name="Sign in").click()
            await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
            await expect(page.get_by_role("button", name="Revoke", exact=True)).to_have_count(connected)
            await check(page, named(f"apps-{connected}", phone, dark))
            if connected:
                await page.get_by_role("button", name="Revoke", exact=True).first.click()
                await expect(page.get_by_role("status")).to_be_visible()
                await check(page, named(f"apps-{connected}-revoked", phone, dark))


class TestDevice:
    """The page where a device's code is typed, and those that follow."""

    @looks
    async def test_each(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """With the keyboard alone, from the code to the end; each page is accessible, and the error is read aloud."""
        async with (
            site(tmp_path / "oauth.db", approval=WIKI, device_authorization=True) as wiki,
            people(chromium, phone=phone, dark=dark) as page,
        ):
            device = await asking(wiki.url)
            await page.goto(f"{wiki.url}/device")
            await check(page, named("device", phone, dark))
            await page.keyboard.type("bcdf ghjk")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert")).to_contain_text("No device waits with this code")
            await check(page, named("device-wrong", phone, dark))
            await page.goto(f"{wiki.url}/device?user_code={device.user_code}")
            await check(page, named("device-link", phone, dark))
            await page.get_by_role("button", name="Continue").press("Enter")
            await expect(page.locator(".host")).to_have_text(device.user_code)
            await check(page, named("consent-device", phone, dark))
            await page.get_by_label("password").fill(PASSWORD)
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("heading", level=1)).to_have_text("Your device can connect")
            await check(page, named("device-done", phone, dark))
            assert (await device.poll()).status_code == 200


class TestMessages:
    """The messages."""

    @looks
    async def test_each(self, chromium: Browser, tmp_path: Path, phone: bool, dark: bool) -> None:
        """Every message has a heading, says what to do, and is accessible."""
        async with site(tmp_path / "oauth.db", approval=WIKI) as wiki, people(chromium, phone=phone, dark=dark) as page:
            url = await wiki.authorize_url(**TARGETS["known"])

            async def says(heading: str, name: str) -> None:
                await expect(page.get_by_role("heading", level=1)).to_have_text(heading)
                assert await page.locator("p").count() >= 1
                await check(page, named(name, phone, dark))

            await page.goto(f"{wiki.url}/consent?handle=request_of-another-browser")
            await says("This page belongs to another browser", "message-other-browser")
            await page.goto(url.replace("client_id=", "client_id=un"))
            await says("This app is not registered here", "message-unknown-client")
            await page.goto(f"{url}&redirect_uri=https%3A%2F%2Fevil.example")
            await says("This request cannot be processed", "message-bad-request")
            await page.goto(url)
            await page.evaluate("document.querySelector('[name=csrf]').value = 'x'")
            await allow(page)
            await says("This form was not sent from our page", "message-not-our-page")
            await page.goto(url)
            with turned(601):
                await page.reload()
                await says("This request is over", "message-over")
