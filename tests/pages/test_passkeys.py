"""Passkeys over HTTP: what the server accepts, once, and everything that it refuses."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from oauth_store import ConfigurationError, PasskeyApproval, SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database.backup import backup
from oauth_store.database.copy import copy
from oauth_store.database.models import CHALLENGE, ENROLLMENT, PASSKEY, SESSION, Token
from oauth_store.database.purge import purge
from oauth_store.flows.passkeys import create_link
from oauth_store.webauthn import decoded, encoded
from tests.clocks import stopped
from tests.databases import rows_of, tokens_of, transaction
from tests.passkeys import (
    PRESENT,
    VERIFIED,
    Authenticator,
    add,
    ask,
    confirm,
    enroll,
    link_of,
    passkey_site,
    passkeys_of,
    remove_passkey,
    send,
    sign_in,
    touch,
)
from tests.scopes import SCOPES
from tests.serving import free_port
from tests.sites import HASH, PASSWORD, USERS, Browser, Site, csrf_of, site
from tests.steps import registration_options


@pytest.fixture
async def wiki(tmp_path: Path) -> AsyncIterator[Site]:
    """A server with a host name that asks for a password, or for a passkey."""
    async with passkey_site(tmp_path / "oauth.db") as served:
        yield served


@pytest.fixture
async def device(wiki: Site) -> Authenticator:
    """A device with a passkey of the server."""
    return await enroll(wiki)


async def rows_of_kind(wiki: Site, kind: str) -> int:
    """How many rows of a kind there are."""
    return len(await rows_of(wiki.provider, select(Token.kind).where(Token.kind == kind)))


class TestEnrollment:
    """The link that adds a passkey."""

    async def test_what_is_stored(self, database_url: str) -> None:
        """On every database a passkey is one row of its own kind, without the link; the link's row is gone."""
        async with passkey_site(database_url) as wiki:
            link = await link_of(wiki)
            secret = link.partition("#")[2]
            [row] = await tokens_of(wiki.provider)
            assert (row.kind, row.token_hash, row.expires_at - row.created_at) == (ENROLLMENT, hash_secret(secret), 600)
            authenticator = Authenticator(wiki.url, count=3)
            async with Browser() as browser:
                assert (await add(browser, wiki, authenticator, secret)).status_code == 303
            [row] = await tokens_of(wiki.provider)
            assert (row.kind, row.subject, row.resource) == (PASSKEY, "owner", f"{wiki.url}/mcp")
            assert (row.token_hash, row.granted_at) == (hash_secret(encoded(authenticator.credential_id)), 3)
            assert json.loads(row.scopes) == {
                "id": encoded(authenticator.credential_id),
                "name": "My phone",
                "url": wiki.url,
                "transports": ["internal", "hybrid"],
            }
            assert secret not in str(row)

    async def test_once(self, database_url: str) -> None:
        """Of fifty browsers at once with one link, on every database, one adds its passkey."""
        async with passkey_site(database_url) as wiki:
            secret = (await link_of(wiki)).partition("#")[2]

            async def one(number: int) -> int:
                async with Browser(**{"X-Forwarded-For": f"203.0.113.{number}"}) as browser:
                    return (await add(browser, wiki, Authenticator(wiki.url), secret)).status_code

            statuses = await asyncio.gather(*(one(number) for number in range(50)))
            assert sorted(statuses) == [303] + [403] * 49
            assert len(await passkeys_of(wiki)) == 1

    async def test_too_late(self, wiki: Site) -> None:
        """After ten minutes a link is over, also if its challenge was asked for in time."""
        with stopped() as clock:
            secret = (await link_of(wiki)).partition("#")[2]
            async with Browser() as browser:
                clock.shift(599)
                asked = await browser.http.post(f"{wiki.url}/passkey", data={"link": secret, "question": "passkey"})
                made = Authenticator(wiki.url).create(asked.json())
                clock.shift(2)
                late = await browser.http.post(f"{wiki.url}/passkey", data={"link": secret, "passkey": made})
        assert (late.status_code, "is older than 10 minutes" in late.text) == (403, True)
        assert await passkeys_of(wiki) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"origin": "https://evil.example"},
            {"rp_id": "evil.example"},
            {"flags": PRESENT},
            {"flags": VERIFIED},
            {"kind": {"create": "webauthn.get"}},
            {"cross_origin": True},
        ],
        ids=str,
    )
    async def test_what_is_refused(self, wiki: Site, change: dict[str, Any]) -> None:
        """A passkey of another origin or host, without its user's verification, or of another type is not added."""
        secret = (await link_of(wiki)).partition("#")[2]
        async with Browser() as browser:
            answered = await add(browser, wiki, Authenticator(**{"origin": wiki.url, **change}), secret)
            assert answered.status_code == 403
            assert "nothing was added" in answered.text
            assert await passkeys_of(wiki) == []
            assert (await add(browser, wiki, Authenticator(wiki.url), secret)).status_code == 303  # the link is left

    async def test_the_challenge_of_another_link(self, wiki: Site) -> None:
        """A response to the challenge of one link adds nothing with another, nor does one to a challenge made up."""
        first, second = [(await link_of(wiki)).partition("#")[2] for _ in range(2)]
        async with Browser() as browser:
            asked = await browser.http.post(f"{wiki.url}/passkey", data={"link": first, "question": "passkey"})
            for options in (asked.json(), {**asked.json(), "challenge": secrets.token_urlsafe(32)}):
                made = Authenticator(wiki.url).create(options)
                answered = await browser.http.post(f"{wiki.url}/passkey", data={"link": second, "passkey": made})
                assert answered.status_code == 403
        assert await passkeys_of(wiki) == []

    async def test_a_key_that_is_known(self, wiki: Site, device: Authenticator) -> None:
        """One key is one passkey: adding it again, for any user, changes nothing."""
        secret = (await link_of(wiki, name="again")).partition("#")[2]
        async with Browser() as browser:
            assert (await add(browser, wiki, device, secret)).status_code == 403
        assert [passkey.name for passkey in await passkeys_of(wiki)] == ["My phone"]

    async def test_another_server(self, tmp_path: Path) -> None:
        """The link of one server adds nothing at another one on its database, whose passkeys are its own."""
        path = tmp_path / "oauth.db"
        async with passkey_site(path) as wiki, passkey_site(path) as calendar, Browser() as browser:
            secret = (await link_of(wiki)).partition("#")[2]
            assert (await add(browser, calendar, Authenticator(calendar.url), secret)).status_code == 403
            device = await enroll(wiki)
            page = await browser.open(await calendar.authorize_url())
            assert "passkey" not in page.text
            await enroll(calendar, name="of the calendar")
            device.origin = calendar.url
            answered = await touch(browser, page, device)
            assert answered.status_code == 403

    @pytest.mark.parametrize(("users", "user"), [(None, "ada"), (USERS, "owner"), (USERS, "eve")])
    async def test_a_user_who_does_not_exist(self, tmp_path: Path, users: Any, user: str) -> None:
        """The page says that the server has no such user, and adds nothing."""
        approval = {} if users is None else {"users": users}
        async with passkey_site(tmp_path / "oauth.db", approval=approval) as wiki, Browser() as browser:
            secret = (await link_of(wiki, user=user)).partition("#")[2]
            answered = await add(browser, wiki, Authenticator(wiki.url), secret)
            assert (answered.status_code, f"no user {user}" in answered.json()["error"]) == (403, True)
            assert await passkeys_of(wiki) == []

    async def test_an_address(self, tmp_path: Path) -> None:
        """A server at an IP address says why it has no passkeys; its password works, and PasskeyApproval fails."""
        async with site(tmp_path / "oauth.db") as wiki, Browser() as browser:
            page = await browser.open(f"{wiki.url}/passkey")
            port = wiki.url.rpartition(":")[2]
            assert f"use http://localhost:{port} as base_url" in page.text
            assert (await browser.http.post(f"{wiki.url}/apps", data={"question": "passkey"})).status_code == 400
            assert "Sign out" in (await browser.sign_in(f"{wiki.url}/apps")).text
        for url in ("http://127.0.0.1:8000", "http://[::1]:8000"):
            provider = SQLAlchemyOAuthProvider(":memory:", base_url=url, approval=PasskeyApproval())
            with pytest.raises(ConfigurationError, match="passkeys are for a host name"):
                provider.get_routes("/mcp")

    async def test_guesses_are_limited(self, wiki: Site) -> None:
        """After ten wrong links an address has to wait, but never with a right one, and its challenges are limited."""
        secret = (await link_of(wiki)).partition("#")[2]
        async with Browser() as browser:
            statuses = [
                (await add(browser, wiki, Authenticator(wiki.url), "enrollment_x")).status_code for _ in range(11)
            ]
            assert statuses == [403] * 10 + [429]
            data = {"link": secret, "question": "passkey"}
            asked = [(await browser.http.post(f"{wiki.url}/passkey", data=data)).status_code for _ in range(60)]
            assert asked == [200] * 60
            assert (await browser.http.post(f"{wiki.url}/passkey", data=data)).status_code == 429
            secret = (await link_of(wiki)).partition("#")[2]
            assert (await add(browser, wiki, Authenticator(wiki.url), secret)).status_code == 303

    async def test_a_passkey_that_could_never_sign_in(self, wiki: Site) -> None:
        """One whose id is longer than WebAuthn allows is refused, and its link stays good."""
        secret = (await link_of(wiki)).partition("#")[2]
        async with Browser() as browser:
            device = Authenticator(wiki.url)
            device.credential_id = b"x" * 1024
            assert (await add(browser, wiki, device, secret)).status_code == 403
            assert (await add(browser, wiki, Authenticator(wiki.url), secret)).status_code == 303

    async def test_a_foreign_form(self, wiki: Site) -> None:
        """A page elsewhere cannot use a link that it knows."""
        secret = (await link_of(wiki)).partition("#")[2]
        async with Browser(Origin="https://evil.example") as browser:
            assert (await add(browser, wiki, Authenticator(wiki.url), secret)).status_code == 403
        assert await passkeys_of(wiki) == []


