"""Devices without a browser (RFC 8628): the two codes, the owner's answer, the tokens, and everyone else who tries."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from limits import parse
from mcp.server.auth.provider import AuthorizeError
from sqlalchemy import select

from oauth_store import (
    AuthorizationRequest,
    AutoApproval,
    ConfigurationError,
    RateLimits,
    SQLAlchemyOAuthProvider,
)
from oauth_store.credentials import device_handle, hash_secret, user_code_of
from oauth_store.database.models import Code
from oauth_store.flows.connected import DEVICE_CODE, end_all
from oauth_store.flows.explain import explain
from oauth_store.flows.registered import remove_client
from oauth_store.masking import masked
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import SignedIn
from tests.approvals import Asks
from tests.assertions import Signer, asserting, claims_of
from tests.clocks import turned
from tests.databases import rows_of, transaction
from tests.devices import Device, asking, error_of
from tests.documents import DocumentHost
from tests.endpoints import Server, running
from tests.sites import USERS, Browser, Site, site
from tests.steps import BASE_URL, registration_options

SCOPES = registration_options("read", "write")


@pytest.fixture
async def home(database_url: str) -> AsyncIterator[Site]:
    """A server with a password, for devices too, on each database."""
    async with site(database_url, device_authorization=True, client_registration_options=SCOPES) as served:
        yield served


@pytest.fixture
async def devices(tmp_path: Path) -> AsyncIterator[Site]:
    """The same on a file."""
    async with site(tmp_path / "oauth.db", device_authorization=True, client_registration_options=SCOPES) as served:
        yield served


async def typed(browser: Browser, home: Site, code: str, **headers: str) -> httpx2.Response:
    """The page that follows when the owner types a code."""
    answer = await browser.http.post(f"{home.url}/device", data={"user_code": code}, headers=headers)
    return await browser.open(answer.headers["location"]) if answer.status_code == 303 else answer


async def allowed(browser: Browser, home: Site, device: Device) -> None:
    """The owner types the code and the password."""
    answer = await browser.allow(await typed(browser, home, device.user_code))
    assert answer.headers["location"] == f"{home.url}/device?answer=allowed"


class TestFlow:
    """A device gets its tokens once the owner has typed its code and allowed it."""

    async def test_a_device_signs_in(self, home: Site, browser: Browser) -> None:
        """It waits, is allowed on the usual page, gets a pair with its scopes, and refreshes it."""
        device = Device(home.url)
        assert (await device.register()).json()["grant_types"] == [DEVICE_CODE, "refresh_token"]
        answer = await device.ask(scope="read", resource=f"{home.url}/mcp")
        body = answer.json()
        assert answer.headers["cache-control"] == "no-store"
        assert (body["verification_uri"], body["expires_in"], body["interval"]) == (f"{home.url}/device", 600, 5)
        assert body["verification_uri_complete"] == f"{home.url}/device?user_code={device.user_code}"
        assert error_of(await device.poll()) == "authorization_pending"
        page = await typed(browser, home, device.user_code.lower().replace("-", " "))
        assert f'The device that shows the code <strong class="host">{device.user_code}</strong>' in page.text
        assert "Television" in page.text
        answer = await browser.allow(page)
        done = await browser.http.get(answer.headers["location"])
        assert "go back to your device" in done.text
        pair = (await device.poll()).json()
        assert pair["scope"] == "read"
        verified = await home.provider.verify_token(pair["access_token"])
        assert verified is not None
        assert (verified.subject, verified.resource) == ("owner", f"{home.url}/mcp")
        refreshed = await device.post("/token", grant_type="refresh_token", refresh_token=pair["refresh_token"])
        assert refreshed.status_code == 200

    async def test_denied(self, home: Site, browser: Browser) -> None:
        """Deny reaches the device, also after Allow, as long as it has no tokens."""
        device = await asking(home.url)
        page = await typed(browser, home, device.user_code)
        await browser.allow(page)
        answer = await browser.submit(page, {"answer": "deny"})
        assert "Nothing was allowed" in (await browser.http.get(answer.headers["location"])).text
        assert error_of(await device.poll()) == "access_denied"
        assert (await browser.allow(page)).status_code == 410

    async def test_too_late(self, home: Site, browser: Browser) -> None:
        """After ten minutes the device must ask again, and nobody can answer any more."""
        device = await asking(home.url)
        with turned(601):
            assert error_of(await device.poll()) == "expired_token"
            assert (await typed(browser, home, device.user_code)).status_code == 404

    @pytest.mark.parametrize("grants", [[DEVICE_CODE, "refresh_token"], [DEVICE_CODE]])
    async def test_once(self, home: Site, browser: Browser, grants: list[str]) -> None:
        """Twenty requests at once get one pair, and so do those of the next two minutes, whose first was lost."""
        device = Device(home.url)
        await device.register(grant_types=grants)
        await device.ask()
        await allowed(browser, home, device)
        answers = await asyncio.gather(*(device.poll() for _ in range(20)))
        [pair] = {(answer.json()["access_token"], answer.json().get("refresh_token")) for answer in answers}
        assert (pair[1] is not None) == ("refresh_token" in grants)
        with turned(100):
            again = (await device.poll()).json()
        assert (again["access_token"], again.get("refresh_token")) == pair
        assert 3490 < again["expires_in"] <= 3500
        assert len(await rows_of(home.provider, "SELECT 1 FROM oauth_tokens WHERE kind = 'access_token'")) == 1
        assert await home.provider.verify_token(pair[0]) is not None

    async def test_a_replay(self, home: Site, browser: Browser) -> None:
        """After the grace, a device code that was used ends its grant, as an authorization code does."""
        device = await asking(home.url)
        await allowed(browser, home, device)
        pair = (await device.poll()).json()
        with turned(125):
            assert error_of(await device.poll()) == "invalid_grant"
        assert await home.provider.verify_token(pair["access_token"]) is None

    async def test_a_used_code_after_the_refresh(self, home: Site, browser: Browser) -> None:
        """A device that has refreshed gets nothing for its old code, and keeps what it has."""
        device = await asking(home.url)
        await allowed(browser, home, device)
        form = {"grant_type": "refresh_token", "refresh_token": (await device.poll()).json()["refresh_token"]}
        pair = (await device.post("/token", **form)).json()
        assert error_of(await device.poll()) == "invalid_grant"
        assert await home.provider.verify_token(pair["access_token"]) is not None

    async def test_revoked_before_the_device_came_back(
        self, home: Site, browser: Browser, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is denied, and that is no replay."""
        device = await asking(home.url)
        await allowed(browser, home, device)
        async with transaction(home.provider) as session:
            await session.run_sync(end_all, None, None, by="the test", now=int(time.time()))
        assert error_of(await device.poll()) == "access_denied"
        assert "replayed" not in caplog.text

    async def test_a_short_lifetime_of_codes(self, tmp_path: Path, browser: Browser) -> None:
        """A device asks every five seconds: the lifetime of codes, which browsers carry, does not count for it."""
        async with site(tmp_path / "oauth.db", device_authorization=True, authorization_code_expiry_seconds=3) as home:
            device = await asking(home.url)
            await allowed(browser, home, device)
            with turned(500):
                assert error_of(await device.poll()) == ""

    async def test_too_often(self, home: Site) -> None:
        """Two requests within the interval: the second is asked to slow down. Another device is not."""
        device, other = await asking(home.url), await asking(home.url)
        assert error_of(await device.poll()) == "authorization_pending"
        assert error_of(await device.poll()) == "slow_down"
        assert error_of(await other.poll()) == "authorization_pending"
        with turned(5):
            assert error_of(await device.poll()) == "authorization_pending"

    async def test_an_answer_does_not_wait_for_the_interval(self, devices: Site, browser: Browser) -> None:
        """A device that comes early gets its tokens all the same, if the owner has answered."""
        device = await asking(devices.url)
        await device.poll()
        await allowed(browser, devices, device)
        assert error_of(await device.poll()) == ""

    async def test_a_device_with_a_redirect_uri(self, devices: Site) -> None:
        """It may use the code flow too, whether it asked for that or not."""
        device = Device(devices.url)
        answer = await device.register(redirect_uris=["http://localhost:21547/callback"], response_types=["code"])
        assert answer.json()["grant_types"] == [DEVICE_CODE, "refresh_token", "authorization_code"]

    async def test_users(self, tmp_path: Path, browser: Browser) -> None:
        """The tokens carry the name of the user who allowed the device."""
        async with site(tmp_path / "oauth.db", approval={"users": USERS}, device_authorization=True) as home:
            device = await asking(home.url)
            page = await typed(browser, home, device.user_code)
            await browser.allow(page, "bob's password", username="bob")
            verified = await home.provider.verify_token((await device.poll()).json()["access_token"])
            assert verified is not None
            assert verified.subject == "bob"

    async def test_an_approval_of_ones_own(self, database_url: str, browser: Browser) -> None:
        """It gets the request with its code, sees it in that browser alone, and approves it like any other."""
        asks = Asks()
        async with running(database_url, approval=asks, device_authorization=True) as server:
            url = str(server.http.base_url).rstrip("/")
            device = await asking(url)
            answer = await browser.http.post(f"{url}/device", data={"user_code": device.user_code})
            assert answer.headers["location"] == "http://127.0.0.1/asked"
            assert asks.handle == device_handle(str(user_code_of(device.user_code)))
            assert await server.provider.approve(asks.handle, subject="ada") == f"{url}/device?answer=allowed"
            assert error_of(await device.poll()) == ""

    async def test_auto_approval(self, tmp_path: Path, browser: Browser) -> None:
        """Typing the code is enough where nobody is asked."""
        async with running(str(tmp_path / "oauth.db"), approval=AutoApproval(), device_authorization=True) as server:
            url = str(server.http.base_url).rstrip("/")
            device = await asking(url)
            answer = await browser.http.post(f"{url}/device", data={"user_code": device.user_code})
            assert answer.headers["location"] == f"{url}/device?answer=allowed"
            assert error_of(await device.poll()) == ""

    async def test_an_approval_that_refuses(self, tmp_path: Path, browser: Browser) -> None:
        """The page says why, and the device learns of it at once."""

        class Refuses:
            sign_in = "a name that an approval of one's own may have"

            async def authorize(self, _provider: SQLAlchemyOAuthProvider, _request: AuthorizationRequest) -> str:
                raise AuthorizeError("access_denied", "televisions stay out")

        async with running(str(tmp_path / "oauth.db"), approval=Refuses(), device_authorization=True) as server:
            url = str(server.http.base_url).rstrip("/")
            device = await asking(url)
            name = server.provider.cookies._name("oauth_store_known")
            form = {"user_code": device.user_code}
            answer = await browser.http.post(f"{url}/device", data=form, headers={"cookie": f"{name}=x.y"})
            assert (answer.status_code, "televisions stay out" in answer.text) == (403, True)
            assert error_of(await device.poll()) == "access_denied"

    async def test_a_client_that_an_application_hides(self, tmp_path: Path, browser: Browser) -> None:
        """An overridden get_client() decides here too."""

        class Blocks(SQLAlchemyOAuthProvider):
            blocked = False

            async def get_client(self, client_id: str) -> Any:
                return None if self.blocked else await super().get_client(client_id)

        path = str(tmp_path / "oauth.db")
        async with running(path, Blocks, approval=AutoApproval(), device_authorization=True) as server:
            url = str(server.http.base_url).rstrip("/")
            device = await asking(url)
            server.provider.blocked = True  # type: ignore[attr-defined]  # of the class above
            answer = await browser.http.post(f"{url}/device", data={"user_code": device.user_code})
            assert answer.status_code == 404
            assert error_of(await device.ask()) == "invalid_client"

    async def test_a_confidential_device(self, devices: Site, browser: Browser) -> None:
        """A device with a secret needs it at both endpoints."""
        device = Device(devices.url)
        secret = (await device.register(token_endpoint_auth_method="client_secret_post")).json()["client_secret"]
        assert (await device.ask()).status_code == 401
        await device.ask(client_secret=secret)
        await allowed(browser, devices, device)
        assert error_of(await device.poll()) == "invalid_client"
        assert error_of(await device.poll(client_secret=secret)) == ""

    async def test_a_device_with_keys(self, database_url: str, browser: Browser, host: DocumentHost) -> None:
        """A client with a metadata document signs an assertion for each request; a used one is refused."""
        signer = Signer()
        keys: dict[str, Any] = {"token_endpoint_auth_method": "private_key_jwt", "jwks": {"keys": [signer.public]}}
        host.describe(grant_types=[DEVICE_CODE, "refresh_token"], **keys)
        async with site(database_url, device_authorization=True) as home:

            def asserted() -> dict[str, str]:
                return asserting(signer.sign(claims_of(host.client_id, f"{home.url}/token")))

            device = Device(home.url, host.client_id)
            assert error_of(await device.ask()) == "invalid_client"
            used = asserted()
            assert error_of(await device.ask(**used)) == ""
            assert error_of(await device.ask(**used)) == "invalid_client"
            await device.ask(**asserted())
            assert error_of(await device.poll()) == "invalid_client"
            waiting = asserted()
            assert error_of(await device.poll(**waiting)) == "authorization_pending"
            page = await typed(browser, home, device.user_code)
            assert host.name in page.text
            await browser.allow(page)
            assert error_of(await device.poll(**waiting)) == ""  # it has got nothing so far
            assert error_of(await device.poll(**waiting)) == "invalid_client"
            assert error_of(await device.poll(**asserted())) == ""


