"""Word to the owner: what is sent, to a webhook or a function, and what a webhook that is away costs."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from oauth_store import ConfigurationError, Notification, SQLAlchemyOAuthProvider
from oauth_store.notifications import QUIET_SECONDS
from tests.clocks import until
from tests.passkeys import enroll, passkey_site
from tests.serving import free_port, serving
from tests.sites import PASSWORD, Browser, Site, csrf_of, site
from tests.steps import BASE_URL


@dataclass
class Webhook:
    """A server that keeps what is posted to it."""

    url: str = ""
    status: int = 200
    seconds: float = 0
    posted: list[dict[str, Any]] = field(default_factory=list)

    async def answer(self, request: Request) -> PlainTextResponse:
        """Keep a notification, after a while."""
        await asyncio.sleep(self.seconds)
        self.posted.append(await request.json())
        return PlainTextResponse("", self.status)

    async def got(self, count: int) -> list[dict[str, Any]]:
        """Wait until so many were posted, and return them."""
        await until(lambda: len(self.posted) >= count)
        assert len(self.posted) == count
        return self.posted


@asynccontextmanager
async def listening(**behavior: Any) -> AsyncIterator[Webhook]:
    """A webhook that answers, at a URL with a secret."""
    hook = Webhook(**behavior)
    async with serving(Starlette(routes=[Route("/s3cret", hook.answer, methods=["POST"])]), free_port()) as url:
        hook.url = f"{url}/s3cret"
        yield hook


async def create_token(wiki: Site, browser: Browser, name: str) -> None:
    """Sign in to the page of apps, and make a token there."""
    page = await browser.sign_in(f"{wiki.url}/apps")
    form = {"csrf": csrf_of(page), "create": "token", "name": name, "expires": "30d", "password": PASSWORD}
    assert "mcp_" in (await browser.http.post(f"{wiki.url}/apps", data=form)).text


class TestWebhook:
    """A URL gets each notification as JSON."""

    async def test_everything_that_is_sent(self, database_url: str, browser: Browser) -> None:
        """A wrong password, a denial, an approval, a token, and the end of a grant after a reuse; nothing else."""
        async with listening() as hook, site(database_url, notify=hook.url, refresh_grace_seconds=0) as wiki:
            name = wiki.url.removeprefix("http://")
            page = await browser.open(await wiki.authorize_url(client_name='Claude\n". It is fine'))
            await browser.allow(page, "wrong")
            [failed] = await hook.got(1)
            assert failed["title"] == "A sign-in failed"
            assert failed["message"] == f"At {name}, from 127.0.0.1: wrong."
            await browser.submit(page, {"answer": "deny"})
            denied = (await hook.got(2))[1]
            assert denied["message"] == f'It asked to use {name}. Name: Claude ". It is fine'
            pair = await wiki.connect(client_name="Codex")
            allowed = (await hook.got(3))[2]
            assert (allowed["event"], allowed["client_name"], allowed["server"]) == ("approval_granted", "Codex", name)
            assert allowed["message"] == f"It was allowed to use {name} by owner. Name: Codex"
            assert abs(allowed["at"] - time.time()) < 60
            await create_token(wiki, browser, "n8n")
            made = (await hook.got(4))[3]
            assert made["text"].startswith(f"A personal token was created. It can use {name}. It was created by owner")
            form = {"grant_type": "refresh_token", "client_id": allowed["client_id"]}
            for _ in range(2):
                await browser.http.post(f"{wiki.url}/token", data=form | {"refresh_token": str(pair.refresh_token)})
            reused = (await hook.got(5))[4]
            assert (reused["event"], reused["grant_id"]) == ("reuse_detected", allowed["grant_id"])
            secrets = (PASSWORD, "wrong-", pair.access_token, str(pair.refresh_token))
            assert not [secret for secret in secrets if secret in str(hook.posted)]

    async def test_a_passkey(self, tmp_path: Path) -> None:
        """A passkey that was added is reported with its user, and without its link."""
        async with listening() as hook, passkey_site(tmp_path / "oauth.db", notify=hook.url) as wiki:
            await enroll(wiki, name="My phone")
            [added] = await hook.got(1)
            assert (added["event"], added["subject"]) == ("passkey_added", "owner")
            name = wiki.url.removeprefix("http://")
            assert added["text"] == f"A passkey was added. owner can sign in to {name} with it."

    async def test_a_flood_of_wrong_passwords_is_one_message(self, tmp_path: Path, browser: Browser) -> None:
        """Within a minute, only the first is sent; an approval amid them is sent too."""
        async with listening() as hook, site(tmp_path / "oauth.db", notify=hook.url) as wiki:
            page = await browser.open(await wiki.authorize_url())
            for _ in range(5):
                await browser.allow(page, "wrong")
            await browser.allow(page)
            assert [posted["event"] for posted in await hook.got(2)] == ["sign_in_failed", "approval_granted"]
            assert QUIET_SECONDS == 60


class TestAway:
    """A webhook that is away costs nothing but its message."""

    @pytest.mark.parametrize("status", [302, 404, 500])
    async def test_refused(
        self, tmp_path: Path, browser: Browser, caplog: pytest.LogCaptureFixture, status: int
    ) -> None:
        """The log says so, without the URL, and the app is allowed."""
        async with listening(status=status) as hook, site(tmp_path / "oauth.db", notify=hook.url) as wiki:
            assert (await browser.allow(await browser.open(await wiki.authorize_url()))).status_code == 303
            await until(lambda: "could not be sent" in caplog.text)
        [line] = [record.getMessage() for record in caplog.records if "could not be sent" in record.getMessage()]
        assert line == f"a notification could not be sent (approval_granted): HTTP {status}"

    async def test_nobody_listens(self, tmp_path: Path, browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
        """A port that refuses is a line in the log."""
        async with site(tmp_path / "oauth.db", notify=f"http://127.0.0.1:{free_port()}/s3cret") as wiki:
            assert (await browser.allow(await browser.open(await wiki.authorize_url()))).status_code == 303
            await until(lambda: "ConnectError" in caplog.text)
        assert "s3cret" not in " ".join(
            record.getMessage() for record in caplog.records if record.name == "oauth_store"
        )

    async def test_it_hangs(self, tmp_path: Path, browser: Browser) -> None:
        """Thirty approvals take no longer, what waits is bounded, and the server ends soon."""
        async with listening(seconds=8) as hook:
            async with site(tmp_path / "oauth.db", notify=hook.url) as wiki:
                for _ in range(30):
                    url = await wiki.authorize_url()
                    page = await browser.open(url)
                    assert (await asyncio.wait_for(browser.allow(page), 5)).status_code == 303
                notifier = wiki.provider._notifier
                assert notifier is not None
                assert len(notifier._tasks) <= 20
                began = time.monotonic()
            assert time.monotonic() - began < 6


class TestFunction:
    """A function gets each notification in its own way."""

    async def test_a_coroutine(self, tmp_path: Path, browser: Browser) -> None:
        """It is awaited on the loop."""
        seen: list[Notification] = []

        async def notify(notification: Notification) -> None:
            await asyncio.sleep(0)
            seen.append(notification)

        async with site(tmp_path / "oauth.db", notify=notify) as wiki:
            await browser.allow(await browser.open(await wiki.authorize_url()))
            await until(lambda: bool(seen))
        assert (seen[0].event, seen[0].subject, seen[0].client_name) == ("approval_granted", "owner", "Test client")

    async def test_a_plain_function(self, tmp_path: Path, browser: Browser) -> None:
        """It runs in a thread, so it may block."""
        threads: list[str] = []

        def notify(_notification: Notification) -> None:
            time.sleep(0.1)
            threads.append(threading.current_thread().name)

        async with site(tmp_path / "oauth.db", notify=notify) as wiki:
            await browser.allow(await browser.open(await wiki.authorize_url()))
        assert threads
        assert threads[0].startswith("oauth_store-notify")

    async def test_one_that_fails(self, tmp_path: Path, browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
        """The app is allowed, and the log says what kind of error it was, without its text."""

        async def notify(_notification: Notification) -> None:
            raise RuntimeError("s3cret")

        async with site(tmp_path / "oauth.db", notify=notify) as wiki:
            assert (await browser.allow(await browser.open(await wiki.authorize_url()))).status_code == 303
            await until(lambda: "RuntimeError" in caplog.text)
        assert "s3cret" not in caplog.text

    async def test_two_servers_in_a_process(self, tmp_path: Path, browser: Browser) -> None:
        """Each one's owner learns of their own server alone."""
        first: list[str] = []
        second: list[str] = []

        async def to_first(notification: Notification) -> None:
            first.append(notification.server)

        async def to_second(notification: Notification) -> None:
            second.append(notification.server)

        async with (
            site(tmp_path / "oauth.db", notify=to_first) as wiki,
            site(tmp_path / "oauth.db", notify=to_second) as mail,
        ):
            for served in (wiki, mail, mail):
                await browser.allow(await browser.open(await served.authorize_url()))
            await until(lambda: len(second) == 2 and len(first) == 1)
        assert (first, set(second)) == ([wiki.url.removeprefix("http://")], {mail.url.removeprefix("http://")})


@pytest.mark.parametrize("notify", ["", "ntfy.sh/wiki", "mailto:me@example.com", "https://", 7])
def test_what_cannot_be_used(tmp_path: Path, notify: Any) -> None:
    """A setting that could never send is refused at the start, without quoting it."""
    with pytest.raises(ConfigurationError, match=r"pass (one, or|a URL or) a function"):
        SQLAlchemyOAuthProvider(tmp_path / "oauth.db", base_url=BASE_URL, notify=notify)