class TestConsent:
    """One touch on the consent page."""

    async def test_it_allows(self, database_url: str) -> None:
        """On every database, one touch signs in and allows the app, for the user of the passkey."""
        async with passkey_site(database_url, approval={"users": USERS}) as wiki, Browser() as browser:
            device = await enroll(wiki, user="bob")
            url = await wiki.authorize_url()
            answered = await touch(browser, await browser.open(url), device)
            token = await wiki.redeem(url, answered.headers["location"])
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.subject == "bob"
            assert await rows_of_kind(wiki, CHALLENGE) == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"origin": "https://evil.example"},
            {"origin": "http://localhost"},
            {"origin": "https://localhost.evil.example"},
            {"rp_id": "evil.example"},
            {"flags": PRESENT},
            {"flags": VERIFIED},
            {"flags": 0},
            {"kind": {"get": "webauthn.create"}},
            {"kind": {"get": "payment.get"}},
            {"cross_origin": True},
            {"user_handle": ""},
            {"user_handle": "AAAA"},
            {"key": Authenticator("").key},
            {"credential_id": b"unknown"},
        ],
        ids=lambda change: "-".join(change),
    )
    async def test_what_is_refused(self, wiki: Site, device: Authenticator, change: dict[str, Any]) -> None:
        """An assertion of another origin, host, type, user or key, or without verification, allows nothing."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            kept = {name: getattr(device, name) for name in change}
            for name, value in change.items():
                setattr(device, name, value)
            answered = await touch(browser, page, device)
            assert answered.status_code == 403
            assert 'role="alert"' in answered.text
            for name, value in kept.items():
                setattr(device, name, value)
            assert (await touch(browser, page, device)).status_code == 303

    async def test_a_challenge_is_used_once(self, wiki: Site, device: Authenticator) -> None:
        """A response that was accepted is refused the second time, for the same request and the same browser."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            signed = device.sign((await ask(browser, page)).json())
            assert (await send(browser, page, passkey=signed)).status_code == 303
            replayed = await send(browser, page, passkey=signed)
            assert (replayed.status_code, "was not accepted" in replayed.text) == (403, True)

    async def test_fifty_at_once(self, database_url: str) -> None:
        """Of fifty requests with one response, on every database, one is accepted."""
        async with passkey_site(database_url) as wiki, Browser() as browser:
            device = await enroll(wiki)
            page = await browser.open(await wiki.authorize_url())
            signed = device.sign((await ask(browser, page)).json())
            approval: Any = wiki.provider._approval
            approval.sign_in._limiter.retry_after = lambda *_: None
            answers = await asyncio.gather(*(send(browser, page, passkey=signed) for _ in range(50)))
            assert sorted(answer.status_code for answer in answers) == [303] + [403] * 49

    async def test_five_minutes(self, wiki: Site, device: Authenticator) -> None:
        """A challenge can be answered for five minutes, and not longer."""
        for seconds, status in ((299, 303), (301, 403)):
            with stopped() as clock:
                async with Browser() as browser:
                    page = await browser.open(await wiki.authorize_url())
                    asked = await ask(browser, page)
                    clock.shift(seconds)
                    answered = await send(browser, page, passkey=device.sign(asked.json()))
                    assert answered.status_code == status

    async def test_another_request(self, wiki: Site, device: Authenticator) -> None:
        """The touch for one request of an app allows no other request of it, nor one of another app."""
        async with Browser() as browser:
            url = await wiki.authorize_url(client_id="app")
            pages = [
                await browser.open(url),
                await browser.open(url),
                await browser.open(await wiki.authorize_url(client_id="other")),
            ]
            signed = device.sign((await ask(browser, pages[0])).json())
            assert (await send(browser, pages[1], passkey=signed)).status_code == 403
            assert (await send(browser, pages[2], passkey=signed)).status_code == 403
            assert (await send(browser, pages[0], passkey=signed)).status_code == 303

    async def test_other_scopes(self, tmp_path: Path) -> None:
        """The touch for some scopes allows no others, neither more nor fewer."""
        options = registration_options(*SCOPES)
        async with (
            passkey_site(tmp_path / "oauth.db", client_registration_options=options) as wiki,
            Browser() as browser,
        ):
            device = await enroll(wiki)
            url = await wiki.authorize_url(asks="read write", scope="read write")
            page = await browser.open(url)
            signed = device.sign((await ask(browser, page, scope=["read", "write"])).json())
            for other in (["read"], ["read", "write", "admin"], ["admin"]):
                assert (await send(browser, page, passkey=signed, scope=other)).status_code == 403
            answered = await send(browser, page, passkey=signed, scope=["write", "read"])
            assert (await wiki.redeem(url, answered.headers["location"])).scope == "read write"

    async def test_a_host_that_the_request_names(self, wiki: Site, device: Authenticator) -> None:
        """The origin is compared with base_url, whatever Host and forwarding headers say."""
        device.origin = "http://evil.example"
        headers = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http"}
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            browser.http.headers.update(headers)
            answered = await touch(browser, page, device)
            assert (answered.status_code, "was not accepted" in answered.text) == (403, True)
            device.origin = wiki.url
            assert (await touch(browser, page, device)).status_code == 303

    async def test_under_a_path(self, tmp_path: Path) -> None:
        """A server under a path of its host has passkeys too."""
        port = free_port()
        async with (
            passkey_site(tmp_path / "oauth.db", port=port, path="/wiki") as wiki,
            Browser() as browser,
        ):
            device = await enroll(wiki)
            page = await browser.open(await wiki.authorize_url())
            assert (await touch(browser, page, device)).status_code == 303
            assert "Sign out" in (await sign_in(browser, wiki, device)).text

    async def test_a_device(self, tmp_path: Path) -> None:
        """One touch lets in a device that showed a code (RFC 8628)."""
        async with passkey_site(tmp_path / "oauth.db", device_authorization=True) as wiki, Browser() as browser:
            passkey = await enroll(wiki)
            metadata: dict[str, Any] = {
                "grant_types": ["urn:ietf:params:oauth:grant-type:device_code"],
                "redirect_uris": None,
            }
            client_id = await wiki.register(**metadata)
            url, form = f"{wiki.url}/device_authorization", {"client_id": client_id}
            codes = (await browser.http.post(url, data=form)).json()
            typed = await browser.http.post(f"{wiki.url}/device", data={"user_code": codes["user_code"]})
            page = await browser.open(typed.headers["location"])
            answered = await touch(browser, page, passkey)
            assert answered.headers["location"].endswith("/device?answer=allowed")
            form |= {"grant_type": metadata["grant_types"][0], "device_code": codes["device_code"]}
            assert "access_token" in (await browser.http.post(f"{wiki.url}/token", data=form)).json()

    async def test_another_browser(self, wiki: Site, device: Authenticator) -> None:
        """A response that was stolen on its way is refused in another browser."""
        async with Browser() as browser, Browser() as thief:
            page = await browser.open(await wiki.authorize_url())
            signed = device.sign((await ask(browser, page)).json())
            assert (await send(thief, page, passkey=signed)).status_code == 403
            of_thief = await thief.open(await wiki.authorize_url())
            assert (await send(thief, of_thief, passkey=signed)).status_code == 403

    async def test_a_challenge_for_something_else(self, wiki: Site, device: Authenticator) -> None:
        """A touch to sign in, or to add a passkey, allows no app; neither does a challenge that was made up."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            to_sign_in = (await browser.http.post(f"{wiki.url}/apps", data={"question": "passkey"})).json()
            secret = (await link_of(wiki)).partition("#")[2]
            to_add = (
                await browser.http.post(f"{wiki.url}/passkey", data={"link": secret, "question": "passkey"})
            ).json()
            for challenge in (to_sign_in["challenge"], to_add["challenge"], secrets.token_urlsafe(32), "", "AA"):
                answered = await send(browser, page, passkey=device.sign({}, challenge))
                assert answered.status_code == 403

    async def test_a_count_that_goes_back(self, wiki: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A signature counter has to grow; if it does not, the log names the reason. One that never counts is fine."""
        device = await enroll(wiki, count=5)
        async with Browser() as browser:
            for count, status in ((6, 303), (6, 403), (5, 403), (0, 403), (9, 303), (8, 403), (2**32 - 1, 303)):
                device.count = count
                page = await browser.open(await wiki.authorize_url())
                assert (await touch(browser, page, device)).status_code == status
        assert caplog.text.count("the passkey's count went back") == 4
        still = await enroll(wiki, name="never counts")
        async with Browser() as browser:
            for count, status in ((0, 303), (0, 303), (1, 303), (0, 403)):
                still.count = count
                page = await browser.open(await wiki.authorize_url())
                assert (await touch(browser, page, still)).status_code == status

    async def test_a_removed_key(self, wiki: Site, device: Authenticator) -> None:
        """A passkey that was removed after the challenge is refused; another one of the user still works."""
        second = await enroll(wiki, name="second")
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            signed = device.sign((await ask(browser, page)).json())
            await remove_passkey(wiki, "My phone")
            answered = await send(browser, page, passkey=signed)
            assert (answered.status_code, "does not know that passkey" in answered.text) == (403, True)
            assert (await touch(browser, page, second)).status_code == 303

    async def test_a_user_who_left(self, tmp_path: Path) -> None:
        """The passkey of a user who is no longer among the users is refused."""
        path, port = tmp_path / "oauth.db", free_port()
        async with passkey_site(path, port=port, approval={"users": USERS}) as wiki:
            device = await enroll(wiki, user="bob")
            await enroll(wiki, user="ada")
        ada = {"users": {"ada": USERS["ada"]}}
        async with passkey_site(path, port=port, approval=ada) as wiki, Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            assert (await touch(browser, page, device)).status_code == 403

    @pytest.mark.parametrize(
        "nonsense",
        [
            "{}",
            "[]",
            "x",
            '{"id": 1}',
            '{"id": "x"}',
            "[" * 20_000,
            '{"id": "' + "x" * 2000 + '"}',
            '{"id": "é"}',
            "null",
        ],
        ids=lambda text: text[:12],
    )
    async def test_nonsense(self, wiki: Site, device: Authenticator, nonsense: str) -> None:
        """What no browser sends is refused as any wrong passkey is; never a 500."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            assert (await send(browser, page, passkey=nonsense)).status_code == 403
            right = json.loads(device.sign((await ask(browser, page)).json()))
            for place, value in (
                ("signature", ""),
                ("signature", right["response"]["authenticatorData"]),
                ("authenticatorData", ""),
                ("authenticatorData", "AAAA"),
                ("clientDataJSON", ""),
                ("clientDataJSON", encoded(b"[1]")),
                ("userHandle", 5),
            ):
                wrong = {**right, "response": {**right["response"], place: value}}
                assert (await send(browser, page, passkey=json.dumps(wrong))).status_code in (403, 429)

    async def test_attempts_count(self, wiki: Site, device: Authenticator) -> None:
        """Wrong passkeys count as wrong passwords do, with which they share a limit; a right one always gets in."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            for _ in range(9):
                assert (await touch(browser, page, device)).status_code == 303
            statuses = [(await send(browser, page, passkey="wrong")).status_code for _ in range(20)]
            assert statuses == [403] * 20
            assert (await send(browser, page, passkey="wrong")).status_code == 429  # the browser is known
        async with Browser() as stranger:
            page = await stranger.open(await wiki.authorize_url())
            for _ in range(5):
                assert (await send(stranger, page, passkey="wrong")).status_code == 403
                assert (await stranger.allow(page, "wrong")).status_code == 403
            answered = await send(stranger, page, passkey="wrong")
            assert (answered.status_code, "Too many attempts" in answered.text) == (429, True)
            assert (await stranger.allow(page)).status_code == 429
            assert (await touch(stranger, page, device)).status_code == 303

    async def test_a_flood_of_guesses_locks_no_passkey_out(self, wiki: Site, device: Authenticator) -> None:
        """Wrong passwords from anywhere use up the total of passwords, and not that of passkeys."""
        async with Browser() as attacker, Browser() as owner:
            for number in range(101):
                headers = {"X-Forwarded-For": f"203.0.113.{number}"}
                data = {"password": "guess"}
                last = await attacker.http.post(f"{wiki.url}/apps", data=data, headers=headers)
            assert last.status_code == 429
            page = await owner.open(await wiki.authorize_url())
            assert (await owner.allow(page)).status_code == 429
            assert (await touch(owner, page, device)).status_code == 303

    async def test_challenges_are_limited(self, wiki: Site, device: Authenticator) -> None:
        """A request gets ten challenges in 15 minutes, and an address without one sixty: each leaves a row."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            statuses = [(await ask(browser, page)).status_code for _ in range(11)]
            assert statuses == [200] * 10 + [429]
            assert "Too many attempts" in (await ask(browser, page)).json()["error"]
            data = {"question": "passkey"}
            statuses = [(await browser.http.post(f"{wiki.url}/apps", data=data)).status_code for _ in range(61)]
            assert statuses == [200] * 60 + [429]
            another = await browser.open(await wiki.authorize_url())
            assert (await ask(browser, another)).status_code == 200

    async def test_the_log(self, wiki: Site, device: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
        """A failed attempt is logged with its address and reason; no challenge, response or link is in the log."""
        caplog.set_level(logging.DEBUG)
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            asked = (await ask(browser, page)).json()
            device.flags = PRESENT
            await send(browser, page, passkey=device.sign(asked))
        ours = [record.getMessage() for record in caplog.records if record.name == "oauth_store"]
        assert "sign-in failed: address=127.0.0.1 reason=wrong" in ours
        assert asked["challenge"] not in caplog.text


class TestApps:
    """Passkeys on the page of connected apps."""

    async def test_signing_in(self, database_url: str) -> None:
        """On every database a passkey begins a session of its user, who sees their own apps."""
        async with passkey_site(database_url, approval={"users": USERS}) as wiki, Browser() as browser:
            for name in ("ada", "bob"):
                await wiki.connect(subject=name, client_name=f"App of {name}")
            page = await sign_in(browser, wiki, await enroll(wiki, user="ada"))
            assert ("App of ada" in page.text, "App of bob" in page.text) == (True, False)

    async def test_the_session_ends_with_the_passkey(self, database_url: str) -> None:
        """On every database the sessions of a removed passkey end, and no others."""
        async with passkey_site(database_url) as wiki, Browser() as one, Browser() as other, Browser() as third:
            first, second = await enroll(wiki), await enroll(wiki, name="second")
            await sign_in(one, wiki, first)
            await sign_in(other, wiki, second)
            await third.sign_in(f"{wiki.url}/apps")
            await remove_passkey(wiki, "My phone")
            pages = [await browser.open(f"{wiki.url}/apps") for browser in (one, other, third)]
            assert ["Sign out" in page.text for page in pages] == [False, True, True]

    async def test_a_session_in_another_way(self, wiki: Site, device: Authenticator) -> None:
        """A session that a passkey began is none by password, whatever its cookie is made to look like."""
        async with Browser() as browser:
            await sign_in(browser, wiki, device)
        async with transaction(wiki.provider) as session:
            await session.execute(update(Token).where(Token.kind == SESSION).values(scopes="password"))
            await session.commit()
        async with Browser() as again:
            again.http.cookies.update(browser.http.cookies)
            assert "Sign out" not in (await again.open(f"{wiki.url}/apps")).text

    @pytest.mark.parametrize("fields", [{"revoke": "all"}, {"create": "token", "name": "n8n", "expires": "1y"}])
    async def test_what_is_confirmed(self, wiki: Site, device: Authenticator, fields: dict[str, str]) -> None:
        """Revoke all and New token ask for the passkey, or the password, again; without either they do nothing."""
        token = await wiki.connect()
        done = "no longer has access" if "revoke" in fields else "Copy it now"
        async with Browser() as browser:
            page = await sign_in(browser, wiki, device)
            for proof in ({}, {"password": "wrong"}, {"passkey": "wrong"}):
                refused = await browser.submit(page, {**fields, **proof})
                assert (refused.status_code, done in refused.text) == (403, False)
            assert await wiki.provider.verify_token(token.access_token) is not None
            assert done in (await confirm(browser, page, device, **fields)).text
            assert done in (await browser.submit(page, {**fields, "password": PASSWORD, "name": "other"})).text or (
                "revoke" in fields
            )

    async def test_a_touch_confirms_one_thing(self, wiki: Site, device: Authenticator) -> None:
        """A touch to revoke all makes no token, one for one token no other; in another session it does nothing."""
        async with Browser() as browser, Browser() as other:
            page, elsewhere = await sign_in(browser, wiki, device), await sign_in(other, wiki, device)
            token = {"create": "token", "name": "n8n", "expires": "30d"}

            async def signed(**fields: str) -> str:
                data = {"csrf": csrf_of(page), **fields, "question": "passkey"}
                return device.sign((await browser.http.post(f"{wiki.url}/apps", data=data)).json())

            for proof, where, sent, fields in (
                (await signed(revoke="all"), browser, page, token),
                (await signed(**token), browser, page, {**token, "expires": "never"}),
                (await signed(**token), browser, page, {**token, "name": "another"}),
                (await signed(**token), other, elsewhere, token),
            ):
                answered = await where.submit(sent, {**fields, "passkey": proof})
                assert (answered.status_code, "was not accepted" in answered.text) == (403, True)

    async def test_signing_in_elsewhere(self, wiki: Site, device: Authenticator) -> None:
        """The response to a challenge signs in the browser that asked for it, and no other; and once."""
        async with Browser() as browser, Browser() as thief:
            asked = await browser.http.post(f"{wiki.url}/apps", data={"question": "passkey"})
            data = {"passkey": device.sign(asked.json())}
            assert (await thief.http.post(f"{wiki.url}/apps", data=data)).status_code == 403
            assert (await browser.http.post(f"{wiki.url}/apps", data=data)).status_code == 303
            browser.http.cookies.delete(wiki.provider.cookies._name("oauth_store_session"))
            assert (await browser.http.post(f"{wiki.url}/apps", data=data)).status_code == 403

    async def test_another_user_does_not_confirm(self, tmp_path: Path) -> None:
        """Bob's passkey does not confirm what Ada's session asks for, nor does his password."""
        async with passkey_site(tmp_path / "oauth.db", approval={"users": USERS}) as wiki, Browser() as browser:
            token = await wiki.connect(subject="ada")
            bob = await enroll(wiki, user="bob")
            page = await browser.sign_in(f"{wiki.url}/apps", "ada's password", username="ada")
            refused = await confirm(browser, page, bob, revoke="all")
            assert (refused.status_code, "signed in as another user" in refused.text) == (403, True)
            form = {"revoke": "all", "password": "bob's password", "username": "bob"}
            assert (await browser.submit(page, form)).status_code == 403
            assert await wiki.provider.verify_token(token.access_token) is not None

    async def test_a_form_after_the_session(self, wiki: Site, device: Authenticator) -> None:
        """Once signed out, a form of the list signs nobody in, with the right password neither."""
        async with Browser() as browser:
            page = await sign_in(browser, wiki, device)
            await browser.submit(page, {"sign_out": "yes"})
            answered = await browser.submit(page, {"revoke": "all", "password": PASSWORD})
            assert "You were signed out." in answered.text


class TestPasskeyApproval:
    """Passkeys alone."""

    async def test_nobody_gets_in_without_one(self, tmp_path: Path) -> None:
        """Before the first passkey the pages say what to run, and no form lets anyone in; then its touch does."""
        async with passkey_site(tmp_path / "oauth.db", passkeys_only=True) as wiki, Browser() as browser:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            assert "oauth-store passkey add" in page.text
            for fields in ({}, {"password": PASSWORD}, {"password": ""}, {"passkey": ""}, {"passkey": "{}"}):
                assert (await send(browser, page, **fields)).status_code == 403
                assert (await browser.http.post(f"{wiki.url}/apps", data=fields)).status_code in (200, 403)
            assert "Sign out" not in (await browser.open(f"{wiki.url}/apps")).text
        async with passkey_site(tmp_path / "oauth.db", passkeys_only=True) as wiki, Browser() as browser:
            device = await enroll(wiki)
            page = await browser.open(await wiki.authorize_url())
            assert 'type="password"' not in page.text
            assert (await browser.allow(page)).status_code == 403
            assert (await touch(browser, page, device)).status_code == 303

    def test_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A password that would be ignored, users without a name, and a missing extra are errors at construction."""
        for users in ([], [" ada"], [""]):
            with pytest.raises(ConfigurationError, match="users"):
                PasskeyApproval(users=users)
        monkeypatch.setattr("oauth_store.webauthn.find_spec", lambda _: None)
        with pytest.raises(ConfigurationError, match=r"fastmcp-oauth-store\[passkeys\]"):
            PasskeyApproval()
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", HASH)
        with pytest.raises(ConfigurationError, match="never asks for the password"):
            PasskeyApproval()

    async def test_without_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server with a password works without fido2; the page of a link says what to install."""
        async with passkey_site(tmp_path / "oauth.db") as wiki:
            device = await enroll(wiki)
            port = int(wiki.url.rpartition(":")[2])
        monkeypatch.setattr("oauth_store.webauthn.find_spec", lambda _: None)
        async with passkey_site(tmp_path / "oauth.db", port=port) as wiki, Browser() as browser:
            assert "fastmcp-oauth-store[passkeys]" in (await browser.open(await link_of(wiki))).text
            page = await browser.open(await wiki.authorize_url())
            assert "with a passkey" not in page.text
            proof = device.sign({}, secrets.token_urlsafe(32))
            assert (await send(browser, page, passkey=proof)).status_code == 403
            assert (await browser.allow(page)).status_code == 303

    async def test_users(self, tmp_path: Path) -> None:
        """With users, each passkey is of one of them, whose name the tokens have."""
        approval = {"users": ["ada", "bob"]}
        async with (
            passkey_site(tmp_path / "oauth.db", passkeys_only=True, approval=approval) as wiki,
            Browser() as browser,
        ):
            url = await wiki.authorize_url()
            answered = await touch(browser, await browser.open(url), await enroll(wiki, user="bob"))
            token = await wiki.redeem(url, answered.headers["location"])
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.subject == "bob"


class TestDatabase:
    """What a reader of the database gets, and what other flows make of the rows."""

    async def test_a_reader_gets_nothing_to_sign_in_with(self, database_url: str) -> None:
        """No link, challenge or session is stored as it is; ids and public keys answer no challenge."""
        async with passkey_site(database_url) as wiki, Browser() as browser:
            device = await enroll(wiki)
            secret = (await link_of(wiki)).partition("#")[2]
            page = await browser.open(await wiki.authorize_url())
            challenge = (await ask(browser, page)).json()["challenge"]
            await sign_in(browser, wiki, device)
            stored = repr(await tokens_of(wiki.provider))
            for text in (secret, challenge, repr(decoded(challenge)), *browser.http.cookies.values()):
                assert text not in stored
            [passkey] = await passkeys_of(wiki)
            thief = Authenticator(wiki.url, credential_id=decoded(passkey.credential_id))
            thief.user_handle = passkey.user_handle
            assert (await touch(browser, page, thief)).status_code == 403

    async def test_no_row_is_a_token(self, database_url: str) -> None:
        """Neither a link nor the id of a passkey nor a challenge is a token, a session, or ends a grant at /revoke."""
        async with passkey_site(database_url) as wiki, Browser() as browser:
            device = await enroll(wiki)
            page = await browser.open(await wiki.authorize_url())
            challenge = (await ask(browser, page)).json()["challenge"]
            client = await wiki.register()
            texts = ((await link_of(wiki)).partition("#")[2], encoded(device.credential_id), challenge)
            for text in texts:
                assert await wiki.provider.verify_token(text) is None
                cookie = f"{wiki.provider.cookies._name('oauth_store_session')}={text}"
                async with Browser(Cookie=cookie) as attacker:
                    assert "Sign out" not in (await attacker.open(f"{wiki.url}/apps")).text
                form = {"token": text, "client_id": client}
                assert (await browser.http.post(f"{wiki.url}/revoke", data=form)).status_code == 200
                form = {"grant_type": "refresh_token", "refresh_token": text, "client_id": client}
                assert (await browser.http.post(f"{wiki.url}/token", data=form)).json()["error"] == "invalid_grant"
            assert len(await passkeys_of(wiki)) == 1
            token = await wiki.connect()
            proof = json.loads(device.sign({}, challenge))
            answered = await send(browser, page, passkey=json.dumps({**proof, "id": token.access_token}))
            assert answered.status_code == 403
            for other in (token.access_token, texts[1], texts[2]):
                answered = await add(browser, wiki, Authenticator(wiki.url), other)
                assert answered.status_code == 403

    async def test_a_copy_and_a_backup(self, tmp_path: Path) -> None:
        """The passkeys of a database that was copied, or restored from a backup, sign in."""
        path, port = tmp_path / "oauth.db", free_port()
        async with passkey_site(path, port=port) as wiki:
            device = await enroll(wiki)
        await copy(str(path), str(tmp_path / "copy.db"))
        await asyncio.to_thread(backup, str(path), tmp_path / "backup.db")
        for name in ("copy.db", "backup.db"):
            async with passkey_site(tmp_path / name, port=port) as wiki, Browser() as browser:
                assert "Sign out" in (await sign_in(browser, wiki, device)).text

    async def test_the_purge(self, database_url: str) -> None:
        """On every database, links and challenges are deleted once they have expired, and passkeys never."""
        async with passkey_site(database_url) as wiki, Browser() as browser:
            await enroll(wiki)
            await link_of(wiki)
            asked = int(time.time())
            await browser.http.post(f"{wiki.url}/apps", data={"question": "passkey"})
            assert len(await tokens_of(wiki.provider)) == 3
            for now, left in ((asked + 299, 3), (asked + 20 * 365 * 24 * 3600, 1)):
                await wiki.provider._store.write(purge, now)
                assert len(await tokens_of(wiki.provider)) == left
            assert len(await passkeys_of(wiki)) == 1

    async def test_a_name_in_two_spellings(self, tmp_path: Path) -> None:
        """A link for a name in another spelling of Unicode is for the same user."""
        users = {"Zoe\u0308": HASH}
        async with passkey_site(tmp_path / "oauth.db", approval={"users": users}) as wiki:
            link = await wiki.provider._store.write(create_link, "Zo\u00eb", "phone", wiki.url)
            assert link.user == "Zo\u00eb"
            await enroll(wiki, user="Zoe\u0308")