class TestOff:
    """It is off unless the owner turns it on."""

    async def test_without_the_argument(self, server: Server) -> None:
        """No endpoint, no page, no metadata, and no registration."""
        url = str(server.http.base_url).rstrip("/")
        device = Device(url)
        assert (await device.register()).status_code == 400
        kept = await device.register(
            grant_types=["authorization_code", DEVICE_CODE], redirect_uris=["https://a.example/"]
        )
        assert kept.json()["grant_types"] == ["authorization_code"]
        assert (await device.register(grant_types=[DEVICE_CODE, {}])).status_code == 400
        assert (await device.ask()).status_code == 404
        assert (await server.http.get("/device")).status_code == 404
        device.device_code = "device_x"
        assert error_of(await device.poll()) == "unsupported_grant_type"
        metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
        assert "device_authorization_endpoint" not in metadata
        assert DEVICE_CODE not in metadata["grant_types_supported"]

    async def test_metadata(self, devices: Site) -> None:
        """Where it is on, clients find it."""
        async with httpx2.AsyncClient() as http:
            metadata = (await http.get(f"{devices.url}/.well-known/oauth-authorization-server")).json()
        assert metadata["device_authorization_endpoint"] == f"{devices.url}/device_authorization"
        assert DEVICE_CODE in metadata["grant_types_supported"]

    async def test_turned_off_again(self, tmp_path: Path, browser: Browser) -> None:
        """A request that waits then is over."""
        async with site(tmp_path / "oauth.db", device_authorization=True) as home:
            device = await asking(home.url)
            page = await typed(browser, home, device.user_code)
        port = int(home.url.rpartition(":")[2])
        async with site(tmp_path / "oauth.db", port=port):
            assert (await browser.open(str(page.url))).status_code == 410

    async def test_its_paths_are_free_then(self, tmp_path: Path) -> None:
        """The page of apps may be at /device as long as devices are off."""
        async with site(tmp_path / "oauth.db", approval={"apps_path": "/device"}) as home, Browser() as browser:
            assert "Sign in to see which apps" in (await browser.open(f"{home.url}/device")).text
        with pytest.raises(ConfigurationError, match="which devices need"):
            async with site(tmp_path / "oauth.db", approval={"apps_path": "/device"}, device_authorization=True):
                pass

    def test_without_an_approval(self, tmp_path: Path) -> None:
        """A server that lets in this machine alone refuses to start with devices: they are elsewhere."""
        with pytest.raises(ConfigurationError, match="device_authorization lets in devices on other machines"):
            SQLAlchemyOAuthProvider(tmp_path / "oauth.db", base_url=BASE_URL, device_authorization=True)


