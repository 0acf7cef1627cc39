"""How the tests find and use Chromium. Without a screen it needs a quarter of the time."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.async_api import Locator, Page, ViewportSize, expect

from tests.sites import PASSWORD, Site

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
ARGUMENTS = [
    "--no-sandbox",  # root cannot use the sandbox
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Every .example is this machine, and no other host exists: no test may reach the internet.
    "--host-resolver-rules=MAP *.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
DESK: ViewportSize = {"width": 800, "height": 720}
PHONE: ViewportSize = {"width": 390, "height": 844}


def find_chromium() -> str:
    """Return the path of a browser: the one in CHROMIUM, or one on the PATH.

    Without one the test is skipped; with OAUTH_STORE_TEST_REQUIRE_BROWSER=1, as in CI, it fails.
    """
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    missing = f"CHROMIUM is {named!r}, which cannot be run" if named else f"no browser here: none of {', '.join(NAMES)}"
    if os.environ.get("OAUTH_STORE_TEST_REQUIRE_BROWSER") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


async def press(page: Page, button: str) -> None:
    """Click a button as a user does: before a click on Allow, the mouse has been on the form for a while."""
    await page.locator("form", has=page.get_by_role("button", name=button, exact=True)).hover()
    await page.get_by_role("button", name=button, exact=True).click()


async def allow(page: Page, password: str = PASSWORD) -> None:
    """Type the password, and click Allow."""
    await page.get_by_label("password").fill(password)
    await press(page, "Allow")


async def boxes_in(place: Page | Locator) -> dict[str, bool]:
    """The scopes that have a box there, and which are ticked."""
    boxes = await place.locator("input[name=scope]").all()
    return {str(await box.get_attribute("value")): await box.is_checked() for box in boxes}


async def screenshot(page: Page, name: str) -> None:
    """Save a screenshot, if OAUTH_STORE_SCREENSHOTS names a directory."""
    directory = os.environ.get("OAUTH_STORE_SCREENSHOTS")
    if directory:
        await page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


async def sign_in(wiki: Site, page: Page, password: str = PASSWORD) -> None:
    """Sign in to the connected apps, or fail to."""
    await page.goto(f"{wiki.url}/apps")
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("button", name="Sign out").or_(page.get_by_role("alert"))).to_be_visible()
