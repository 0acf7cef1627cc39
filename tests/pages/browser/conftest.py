"""One Chromium for all tests, which therefore share an event loop; each test has its own profile."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from tests.pages.browser import ARGUMENTS, DESK, find_chromium
from tests.sites import Site, callback_site, site


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """The browser."""
    path = find_chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(chromium: Browser) -> AsyncIterator[Page]:
    """A page in a new profile."""
    context = await chromium.new_context(viewport=DESK)
    context.set_default_timeout(15_000)
    yield await context.new_page()
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def wiki(tmp_path: Path) -> AsyncIterator[Site]:
    """A server that asks for a password."""
    async with site(tmp_path / "oauth.db") as served:
        yield served


@pytest_asyncio.fixture(loop_scope="session")
async def app() -> AsyncIterator[tuple[str, list[str]]]:
    """A client's callback on this machine, and the URLs it received."""
    async with callback_site() as served:
        yield served