class TestWrongPlaces:
    """Each secret is good in its own place alone."""

    async def test_a_device_code_elsewhere(self, home: Site, browser: Browser) -> None:
        """As a code, a refresh token, an access token, at /revoke, as a handle: refused, and still good afterwards."""
        device = Device(home.url)
        grants = [DEVICE_CODE, "refresh_token", "authorization_code"]
        await device.register(grant_types=grants, redirect_uris=["https://tv.example/"])
        await device.ask()
        await allowed(browser, home, device)
        secret = device.device_code
        as_code = {
            "grant_type": "authorization_code",
            "code": secret,
            "code_verifier": "v" * 43,
            "redirect_uri": "device",
        }
        assert error_of(await device.post("/token", **as_code)) == "invalid_grant"
        as_refresh = {"grant_type": "refresh_token", "refresh_token": secret}
        assert error_of(await device.post("/token", **as_refresh)) == "invalid_grant"
        assert await home.provider.verify_token(secret) is None
        assert (await device.post("/revoke", token=secret)).status_code == 200
        client = await home.provider.get_client(device.client_id)
        assert client is not None
        assert await home.provider.load_authorization_code(client, secret) is None
        for handle in (secret, device_handle(secret)):
            with pytest.raises(Exception, match="unknown, expired or already answered"):
                await home.provider.approve(handle)
        assert error_of(await device.poll()) == ""

    async def test_other_secrets_as_a_device_code(self, home: Site, browser: Browser) -> None:
        """A user code, its handle, an authorization code and tokens get no tokens there."""
        device = await asking(home.url)
        user_code = str(user_code_of(device.user_code))
        await allowed(browser, home, device)
        page = await browser.open(await home.authorize_url())
        code = (await browser.allow(page)).headers["location"].partition("code=")[2].partition("&")[0]
        token = await home.connect()
        others = (user_code, device.user_code, device_handle(user_code), code, token.access_token)
        for other in (*others, str(token.refresh_token), "", "device_" + "x" * 43):
            assert error_of(await device.poll(device_code=other)) in ("invalid_grant", "invalid_request")

    async def test_another_client(self, home: Site, browser: Browser) -> None:
        """A device code is its client's, and its presentation by another does no harm."""
        device = await asking(home.url)
        other = await asking(home.url)
        await allowed(browser, home, device)
        assert error_of(await other.poll(device_code=device.device_code)) == "invalid_grant"
        assert error_of(await device.poll()) == ""

    async def test_another_server(self, database_url: str, browser: Browser) -> None:
        """Two servers on one database: neither answers for the other's device."""
        async with (
            site(database_url, device_authorization=True) as home,
            site(database_url, device_authorization=True) as away,
        ):
            device = await asking(home.url)
            stranger = Device(away.url, device.client_id)
            assert (await typed(browser, away, device.user_code)).status_code == 404
            await allowed(browser, home, device)
            assert error_of(await stranger.poll(device_code=device.device_code)) == "invalid_grant"
            assert error_of(await device.ask(resource=f"{away.url}/mcp")) == "invalid_target"
            assert error_of(await device.poll()) == ""

    async def test_a_client_without_the_grant(self, devices: Site) -> None:
        """A client that registered for codes alone gets none: the page could show the name of an app it is not."""
        device = Device(devices.url, await devices.register())
        assert error_of(await device.ask()) == "unauthorized_client"
        unknown = Device(devices.url, "nobody")
        assert error_of(await unknown.ask()) == "invalid_client"

    async def test_nothing_usable_is_stored_or_logged(
        self, tmp_path: Path, browser: Browser, caplog: pytest.LogCaptureFixture
    ) -> None:
        """No device code, cookie or token is in the file or the log, and a device code in a line is masked."""
        caplog.set_level("DEBUG", "oauth_store")
        async with site(tmp_path / "oauth.db", device_authorization=True) as home:
            device = await asking(home.url)
            await allowed(browser, home, device)
            pair = (await device.poll()).json()
            [row] = await rows_of(home.provider, select(Code.code_hash))
            assert row.code_hash == hash_secret(device.device_code)
        stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        logged = " ".join(record.getMessage() for record in caplog.records if record.name == "oauth_store")
        cookies = [value for cookie in browser.http.cookies.jar if (value := cookie.value)]
        for secret in (device.device_code, *pair.values(), *cookies):
            if len(str(secret)) > 20:
                assert str(secret).encode() not in stored
                assert str(secret) not in logged
        assert masked(f"denied: {device.device_code}") == "denied: device_***"

    async def test_explained(self, home: Site, browser: Browser) -> None:
        """`explain` knows both codes."""
        device = await asking(home.url)
        for secret, kind in ((device.device_code, "device code"), (device.user_code, "authorization request")):
            async with transaction(home.provider, locks=False) as session:
                found = await session.run_sync(explain, secret, int(time.time()))
            assert (found.kind, found.state, found.client_name) == (kind, "waiting", "Television")


