"""Sign-in: whose password it is, the limits, and the cost for the server."""

import asyncio
import logging
import re
import statistics
import threading
import time
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx2
import pytest
from argon2 import PasswordHasher
from fastmcp import FastMCP

from oauth_store import ConfigurationError, PasswordApproval, SQLAlchemyOAuthProvider
from oauth_store.display import MARKS_IN_A_ROW, nfc
from oauth_store.pages.passwords import hash_password
from tests.clocks import turned
from tests.sites import HASH, PASSWORD, USERS, Browser, Site, site
from tests.steps import query_of

QUARTER = 15 * 60
slow = PasswordHasher(time_cost=3, memory_cost=32 * 1024, parallelism=1)
"""A check takes tens of milliseconds, enough to measure."""
SLOW = {"password_hash": slow.hash(PASSWORD)}


def from_address(address: str) -> dict[str, str]:
    """The header with the client's address from the proxy on this machine, which uvicorn trusts."""
    return {"X-Forwarded-For": address}


async def guess(wiki: Site, browser: Browser, address: str, **fields: str) -> int:
    """Try a wrong password on the page of connected apps, and return the status."""
    answer = await browser.http.post(
        f"{wiki.url}/apps", data={"password": "guess", **fields}, headers=from_address(address)
    )
    return answer.status_code