class TestGuesses:
    """Eight letters are few: who guesses is stopped."""

    async def test_a_hundred_guesses(self, tmp_path: Path, browser: Browser) -> None:
        """After ten, an address waits a quarter of an hour; another address, and a browser that signed in, do not."""
        async with site(tmp_path / "oauth.db", device_authorization=True, trusted_proxies=["127.0.0.1"]) as home:
            await browser.sign_in(f"{home.url}/apps")
            device = await asking(home.url)
            real = str(user_code_of(device.user_code))
            async with Browser() as stranger:
                guesses = [f"BBBB{letter}{other}DD" for letter in "BCDFGHJKLM" for other in "BCDFGHJKLM"]
                seen = [(await typed(stranger, home, guess, **{"X-Forwarded-For": "192.0.2.7"})).status_code
                        for guess in guesses if guess != real]  # fmt: skip
                assert seen[:10] == [404] * 10
                assert set(seen[10:]) == {429}
                answer = await typed(stranger, home, real, **{"X-Forwarded-For": "192.0.2.7"})
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) <= 900
            async with Browser() as elsewhere:
                page = await typed(elsewhere, home, real, **{"X-Forwarded-For": "192.0.2.8"})
                assert "Television" in page.text
            page = await typed(browser, home, real, **{"X-Forwarded-For": "192.0.2.7"})
            await browser.allow(page)
            assert error_of(await device.poll()) == ""

    async def test_right_codes_do_not_count(self, devices: Site, browser: Browser) -> None:
        """Who types fifteen right codes is no guesser."""
        for _ in range(15):
            device = await asking(devices.url)
            assert (await typed(browser, devices, device.user_code)).status_code == 200

    @pytest.mark.parametrize(
        "code", ["", "ABCDEFGH", "WDJB-MJH", "WDJB-MJHTX", "\u13b3DJB-MJHT", "WDJB MJHŤ", "x" * 70_000]
    )
    async def test_what_is_no_code(self, devices: Site, browser: Browser, code: str) -> None:
        """What cannot be a code is answered with what a code looks like, and does not count."""
        for _ in range(12):
            answer = await browser.http.post(f"{devices.url}/device", data={"user_code": code})
            assert answer.status_code in (400, 413), answer.text
        device = await asking(devices.url)
        assert (await typed(browser, devices, device.user_code)).status_code == 200

    async def test_a_flood_of_requests(self, tmp_path: Path) -> None:
        """An address that asks for more codes than its limit gets 429."""
        limits = RateLimits(authorizations_per_address="3/minute")
        async with site(tmp_path / "oauth.db", device_authorization=True, rate_limits=limits) as home:
            device = await asking(home.url)
            answers = [await device.ask() for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
            async with httpx2.AsyncClient() as http:
                assert (await http.get(f"{home.url}/authorize")).status_code == 429  # they share one limit

    async def test_a_total_of_guesses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Any number of addresses share a total, too; the browser of the owner does not."""
        monkeypatch.setattr("oauth_store.pages.device.IN_TOTAL", parse("20/15 minutes"))
        async with (
            site(tmp_path / "oauth.db", device_authorization=True, trusted_proxies=["127.0.0.1"]) as home,
            Browser() as stranger,
            Browser() as owner,
        ):
            await owner.sign_in(f"{home.url}/apps")
            seen = [
                (await typed(stranger, home, "BBBBBBBB", **{"X-Forwarded-For": f"192.0.2.{number}"})).status_code
                for number in range(25)
            ]
            assert seen == [404] * 20 + [429] * 5
            device = await asking(home.url)
            assert (await typed(owner, home, device.user_code)).status_code == 200

    async def test_an_outage_is_no_guess(self, tmp_path: Path, browser: Browser) -> None:
        """Who reloads the page while the database is away is not locked out afterwards."""
        path = tmp_path / "oauth.db"
        async with site(path, device_authorization=True) as home:
            device = await asking(home.url)
            path.rename(tmp_path / "away.db")
            for _ in range(12):
                assert (await typed(browser, home, device.user_code)).status_code == 503
            (tmp_path / "away.db").rename(path)
            assert (await typed(browser, home, device.user_code)).status_code == 200

    async def test_long_names(self, devices: Site) -> None:
        """A client_id that /authorize does not take is unknown here too, and nothing is fetched for it."""
        device = Device(devices.url)
        for client_id in ("https://127.0.0.1/" + "a" * 60_000, "x" * 513, "a\x1b[1mb", "\0"):
            device.client_id = client_id
            assert error_of(await device.ask()) == "invalid_client"
        documents = devices.provider._documents
        assert documents is not None
        assert not documents._failures

    @pytest.mark.parametrize("grants", [[DEVICE_CODE, {}], [DEVICE_CODE, []], DEVICE_CODE, {DEVICE_CODE: 1}, [None]])
    async def test_grant_types_that_are_none(self, devices: Site, grants: Any) -> None:
        """They are refused like any other mistake."""
        device = Device(devices.url)
        assert error_of(await device.register(grant_types=grants)) == "invalid_client_metadata"

    async def test_a_device_cannot_use_a_browser(self, devices: Site, browser: Browser) -> None:
        """Without a redirect URI it has the one way in; /authorize says so."""
        device = await asking(devices.url)
        page = await browser.open(f"{devices.url}/authorize?client_id={device.client_id}&response_type=code")
        assert "a device with the code that it shows" in page.text

    async def test_too_many_scopes(self, devices: Site) -> None:
        """What /authorize does not take, this endpoint does not take either."""
        device = await asking(devices.url)
        assert error_of(await device.ask(scope=" ".join(f"s{n}" for n in range(101)))) == "invalid_request"
        assert error_of(await device.ask(scope="unknown")) == "invalid_scope"


class TestTwoBrowsers:
    """The browser in which the code was typed last may answer; a link alone is worth nothing."""

    async def test_the_last_one_answers(self, devices: Site, browser: Browser) -> None:
        """In the first one the request is over."""
        device = await asking(devices.url)
        first = await typed(browser, devices, device.user_code)
        async with Browser() as other:
            second = await typed(other, devices, device.user_code)
            answer = await browser.allow(first)
            assert (answer.status_code, "typed again in another browser" in answer.text) == (410, True)
            assert (await other.allow(second)).status_code == 303
        assert error_of(await device.poll()) == ""

    async def test_while_the_password_is_checked(
        self, devices: Site, browser: Browser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who types the code elsewhere meanwhile takes the request over: the first browser allows nothing."""
        device = await asking(devices.url)
        page = await typed(browser, devices, device.user_code)
        check = SignIn.check

        async def slow(*arguments: Any) -> SignedIn:
            async with Browser() as other:
                await typed(other, devices, device.user_code)
            return await check(*arguments)

        monkeypatch.setattr(SignIn, "check", slow)
        assert (await browser.allow(page)).status_code == 410
        assert error_of(await device.poll()) == "authorization_pending"

    async def test_twice_in_one_browser(self, devices: Site, browser: Browser) -> None:
        """Both of its pages work."""
        device = await asking(devices.url)
        first = await typed(browser, devices, device.user_code)
        await typed(browser, devices, device.user_code)
        assert (await browser.allow(first)).status_code == 303

    async def test_a_link_to_the_consent_page(self, devices: Site, browser: Browser) -> None:
        """The handle can be made from the code, but without the cookie it opens nothing."""
        device = await asking(devices.url)
        handle = device_handle(str(user_code_of(device.user_code)))
        page = await browser.open(f"{devices.url}/consent?handle={handle}")
        assert page.status_code == 403

    async def test_a_link_with_the_code_asks_first(self, devices: Site, browser: Browser) -> None:
        """The link of the device fills the code in; the owner compares it, and sends it."""
        device = await asking(devices.url)
        page = await browser.open(f"{devices.url}/device?user_code={device.user_code}")
        assert f'value="{device.user_code}"' in page.text
        hostile = await browser.open(f'{devices.url}/device?user_code="><script>alert(1)</script>')
        assert "<script>" not in hostile.text

    @pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}])
    async def test_a_form_of_another_site(self, devices: Site, browser: Browser, headers: Any) -> None:
        """A page elsewhere cannot type the code for the owner: ours asks to compare it first."""
        device = await asking(devices.url)
        answer = await browser.http.post(f"{devices.url}/device", data={"user_code": device.user_code}, headers=headers)
        assert answer.status_code == 403
        assert "Compare the code" in answer.text

    async def test_a_client_that_was_removed(self, devices: Site, browser: Browser) -> None:
        """A device whose client is gone is not let in."""
        device = await asking(devices.url)
        async with transaction(devices.provider) as session:
            await session.run_sync(remove_client, device.client_id, "the test", int(time.time()))
        page = await typed(browser, devices, device.user_code)
        assert page.status_code == 404
        assert error_of(await device.poll()) == "invalid_client"