class TestMarks:
    """Normalizing a text (NFC) costs the square of the marks in a row."""

    LONG = "\u0301\u0316" * 4500

    @pytest.fixture
    def rows(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The longest row of marks in each text that is normalized."""
        rows: list[int] = []

        def normalize(form: Literal["NFC"], text: str) -> str:
            kinds = "".join("joiner" if one == "\u034f" else unicodedata.category(one)[0] for one in text)
            rows.append(max(map(len, re.findall("M+", kinds)), default=0))
            return unicodedata.normalize(form, text)

        counting = SimpleNamespace(normalize=normalize, category=unicodedata.category)
        monkeypatch.setattr("oauth_store.display.unicodedata", counting)
        return rows

    @pytest.mark.parametrize("path", ["/consent", "/apps"])
    async def test_of_a_name_and_a_password(self, tmp_path: Path, browser: Browser, rows: list[int], path: str) -> None:
        """No name or password is normalized with a long row of marks, neither when it is checked nor at a 429."""
        async with site(tmp_path / "oauth.db", approval={"users": USERS}) as wiki:
            page = await browser.open(await wiki.authorize_url())
            statuses = []
            for _ in range(11):
                fields = {"username": self.LONG, "password": self.LONG[:1000]}
                if path == "/apps":
                    answer = await browser.http.post(f"{wiki.url}/apps", data=fields)
                else:
                    answer = await browser.submit(page, {"answer": "allow", **fields})
                statuses.append(answer.status_code)
        assert statuses == [403] * 10 + [429]
        assert len(rows) == 11 + 10  # what is over the limit costs a name, and no password
        assert 0 < max(rows) <= MARKS_IN_A_ROW

    async def test_of_an_app(self, wiki: Site, browser: Browser, rows: list[int]) -> None:
        """Nor does the name that an app registered with, on either page."""
        name = self.LONG[:8000]
        await wiki.connect(client_name=name)
        page = await browser.open(await wiki.authorize_url(client_name=name))
        apps = await browser.sign_in(f"{wiki.url}/apps")
        assert (page.status_code, apps.status_code) == (200, 200)
        assert 0 < max(rows) <= MARKS_IN_A_ROW

    @pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73\u0316"])
    def test_it_grows_with_the_length_alone(self, marks: str) -> None:
        """Twenty times the marks take twenty times as long, not four hundred times."""

        def seconds(count: int) -> float:
            text, taken = "a" + marks * count, []
            for _ in range(7):
                start = time.process_time()
                nfc(text)
                taken.append(time.process_time() - start)
            return min(taken)

        assert seconds(20_000) < 100 * seconds(1000)

    def test_every_language_is_left_as_it_is(self) -> None:
        """A text with a few marks in a row, as in all languages, is only normalized."""
        for text in ("cafe\u0301", "Vie\u0323\u0302t", "\u1112\u1161\u11ab", "हिन्दी", "a" + "\u0301\u0316" * 15):
            assert nfc(text) == unicodedata.normalize("NFC", text)

    async def test_a_password_with_a_long_row_still_lets_in(self, tmp_path: Path, browser: Browser) -> None:
        """A user with such a password can sign in with it, and not with one mark less."""
        password = "a" + "\u0301\u0316" * 400
        async with site(tmp_path / "oauth.db", approval={"password_hash": hash_password(password)}) as wiki:
            assert (await browser.sign_in(f"{wiki.url}/apps", password[:-1])).status_code == 403
            assert (await browser.sign_in(f"{wiki.url}/apps", password)).status_code == 200


class TestLimits:
    """Guessing is slow; the owner still gets in."""

    async def test_one_address(self, wiki: Site) -> None:
        """After ten wrong passwords, an address has to wait, and sees how long; other addresses do not."""
        async with Browser() as attacker:
            statuses = [await guess(wiki, attacker, "203.0.113.1") for _ in range(12)]
            assert statuses == [403] * 10 + [429] * 2
            right = {"password": PASSWORD}
            answer = await attacker.http.post(f"{wiki.url}/apps", data=right, headers=from_address("203.0.113.1"))
            assert answer.status_code == 429
            assert 0 < int(answer.headers["retry-after"]) <= QUARTER
            assert "Too many attempts. Wait 15 minutes, and try again." in answer.text
            assert await guess(wiki, attacker, "203.0.113.2") == 403
            with turned(QUARTER + 1):
                assert await guess(wiki, attacker, "203.0.113.1") == 403

    async def test_both_pages_count_together(self, wiki: Site) -> None:
        """The consent page and the connected apps share one limit."""
        async with Browser() as attacker:
            page = await attacker.open(await wiki.authorize_url())
            for _ in range(5):
                assert await guess(wiki, attacker, "127.0.0.1") == 403
                assert (await attacker.allow(page, "guess")).status_code == 403
            assert (await attacker.allow(page)).status_code == 429
            assert await guess(wiki, attacker, "127.0.0.1") == 429

    async def test_a_network_of_ipv6_is_one_address(self, wiki: Site) -> None:
        """The 2^64 IPv6 addresses of a home count as one."""
        async with Browser() as attacker:
            statuses = [await guess(wiki, attacker, f"2001:db8:1:2::{number:x}") for number in range(1, 12)]
            assert statuses == [403] * 10 + [429]
            assert await guess(wiki, attacker, "2001:db8:1:3::1") == 403

    async def test_many_addresses(self, wiki: Site) -> None:
        """All addresses together have a hundred guesses in 15 minutes; a known browser is not counted."""
        async with Browser() as owner, Browser() as attacker:
            assert (await owner.sign_in(f"{wiki.url}/apps")).status_code == 200
            statuses = [await guess(wiki, attacker, f"203.0.113.{number % 200}") for number in range(120)]
            assert statuses == [403] * 99 + [429] * 21  # the owner's first sign-in was one
            # the owner, at the attacker's very address
            page = await owner.open(await wiki.authorize_url())
            assert (await owner.allow(page)).status_code == 303
            async with Browser() as unknown:
                assert (await unknown.sign_in(f"{wiki.url}/apps")).status_code == 429
            with turned(QUARTER + 1):
                async with Browser() as unknown:
                    assert (await unknown.sign_in(f"{wiki.url}/apps")).status_code == 200

    async def test_a_known_browser_has_a_limit_too(self, wiki: Site) -> None:
        """The owner's browser has twenty guesses, and takes none from others."""
        async with Browser() as owner, Browser() as stranger:
            page = await owner.open(await wiki.authorize_url())
            assert (await owner.allow(page)).status_code == 303
            statuses = [(await owner.allow(page, "guess")).status_code for _ in range(21)]
            assert statuses == [403] * 20 + [429]
            assert await guess(wiki, stranger, "127.0.0.1") == 403

    async def test_the_right_password_begins_again(self, wiki: Site) -> None:
        """After nine mistakes, the right password resets the limit."""
        async with Browser() as owner:
            page = await owner.open(await wiki.authorize_url())
            for _ in range(2):
                for _ in range(9):
                    assert (await owner.allow(page, "oh no")).status_code == 403
                assert (await owner.allow(page)).status_code == 303

    @pytest.mark.parametrize("cookie", ["", ".", "x", "x.y", "x." + "0" * 64, "é.é", "." + "0" * 64])
    async def test_a_forged_cookie_is_no_known_browser(self, wiki: Site, cookie: str) -> None:
        """A cookie that was not made with the password's hash has no limit of its own."""
        async with Browser() as attacker:
            name = wiki.provider.cookies._name("oauth_store_known")
            headers = {b"X-Forwarded-For": b"203.0.113.1", b"Cookie": f"{name}={cookie}".encode()}
            statuses = [
                (await attacker.http.post(f"{wiki.url}/apps", data={"password": "x"}, headers=headers)).status_code
                for _ in range(11)
            ]
            assert statuses == [403] * 10 + [429]

    async def test_a_known_browser_ends_with_the_password(self, tmp_path: Path) -> None:
        """A new password makes every browser unknown."""
        async with Browser() as browser:
            async with site(tmp_path / "oauth.db") as wiki:
                await browser.sign_in(f"{wiki.url}/apps")
                port = int(wiki.url.rpartition(":")[2])
                url = await wiki.authorize_url()
            new_hash = {"password_hash": slow.hash("another password")}
            async with site(tmp_path / "oauth.db", port=port, approval=new_hash) as wiki:
                assert "Sign out" not in (await browser.open(f"{wiki.url}/apps")).text  # nor does a session outlive it
                page = await browser.open(url)
                statuses = [(await browser.allow(page)).status_code for _ in range(11)]
                assert statuses == [403] * 10 + [429]

    async def test_a_header_that_no_proxy_of_ours_wrote(self, tmp_path: Path) -> None:
        """From a peer that is not a trusted proxy, X-Forwarded-For is ignored."""
        for trusted, expected in (((), [403] * 10 + [429]), (("203.0.113.0/24",), [403] * 11)):
            async with SQLAlchemyOAuthProvider(
                tmp_path / f"{len(trusted)}.db",
                base_url="https://wiki.example.com",
                approval=PasswordApproval(password_hash=HASH),
                trusted_proxies=trusted,
            ) as provider:
                mcp: FastMCP[None] = FastMCP("test", auth=provider)
                transport = httpx2.ASGITransport(mcp.http_app(), client=("203.0.113.9", 50000))
                async with httpx2.AsyncClient(transport=transport, base_url="https://wiki.example.com") as http:
                    statuses = [
                        (
                            await http.post(
                                "/apps", data={"password": "x"}, headers=from_address(f"198.51.100.{number}")
                            )
                        ).status_code
                        for number in range(11)
                    ]
            assert statuses == expected

    async def test_the_log_says_who_tries_and_not_what(self, wiki: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A failed attempt is logged as a warning with its address, never with a password, a name or a cookie."""
        caplog.set_level(logging.DEBUG, "oauth_store")
        async with Browser() as attacker:
            await guess(wiki, attacker, "203.0.113.1", password="hunter22", username="my-password-by-mistake")
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [record.getMessage() for record in warnings] == ["sign-in failed: address=203.0.113.1 reason=wrong"]
        assert "hunter22" not in caplog.text
        assert "by-mistake" not in caplog.text


class TestUsers:
    """Several users, each with their own password."""

    @pytest.fixture
    async def wiki(self, tmp_path: Path) -> AsyncIterator[Site]:
        """A server with the users Ada and Bob."""
        async with site(tmp_path / "oauth.db", approval={"users": USERS}) as served:
            yield served

    @pytest.mark.parametrize("user", ["ada", "bob"])
    async def test_the_name_is_the_subject(self, wiki: Site, user: str) -> None:
        """A client's tokens name the user who allowed it."""
        async with Browser() as browser:
            url = await wiki.authorize_url()
            answer = await browser.allow(await browser.open(url), f"{user}'s password", username=f" {user} ")
            token = await wiki.redeem(url, answer.headers["location"])
        verified = await wiki.provider.verify_token(token.access_token)
        assert verified is not None
        assert verified.subject == user

    async def test_a_name_in_another_spelling_of_unicode(self, tmp_path: Path) -> None:
        """Keyboards encode letters in different ways: the name and the password are the same."""
        users = {"Zoe\u0308": hash_password("pa\u0308ss")}
        async with site(tmp_path / "oauth.db", approval={"users": users}) as wiki, Browser() as browser:
            page = await browser.sign_in(f"{wiki.url}/apps", "p\u00e4ss", username="Zo\u00eb")
            assert "Sign out" in page.text

    @pytest.mark.parametrize(
        ("user", "password"),
        [
            ("ada", "bob's password"),
            ("bob", "ada's password"),
            ("eve", "ada's password"),
            ("", "ada's password"),
            ("ADA", "ada's password"),
            ("owner", PASSWORD),
            ("ada\0", "ada's password"),
        ],
    )
    async def test_nobody_else(self, wiki: Site, user: str, password: str) -> None:
        """A password is valid only for its own user; every other name gets the same response."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            answer = await browser.allow(page, password, username=user)
            known = await browser.allow(page, "wrong", username="ada")
        assert (answer.status_code, known.status_code) == (403, 403)
        assert "That name and password do not match." in answer.text
        assert without_nonce(answer, user) == without_nonce(known, "ada")

    async def test_an_unknown_user_takes_as_long(self, tmp_path: Path) -> None:
        """The time of a response does not show whether a user exists, whatever the cost of the others' hashes."""
        users = {"ada": slow.hash("ada's password"), "bob": slow.hash("bob's password")}
        times: dict[str, list[float]] = {"ada": [], "eve": [], "mallory": []}
        async with site(tmp_path / "oauth.db", approval={"users": users}) as wiki, Browser() as browser:
            for number in range(5):
                for user, taken in times.items():
                    begun = time.process_time()
                    assert await guess(wiki, browser, f"203.0.113.{number}", username=user) == 403
                    taken.append(time.process_time() - begun)
        known, *unknown = (statistics.median(taken) for taken in times.values())
        for median in unknown:
            assert 0.5 < median / known < 2  # without a hash to check it is a tenth

    def test_an_unknown_user_costs_what_some_user_costs(self) -> None:
        """If hashes differ in cost, each unknown name has the cost of one of them, always the same one."""
        users = {"ada": USERS["ada"], "bob": slow.hash("bob's password")}
        sign_in: Any = PasswordApproval(users=users).sign_in.ways["password"]
        costs = {name: sign_in._nobody(name).split("$")[3] for name in map(str, range(40))}
        assert set(costs.values()) == {"m=8,t=1,p=1", "m=32768,t=3,p=1"}
        assert costs == {name: sign_in._nobody(name).split("$")[3] for name in costs}

    async def test_signing_in_between_does_not_help(self, wiki: Site) -> None:
        """Bob has ten guesses at Ada's password, however often he signs in as himself from the same address."""
        statuses = []
        async with Browser() as browser:
            for _ in range(9):
                statuses.append(await guess(wiki, browser, "127.0.0.1", username="ada"))
                async with Browser() as bob:
                    page = await bob.sign_in(f"{wiki.url}/apps", "bob's password", username="bob")
                    statuses.append(page.status_code)
        assert statuses == [403, 200] * 5 + [429] * 8

    async def test_an_allowance_is_of_one_user(self, wiki: Site) -> None:
        """Bob's known browser has no separate limit for guesses at Ada's password."""
        async with Browser() as bob:
            await bob.sign_in(f"{wiki.url}/apps", "bob's password", username="bob")
            page = await bob.open(await wiki.authorize_url())
            statuses = [(await bob.allow(page, "x", username="ada")).status_code for _ in range(11)]
        assert statuses == [403] * 9 + [429] * 2  # his own sign-in was the first of ten


class TestCost:
    """A password is slow to check on purpose, but only for its sender."""

    async def test_the_server_goes_on_while_passwords_are_checked(self, tmp_path: Path) -> None:
        """Twenty checks at once run two at a time, in threads; the event loop keeps running."""
        ticks, done = 0, asyncio.Event()
        before, checking = set(threading.enumerate()), set[threading.Thread]()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                new = set(threading.enumerate()) - before
                checking.update(thread for thread in new if thread.name.startswith("oauth_store-password"))
                await asyncio.sleep(0.001)

        async with site(tmp_path / "oauth.db", approval=SLOW) as wiki, Browser() as owner:
            page = await owner.open(await wiki.authorize_url())
            await owner.allow(page)
            ticker = asyncio.create_task(tick())
            answers = await asyncio.gather(*(owner.allow(page, "wrong") for _ in range(20)))
            done.set()
            await ticker
        assert [answer.status_code for answer in answers] == [403] * 20
        assert len(checking) == 2
        assert ticks > 100  # on the loop it is 36

    async def test_a_flood_costs_no_more_than_its_allowance(self, tmp_path: Path) -> None:
        """Attempts over the limit are refused without checking the password."""
        async with site(tmp_path / "oauth.db", approval=SLOW) as wiki, Browser() as attacker:
            begun = time.process_time()
            checked = [await guess(wiki, attacker, "203.0.113.1") for _ in range(10)]
            between = time.process_time()
            refused = [await guess(wiki, attacker, "203.0.113.1") for _ in range(10)]
            ended = time.process_time()
        assert (checked, refused) == ([403] * 10, [429] * 10)
        assert ended - between < between - begun

    async def test_a_long_password(self, wiki: Site) -> None:
        """A password of any length that fits the form is checked, and wrong."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            for password in ("", "x" * 60_000, "\0", "\N{GRINNING FACE}" * 500):
                assert (await browser.allow(page, password)).status_code == 403


class TestSettings:
    """The settings of the password."""

    async def test_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """MCP_OAUTH_PASSWORD_HASH is enough: the server asks for that password, and accepts no other."""
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", HASH)
        async with site(tmp_path / "oauth.db", approval={"password_hash": None}) as wiki, Browser() as browser:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            assert (await browser.allow(page, HASH)).status_code == 403
            assert "code" in query_of((await browser.allow(page)).headers["location"])

    @pytest.mark.parametrize(
        "broken",
        [HASH[:-2], HASH[:30], HASH.replace("$", ""), PASSWORD, f"{HASH} "],
        ids=["shorter", "cut off", "without dollars", "a password", "with a space"],
    )
    def test_a_broken_hash_in_the_environment(self, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hash that is cut off, or was changed by a shell, is an error at construction that does not repeat it."""
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", broken)
        with pytest.raises(ConfigurationError, match="MCP_OAUTH_PASSWORD_HASH is not an argon2 hash; run") as caught:
            PasswordApproval()
        assert broken not in str(caught.value)

    def test_an_empty_password(self) -> None:
        """The hash of an empty password is refused."""
        with pytest.raises(ConfigurationError, match="is the hash of an empty password"):
            PasswordApproval(password_hash=slow.hash(""))


def without_nonce(answer: Any, user: str) -> str:
    """Return a page without its nonce and the entered user name."""
    nonce = answer.headers["content-security-policy"].partition("nonce-")[2].partition("'")[0]
    return str(answer.text).replace(nonce, "").replace(f'value="{user}"', "")
