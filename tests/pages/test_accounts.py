"""Sign-in at an identity provider: who gets in, and everything that lets nobody in."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from joserfc import jwk, jwt

from oauth_store import (
    AutoApproval,
    ConfigurationError,
    OidcApproval,
    PasskeyApproval,
    PasswordApproval,
    SQLAlchemyOAuthProvider,
    openid,
)
from oauth_store.database.models import BROWSER, CHALLENGE, SESSION
from oauth_store.pages import accounts
from oauth_store.pages.accounts import Accounts
from tests.accounts import (
    CLIENT_ID,
    CLIENT_SECRET,
    AccountProvider,
    account_site,
    answered,
    callback_of,
    come_back,
    follow,
    leave,
    user_of,
)
from tests.assertions import Signer, unsigned
from tests.clocks import away, stopped
from tests.databases import tokens_of
from tests.passkeys import Authenticator, add, link_of, remove_passkey, touch
from tests.serving import free_port
from tests.sites import HASH, PASSWORD, Browser, Site, handle_of, site
from tests.steps import query_of

DAY = 24 * 3600


@pytest.fixture
async def acme() -> AsyncIterator[AccountProvider]:
    """A provider at which ada has an account."""
    async with AccountProvider().open() as provider:
        yield provider


@pytest.fixture
async def wiki(tmp_path: Path, acme: AccountProvider) -> AsyncIterator[Site]:
    """A server that lets ada in, and no one else."""
    async with account_site(tmp_path / "oauth.db", acme) as served:
        yield served


async def rows_of_kind(wiki: Site, kind: str) -> list[Any]:
    """The rows of a kind."""
    return [row for row in await tokens_of(wiki.provider) if row.kind == kind]


class TestFlow:
    """What the owner does."""

    async def test_in(self, acme: AccountProvider, database_url: str) -> None:
        """On every database: the button, the provider, the question, Allow; and the token names the user."""
        async with account_site(database_url, acme) as wiki, Browser() as browser:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            assert "Sign in with Acme" in page.text
            assert 'name="password"' not in page.text
            assert 'value="allow"' not in page.text
            question = await come_back(browser, page)
            assert user_of(question) == "ada@example.com"
            token = await wiki.redeem(url, (await answered(browser, question)).headers["location"])
            access = await wiki.provider.verify_token(token.access_token)
            assert access is not None
            assert access.subject == "ada@example.com"
            assert acme.requests == [
                "/.well-known/openid-configuration", "/authorize", "/token", "/keys",
            ]  # fmt: skip

    async def test_what_is_sent(self, wiki: Site, acme: AccountProvider) -> None:
        """PKCE, a nonce, a state, and the exact redirect URI; nothing of it twice; and no more is asked than needed."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            sent = [query_of((await leave(browser, page)).headers["location"]) for _ in range(2)]
        for one in sent:
            assert one["redirect_uri"] == f"{wiki.url}/sign-in/callback"
            assert (one["response_type"], one["code_challenge_method"]) == ("code", "S256")
            assert (one["client_id"], one["scope"]) == (CLIENT_ID, "openid email")
        for name in ("state", "nonce", "code_challenge"):
            assert sent[0][name] != sent[1][name]
        assert len({sent[0][name] for name in ("state", "nonce", "code_challenge")}) == 3

    async def test_deny(self, wiki: Site) -> None:
        """Who is signed in may deny."""
        async with Browser() as browser:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            denied = await answered(browser, question, "deny")
            assert query_of(denied.headers["location"])["error"] == "access_denied"

    async def test_sign_out(self, wiki: Site) -> None:
        """Sign out ends the sign-in, and the page asks again."""
        async with Browser() as browser:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            out = await answered(browser, question, "sign_out")
            again = await browser.http.get(out.headers["location"])
            assert "Sign in with Acme" in again.text
            late = await answered(browser, question)
            assert (late.status_code, "You were signed out. Sign in again." in late.text) == (403, True)
            assert not await rows_of_kind(wiki, SESSION)

    async def test_nothing_secret_is_stored(self, wiki: Site) -> None:
        """Neither the state, the cookie, the nonce, the verifier nor a session is in the database."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            left = query_of((await leave(browser, page)).headers["location"])
            await come_back(browser, page)
            secrets = [left["state"], left["nonce"], *(cookie.value or "" for cookie in browser.http.cookies.jar)]
            secrets += [secret.partition(".")[0] for secret in secrets]
            stored = "".join(str(row) for row in await tokens_of(wiki.provider))
            assert len(await tokens_of(wiki.provider)) == 2
            assert all(secret not in stored for secret in secrets if secret)


class TestWho:
    """Who is let in."""

    @pytest.mark.parametrize(
        ("allow", "user", "subject"),
        [
            (["ADA@example.com"], {}, "ada@example.com"),
            (["ada@example.com"], {"email": "Ada@Example.com"}, "ada@example.com"),
            (["sub:ada"], {}, "sub:ada"),
            (["group:family", "sub:ada", "ada@example.com"], {"groups": ["family"]}, "ada@example.com"),
            (["bob@example.com", "group:family"], {"groups": ["work", "family"]}, "sub:ada"),
            (["sub:a=b:c, d"], {"sub": "a=b:c, d"}, "sub:a=b:c, d"),
        ],
        ids=["email", "email in capitals", "sub", "the best name", "group", "any characters"],
    )
    async def test_allowed(
        self, tmp_path: Path, acme: AccountProvider, allow: list[str], user: dict[str, Any], subject: str
    ) -> None:
        """A verified address, an id, or a group; and the name of the user is how `allow` names them."""
        acme.user |= user
        async with account_site(tmp_path / "oauth.db", acme, *allow) as wiki, Browser() as browser:
            assert user_of(await come_back(browser, await browser.open(await wiki.authorize_url()))) == subject

    @pytest.mark.parametrize(
        ("allow", "user"),
        [
            ("ada@example.com", {"sub": "bob", "email": "bob@example.com"}),
            ("ada@example.com", {"email_verified": False}),
            ("ada@example.com", {"email_verified": None}),
            ("ada@example.com", {"email_verified": "true"}),
            ("ada@example.com", {"email_verified": 1}),
            ("ada@example.com", {"email": "ada@example.com.evil.example"}),
            ("ada@example.com", {"email": ["ada@example.com"]}),
            ("ada@example.com", {"sub": "ada@example.com", "email": None}),
            ("sub:ada", {"sub": "Ada"}),
            ("sub:ada", {"sub": "bob", "groups": ["ada"], "login": "ada"}),
            ("group:family", {"sub": "family", "email": "family@example.com"}),
            ("group:family", {"groups": "family"}),
            ("group:family", {"groups": ["Family", 7, None, ["family"]]}),
            ("group:family", {"groups": {"family": True}}),
            ("kate@example.com", {"email": "\u212aate@example.com"}),
            ("sub:root", {"email": "sub:root"}),
            ("group:family", {"email": "group:family"}),
        ],
    )
    async def test_not_allowed(
        self,
        tmp_path: Path,
        acme: AccountProvider,
        caplog: pytest.LogCaptureFixture,
        allow: str,
        user: dict[str, Any],
    ) -> None:
        """Others get a page that names them and how to let them in, and the log does too."""
        acme.user |= user
        async with account_site(tmp_path / "oauth.db", acme, allow) as wiki, Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            refused = await come_back(browser, page)
            assert refused.status_code == 403
            assert f"as sub:{acme.user['sub']}" in refused.text
            assert "this server does not let you in" in refused.text
            assert f"not allowed with Acme: sub:{acme.user['sub']} (" in caplog.text
            assert "of the groups: " in caplog.text
            assert not await rows_of_kind(wiki, SESSION)
            again = await browser.http.get(str(page.url))
            assert 'value="allow"' not in again.text

    async def test_from_userinfo(self, tmp_path: Path, acme: AccountProvider) -> None:
        """What the ID token lacks comes from UserInfo, if it is of the same person; the address is of one source."""
        async with account_site(tmp_path / "oauth.db", acme, "ada@example.com", "group:family") as wiki:
            for userinfo, status in (
                ({"sub": "ada", "email": "ada@example.com", "email_verified": True}, 200),
                ({"sub": "ada", "groups": ["family"]}, 200),
                ({"sub": "bob", "email": "ada@example.com", "email_verified": True}, 403),
                ({"email": "ada@example.com", "email_verified": True}, 403),
                ({"sub": "ada", "email": "ada@example.com"}, 403),
            ):
                acme.userinfo = userinfo
                async with Browser() as browser:
                    page = await come_back(browser, await browser.open(await wiki.authorize_url()))
                    assert page.status_code == status, userinfo
            acme.userinfo = {"sub": "ada", "email": "eve@example.com", "email_verified": True}
            acme.claims = {"email": "ada@example.com"}  # not said to be verified
            async with Browser() as browser:
                page = await come_back(browser, await browser.open(await wiki.authorize_url()))
                assert page.status_code == 403

    async def test_github(self, tmp_path: Path, acme: AccountProvider) -> None:
        """GitHub names users by their id, or by a login in any case; and it has no ID token."""
        for user, status, subject in (
            ({"id": 583231, "login": "someone"}, 200, "sub:583231"),
            ({"id": 7, "login": "OctoCat"}, 200, "sub:7"),
            ({"id": 8, "login": "octocat2"}, 403, ""),
            ({"id": "583231", "login": "someone"}, 403, ""),
            ({"id": True, "login": "octocat"}, 403, ""),
            ({"message": "Bad credentials"}, 403, ""),
        ):
            acme.user = user
            approval = OidcApproval(
                issuer="https://github.com", client_id=CLIENT_ID, client_secret=CLIENT_SECRET,
                allow=["sub:583231", "login:octocat"],
            )  # fmt: skip
            account = approval.sign_in.account
            assert isinstance(account, Accounts)
            account._provider = acme.github()
            async with site(tmp_path / "oauth.db", approval=approval) as wiki, Browser() as browser:
                page = await browser.open(await wiki.authorize_url())
                assert "Sign in with GitHub" in page.text
                back = await come_back(browser, page)
                assert (back.status_code, user_of(back)) == (status, subject), user


class TestTokens:
    """ID tokens that sign nobody in."""

    @pytest.mark.parametrize(
        "claims",
        [
            {"iss": "https://evil.example"},
            {"iss": None},
            {"aud": "another client"},
            {"aud": ["another client"]},
            {"aud": [CLIENT_ID, "another client"]},
            {"aud": [CLIENT_ID, "another client"], "azp": "another client"},
            {"aud": "another client", "azp": CLIENT_ID},
            {"aud": None},
            {"azp": "another client"},
            {"nonce": None},
            {"nonce": "another"},
            {"exp": away(-3600)},
            {"exp": None},
            {"exp": "tomorrow"},
            {"iat": None},
            {"iat": away(3600)},
            {"nbf": away(3600)},
            {"sub": None},
            {"sub": ""},
            {"sub": 7},
            {"sub": "a\nb"},
            {"sub": "a" * 256},
            {"at_hash": "another"},
        ],
        ids=" ".join,
    )
    async def test_claims(self, wiki: Site, acme: AccountProvider, claims: dict[str, Any]) -> None:
        """A claim that is missing or wrong."""
        acme.claims = claims
        await nobody_signs_in(wiki)

    @pytest.mark.parametrize(
        "how", ["none", "shared secret", "public key as a secret", "another key", "no token", "junk"]
    )
    async def test_signatures(self, wiki: Site, acme: AccountProvider, how: str) -> None:
        """A signature that is none, or that is not of a key of the provider's."""
        stranger = Signer("RS256", kid=acme.signer.kid)
        signs: dict[str, Any] = {
            "none": unsigned,
            "shared secret": lambda claims: hmac_signed(claims, CLIENT_SECRET),
            "public key as a secret": lambda claims: hmac_signed(claims, str(acme.signer.public)),
            "another key": stranger.sign,
            "no token": lambda _: None,
            "junk": lambda _: "a.b.c",
        }
        acme.sign = signs[how]
        await nobody_signs_in(wiki)

    async def test_new_keys(self, wiki: Site, acme: AccountProvider, monkeypatch: pytest.MonkeyPatch) -> None:
        """A provider that changes its keys is asked for them, once a minute; a key that it does not list is refused."""
        assert await signs_in(wiki)
        acme.signer = Signer("ES256")
        acme.sign = acme.signer.sign
        await nobody_signs_in(wiki)
        acme.keys.append(acme.signer)
        await nobody_signs_in(wiki)
        assert acme.requests.count("/keys") == 1
        monkeypatch.setattr(openid, "KEYS_SECONDS", 0)  # a minute has passed
        assert await signs_in(wiki)
        assert await signs_in(wiki)
        assert acme.requests.count("/keys") == 2

    async def test_other_keys_do_not_matter(self, wiki: Site, acme: AccountProvider) -> None:
        """Keys of kinds that nobody knows, and keys to encrypt with, are left alone."""
        encrypts = {**Signer("RS256", kid=acme.signer.kid).public, "use": "enc"}
        acme.more_keys = [
            {"kty": "AKP", "kid": "odd", "alg": "ML-DSA-44"},
            encrypts,
            {"kty": "RSA", "kid": "half", "e": "AQAB"},
            {"kty": "RSA", "kid": 7, "n": "?", "e": "AQAB"},
            {"kty": "EC", "crv": "P-192", "x": "AA", "y": "AA"},
            {"kid": "nothing"},
            {},
        ]
        assert await signs_in(wiki)

    async def test_new_keys_without_a_name(
        self, wiki: Site, acme: AccountProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So is one that does not name its keys, or gives a new one the name of the old one."""
        monkeypatch.setattr(openid, "KEYS_SECONDS", 0)
        assert await signs_in(wiki)
        acme.signer = Signer("RS256", kid=acme.signer.kid)
        acme.keys, acme.sign = [acme.signer], acme.signer.sign
        assert await signs_in(wiki)


class TestResponses:
    """What comes back with the browser."""

    @pytest.mark.parametrize(
        ("answer", "status"),
        [
            ({"iss": "https://evil.example"}, 403),
            ({"iss": None}, 403),
            ({"state": "another"}, 400),
            ({"state": None}, 400),
            ({"code": None}, 403),
            ({"code": "another"}, 403),
            ({"code": None, "error": "access_denied"}, 403),
            ({"error": "server_error"}, 403),
        ],
        ids=str,
    )
    async def test_wrong(self, wiki: Site, acme: AccountProvider, answer: dict[str, str | None], status: int) -> None:
        """Another issuer's response, another state, no code, or an error."""
        acme.answer = answer
        async with Browser() as browser:
            refused = await come_back(browser, await browser.open(await wiki.authorize_url()))
        assert refused.status_code == status
        assert "You are not signed in" in refused.text
        assert not await rows_of_kind(wiki, SESSION)
        if "iss" in answer:
            assert "/token" not in acme.requests  # the code of a mix-up goes nowhere

    async def test_canceled(self, wiki: Site, acme: AccountProvider) -> None:
        """Who cancels reads that, and goes back to the request, which still waits."""
        acme.answer = {"code": None, "error": "access_denied"}
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            refused = await come_back(browser, page)
            assert "The sign-in was canceled." in refused.text
            assert f'href="{page.url}"' in refused.text
            acme.answer = {}
            assert user_of(await come_back(browser, page)) == "ada@example.com"

    async def test_once(self, acme: AccountProvider, database_url: str) -> None:
        """Of fifty times the same response at once, on every database, one signs in."""
        async with account_site(database_url, acme) as wiki, Browser() as browser:
            url = await callback_of(browser, await browser.open(await wiki.authorize_url()))
            answers = await asyncio.gather(*(browser.http.get(url) for _ in range(50)))
            assert sorted(answer.status_code for answer in answers) == [303] + [400] * 49
            assert acme.requests.count("/token") == 1
            assert "This sign-in was used" in (await browser.http.get(url)).text

    async def test_too_late(self, wiki: Site) -> None:
        """After ten minutes at the provider, the sign-in is over."""
        async with Browser() as browser:
            with stopped() as clock:
                page = await browser.open(await wiki.authorize_url())
                early, late = await callback_of(browser, page), await callback_of(browser, page)
                clock.shift(599)
                assert (await browser.http.get(early)).status_code == 303
                clock.shift(2)
                browser.http.cookies.jar.clear_expired_cookies()
                assert (await follow(browser, late)).status_code == 400

    async def test_another_browser(self, wiki: Site) -> None:
        """The address that the provider gives to one browser is worthless in another, which has its own sign-in."""
        async with Browser() as attacker, Browser() as owner:
            url = await callback_of(attacker, await attacker.open(await wiki.authorize_url()))
            assert (await follow(owner, url)).status_code == 400
            await leave(owner, await owner.open(await wiki.authorize_url()))
            assert (await follow(owner, url)).status_code == 400
            assert (await attacker.http.get(url)).status_code == 303  # and it was not used up

    async def test_another_request(self, wiki: Site) -> None:
        """A sign-in is for one request: neither its cookie nor its response answers another one."""
        async with Browser() as browser:
            first = await browser.open(await wiki.authorize_url())
            second = await browser.open(await wiki.authorize_url())
            question = await come_back(browser, first)
            other = await browser.http.get(str(second.url))
            assert 'value="allow"' not in other.text
            [signed] = [cookie for cookie in browser.http.cookies.jar if "_user" in cookie.name]
            [asked] = [
                cookie.name for cookie in browser.http.cookies.jar
                if cookie.name.startswith("oauth_store_") and cookie.name[:28] != signed.name[:28]
            ]  # fmt: skip
            server = asked.rpartition("_")
            browser.http.cookies.set(f"{server[0]}_user_{server[2]}", signed.value or "", domain="127.0.0.1")
            forged = await browser.http.get(str(second.url))
            assert 'value="allow"' not in forged.text
            assert handle_of(question) != handle_of(second)

    async def test_a_cookie_that_names_another_request(self, wiki: Site) -> None:
        """What the browser keeps of its way to the provider cannot be turned to another request."""
        async with Browser() as browser:
            first = await browser.open(await wiki.authorize_url())
            second = await browser.open(await wiki.authorize_url())
            url = await callback_of(browser, first)
            [kept] = [cookie for cookie in browser.http.cookies.jar if "_attempt_" in cookie.name]
            assert kept.value is not None
            turned = kept.value.partition(".")[0] + "." + handle_of(second)
            browser.http.cookies.jar.set_cookie(_changed(kept, turned))
            assert (await follow(browser, url)).status_code == 400

    async def test_tampered(self, wiki: Site, acme: AccountProvider) -> None:
        """What an attacker changes on the way to the provider, the nonce or the challenge, is found out."""
        for name in ("nonce", "code_challenge"):
            async with Browser() as browser:
                left = await leave(browser, await browser.open(await wiki.authorize_url()))
                url = urlsplit(left.headers["location"])
                query = {key: values[0] for key, values in parse_qs(url.query).items()} | {name: "A" * 43}
                sent = await browser.http.get(url._replace(query=urlencode(query)).geturl())
                assert (await follow(browser, sent.headers["location"])).status_code == 403

    async def test_a_foreign_form(self, wiki: Site) -> None:
        """Only our page's form begins a sign-in: not one without its token, nor one of another site."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            url = str(page.url)
            assert (await browser.http.post(url, data={"account": "leave"})).status_code == 403
            elsewhere = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
            apps = await browser.http.post(f"{wiki.url}/apps", data={"account": "leave"}, headers=elsewhere)
            assert apps.status_code == 200
            assert not await rows_of_kind(wiki, CHALLENGE)

    async def test_sign_ins_are_limited(self, wiki: Site) -> None:
        """A request can begin ten sign-ins in 15 minutes: each leaves a row."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            statuses = [(await leave(browser, page)).status_code for _ in range(12)]
        assert statuses == [303] * 10 + [429] * 2

    async def test_an_address_is_limited(self, wiki: Site) -> None:
        """An address can begin sixty in 15 minutes, for however many requests: each asks the provider in the end."""
        statuses = []
        for _ in range(7):
            async with Browser() as browser:
                page = await browser.open(await wiki.authorize_url())
                statuses += [(await leave(browser, page)).status_code for _ in range(9)]
        assert statuses == [303] * 60 + [429] * 3


class TestOutage:
    """The provider is away, or is not what the settings say."""

    async def test_down(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """With a password of this server, nobody is locked out; and the provider is back as soon as it is."""
        away = AccountProvider()
        settings = {"approval": {"password_hash": HASH}}
        async with account_site(tmp_path / "oauth.db", away, **settings) as wiki, Browser() as browser:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            failed = await leave(browser, page)
            assert failed.status_code == 502
            assert "Acme cannot sign you in right now. Try again in a moment." in failed.text
            assert "Acme cannot be used" in caplog.text
            allowed = await browser.submit(failed, {"answer": "allow", "password": PASSWORD})
            access = await wiki.provider.verify_token(
                (await wiki.redeem(url, allowed.headers["location"])).access_token
            )
            assert access is not None
            assert access.subject == "owner"
            apps = await leave(browser, await browser.open(f"{wiki.url}/apps"))
            assert (apps.status_code, "Acme cannot sign you in right now" in apps.text) == (502, True)
            async with away.open():
                other = await browser.open(await wiki.authorize_url())
                assert user_of(await come_back(browser, other)) == "ada@example.com"

    async def test_slow(self, wiki: Site, acme: AccountProvider, monkeypatch: pytest.MonkeyPatch) -> None:
        """A provider whose answers do not end is given up in time, and holds up nobody after that."""
        monkeypatch.setattr(accounts, "SIGN_IN_SECONDS", 0.5)
        acme.drips = True

        async def stuck() -> int:
            async with Browser() as browser:
                return (await come_back(browser, await browser.open(await wiki.authorize_url()))).status_code

        assert await asyncio.gather(*(stuck() for _ in range(accounts.CONCURRENT_SIGN_INS + 2))) == [502] * 10
        acme.drips = False
        monkeypatch.undo()
        assert await signs_in(wiki)

    @pytest.mark.parametrize(
        "metadata",
        [
            {"token_endpoint_auth_methods_supported": 7},
            {"id_token_signing_alg_values_supported": [["RS256"], 7]},
            {"scopes_supported": 7},
            {"userinfo_endpoint": 7},
        ],
        ids=str,
    )
    async def test_odd_metadata(self, wiki: Site, acme: AccountProvider, metadata: dict[str, Any]) -> None:
        """What is odd in the metadata, and not needed, does no harm."""
        acme.metadata = metadata
        assert await signs_in(wiki)

    @pytest.mark.parametrize("name", ["authorization_endpoint", "token_endpoint", "jwks_uri"])
    async def test_urls_that_are_none(self, wiki: Site, acme: AccountProvider, name: str) -> None:
        """Endpoints that no URL can be are a page, with the other ways."""
        for url in ("https://[bad", "https://x:99999/", "https://x y/", ""):
            acme.metadata = {name: url}
            async with Browser() as browser:
                failed = await leave(browser, await browser.open(await wiki.authorize_url()))
            assert failed.status_code == 502

    async def test_down_on_the_way_back(self, wiki: Site, acme: AccountProvider) -> None:
        """If it goes away before the code is exchanged, there is a page with a way back."""
        async with Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            url = await callback_of(browser, page)
            acme.metadata = {"token_endpoint": "http://127.0.0.1:1/token"}
            approval: Any = wiki.provider._approval
            account: Any = approval.sign_in.account
            account._provider._metadata = {}
            refused = await follow(browser, url)
            assert refused.status_code == 502
            assert f'href="{page.url}"' in refused.text

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [
            ({"issuer": "https://evil.example"}, "calls itself 'https://evil.example'"),
            ({"issuer": None}, "calls itself None"),
            (
                {"token_endpoint": "http://evil.example/token"},
                "token_endpoint 'http://evil.example/token'; expected an https",
            ),
            ({"jwks_uri": None}, "jwks_uri None; expected an https"),
            ({"authorization_endpoint": 7}, "authorization_endpoint 7; expected an https"),
        ],
        ids=str,
    )
    async def test_metadata(
        self,
        wiki: Site,
        acme: AccountProvider,
        caplog: pytest.LogCaptureFixture,
        metadata: dict[str, Any],
        reason: str,
    ) -> None:
        """Metadata of another issuer, or with endpoints where secrets could be read, sign nobody in."""
        acme.metadata = metadata
        async with Browser() as browser:
            failed = await leave(browser, await browser.open(await wiki.authorize_url()))
        assert failed.status_code == 502
        assert reason in caplog.text
        assert CLIENT_SECRET not in caplog.text


class TestStay:
    """A browser that stays signed in."""

    async def test_one_click(self, wiki: Site) -> None:
        """For 30 days the next app is one click, and never zero."""
        with stopped() as clock:
            async with Browser() as browser:
                question = await come_back(browser, await browser.open(await wiki.authorize_url()))
                await answered(browser, question, stay="30d")
                [row] = await rows_of_kind(wiki, BROWSER)
                assert (row.subject, row.expires_at - row.created_at) == ("ada@example.com", 30 * DAY)
                clock.shift(30 * DAY - 60)
                url = await wiki.authorize_url()
                page = await browser.open(url)
                assert (user_of(page), "stay" in page.text) == ("ada@example.com", False)
                assert "Sign in with" not in page.text
                allowed = await answered(browser, page)
                assert (await wiki.redeem(url, allowed.headers["location"])).access_token
                clock.shift(61)
                late = await browser.open(await wiki.authorize_url())
                assert "Sign in with Acme" in late.text

    async def test_another_browser(self, wiki: Site) -> None:
        """It is that browser alone, and a request of another one is not shown in it."""
        async with Browser() as browser, Browser() as other:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            await answered(browser, question, stay="30d")
            page = await other.open(await wiki.authorize_url())
            assert "Sign in with Acme" in page.text
            assert (await browser.http.get(str(page.url))).status_code == 403

    async def test_without_the_tick(self, wiki: Site) -> None:
        """Without it, the next app asks again."""
        async with Browser() as browser:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            await answered(browser, question)
            assert "Sign in with Acme" in (await browser.open(await wiki.authorize_url())).text
            assert not await rows_of_kind(wiki, BROWSER)

    @pytest.mark.parametrize("change", ["allow", "secret", "issuer", "nothing"])
    async def test_it_ends_with_what_began_it(self, tmp_path: Path, acme: AccountProvider, change: str) -> None:
        """It ends with the entry of `allow`, with the client at the provider, and with the provider."""
        port = free_port()
        async with Browser() as browser:
            async with account_site(tmp_path / "oauth.db", acme, "sub:ada", port=port) as wiki:
                question = await come_back(browser, await browser.open(await wiki.authorize_url()))
                await answered(browser, question, stay="30d")
            changed: dict[str, dict[str, Any]] = {
                "allow": {"allow": ["sub:bob", "ada@example.com"]},
                "secret": {"client_secret": "another"},
                "issuer": {"issuer": "http://127.0.0.1:1"},
                "nothing": {"allow": ["group:family", "sub:ada"]},
            }
            approval = {"allow": ["sub:ada"], **changed[change]}
            async with account_site(tmp_path / "oauth.db", acme, port=port, approval=approval) as wiki:
                page = await browser.open(await wiki.authorize_url())
                assert user_of(page) == ("sub:ada" if change == "nothing" else "")

    async def test_signing_out_everywhere(self, wiki: Site) -> None:
        """The page of apps ends it in all browsers of the user, and Sign out in this one."""
        async with Browser() as first, Browser() as second:
            for browser in (first, second):
                question = await come_back(browser, await browser.open(await wiki.authorize_url()))
                await answered(browser, question, stay="30d")
            apps = await come_back(first, await first.open(f"{wiki.url}/apps"))
            assert "You stay signed in on 2 browsers" in apps.text
            await first.submit(apps, {"sign_out": "everywhere"})
            assert not await rows_of_kind(wiki, BROWSER)
            assert not await rows_of_kind(wiki, SESSION)
            for browser in (first, second):
                assert "Sign in with Acme" in (await browser.open(await wiki.authorize_url())).text

    async def test_allowed_twice(self, wiki: Site) -> None:
        """Who presses Allow again stays signed in once."""
        async with Browser() as browser:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            for _ in range(3):
                assert (await answered(browser, question, stay="30d")).status_code == 303
            assert len(await rows_of_kind(wiki, BROWSER)) == 1

    async def test_a_password_does_not_stay(self, tmp_path: Path, acme: AccountProvider) -> None:
        """After a password the tick changes nothing: a password is asked for every time."""
        settings = {"approval": {"password_hash": HASH}}
        async with account_site(tmp_path / "oauth.db", acme, **settings) as wiki, Browser() as browser:
            page = await browser.open(await wiki.authorize_url())
            assert (await browser.allow(page, stay="30d")).status_code == 303
            assert not await rows_of_kind(wiki, BROWSER)

    async def test_after_a_passkey(self, tmp_path: Path, acme: AccountProvider) -> None:
        """A passkey may stay too: its touch signs that, and it ends with the passkey."""
        port = free_port()
        base_url = f"http://localhost:{port}"
        async with (
            account_site(tmp_path / "oauth.db", acme, port=port, base_url=base_url) as wiki,
            Browser() as browser,
        ):
            device, link = Authenticator(wiki.url), await link_of(wiki, user="ada@example.com")
            assert (await add(browser, wiki, device, link.partition("#")[2])).status_code == 303
            page = await browser.open(await wiki.authorize_url())
            allowed = await touch(browser, page, device, stay="30d")
            assert allowed.status_code == 303
            page = await browser.open(await wiki.authorize_url())
            assert user_of(page) == "ada@example.com"
            await remove_passkey(wiki, "My phone")
            assert "Sign in with Acme" in (await browser.open(await wiki.authorize_url())).text


class TestApps:
    """The page of connected apps."""

    async def test_each_user_sees_their_own(self, tmp_path: Path, acme: AccountProvider) -> None:
        """Users of accounts see what they allowed, and the owner with the password sees all."""
        settings = {"approval": {"password_hash": HASH}}
        async with account_site(tmp_path / "oauth.db", acme, **settings) as wiki:
            await wiki.connect(subject="ada@example.com", client_name="Ada's app")
            await wiki.connect(subject="owner", client_name="The owner's app")
            await wiki.connect(subject="sub:bob", client_name="Bob's app")
            async with Browser() as browser:
                apps = await come_back(browser, await browser.open(f"{wiki.url}/apps"))
                assert "Ada&#39;s app" in apps.text
                assert "owner&#39;s app" not in apps.text
                assert "Bob&#39;s app" not in apps.text
            async with Browser() as browser:
                apps = await browser.sign_in(f"{wiki.url}/apps")
                assert all(name in apps.text for name in ("Ada&#39;s app", "owner&#39;s app", "Bob&#39;s app"))

    async def test_confirming(self, wiki: Site) -> None:
        """New token and Revoke all need a sign-in of the last five minutes."""
        await wiki.connect(subject="ada@example.com", client_name="An app")
        with stopped() as clock:
            async with Browser() as browser:
                apps = await come_back(browser, await browser.open(f"{wiki.url}/apps"))
                made = await browser.submit(apps, {"create": "token", "name": "script", "expires": "30d"})
                assert "can use this server with this token" in made.text
                clock.shift(301)
                apps = await browser.http.get(f"{wiki.url}/apps")
                assert "Sign in with Acme again" in apps.text
                refused = await browser.submit(apps, {"revoke": "all"})
                assert refused.status_code == 403
                assert "Sign in with Acme again, then confirm this within 5 minutes." in refused.text
                assert "An app" in refused.text
                apps = await come_back(browser, apps)
                revoked = await browser.submit(apps, {"revoke": "all"})
                assert "no longer have access" in revoked.text

    async def test_a_sign_in_for_a_request_is_none_here(self, wiki: Site) -> None:
        """Neither a sign-in for a request nor a browser that stays signed in opens the page of apps."""
        async with Browser() as browser:
            question = await come_back(browser, await browser.open(await wiki.authorize_url()))
            await answered(browser, question, stay="30d")
            assert "Sign in to see which apps" in (await browser.http.get(f"{wiki.url}/apps")).text
            [stays] = [cookie for cookie in browser.http.cookies.jar if "_browser_" in cookie.name]
            copied = stays.name.replace("_browser_", "_session_")
            browser.http.cookies.set(copied, stays.value or "", domain="127.0.0.1")
            assert "Sign in to see which apps" in (await browser.http.get(f"{wiki.url}/apps")).text

    async def test_the_page_is_off(self, tmp_path: Path, acme: AccountProvider) -> None:
        """Without the page of apps, a response without a request leads nowhere."""
        served = account_site(tmp_path / "oauth.db", acme, approval={"apps_path": None})
        async with served as wiki, Browser() as browser:
            assert user_of(await come_back(browser, await browser.open(await wiki.authorize_url())))
            assert (await browser.http.get(f"{wiki.url}/sign-in/callback")).status_code == 400


GOOD = {
    "issuer": "https://accounts.google.com",
    "client_id": "wiki",
    "client_secret": "the secret",
    "allow": ["ada@example.com"],
}


class TestSettings:
    """What may be set."""

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"issuer": None}, "no issuer; pass it, or set MCP_OAUTH_OIDC_ISSUER"),
            ({"client_id": " "}, "no client_id"),
            ({"client_secret": ""}, "no client_secret"),
            ({"allow": None}, "no allow; pass it, or set MCP_OAUTH_OIDC_ALLOW"),
            ({"allow": []}, "allow is empty"),
            ({"allow": [" "]}, "allow is empty"),
            ({"allow": "ada@example.com"}, "expected a list"),
            ({"allow": ["ada"]}, "'me@example.com', 'sub:...' or 'group:...'"),
            ({"allow": ["@example.com"]}, "'me@example.com'"),
            ({"allow": ["*@example.com"]}, "*@example.com"),
            ({"allow": ["a@b@c"]}, "a@b@c"),
            ({"allow": ["login:ada"]}, "login:ada"),
            ({"allow": ["sub:"]}, "expected printable text"),
            ({"allow": ["sub:a\nb"]}, "expected printable text"),
            ({"issuer": "accounts.google.com"}, "the issuer is 'accounts.google.com'; expected"),
            ({"issuer": "http://accounts.google.com"}, "the issuer is 'http://accounts.google.com'; expected"),
            ({"issuer": "http://127.0.0.1.evil.example"}, "the issuer is"),
            ({"issuer": "https://github.com", "allow": ["ada@example.com"]}, "'sub:583231' or 'login:octocat'"),
            ({"issuer": "https://github.com", "allow": ["group:family"]}, "'sub:583231'"),
            ({"issuer": "https://github.com/", "allow": ["ada@example.com"]}, "'sub:583231' or 'login:octocat'"),
            ({"issuer": "https://[bad"}, "the issuer is"),
            ({"issuer": "https://x:99999"}, "the issuer is"),
            ({"issuer": "https://x y/"}, "the issuer is"),
            ({"issuer": "https://accounts.google.com/?a"}, "the issuer is"),
            ({"allow": [7]}, "not a text"),
            ({"client_secret": b"the secret"}, "client_secret is not a text"),
            ({"client_secret": "the secret\udc80"}, "client_secret is not a text"),
            ({"allow": ["ada smith@example.com"]}, "ada smith@example.com"),
            ({"allow": ["ada@example.com;bob"]}, "'me@example.com'"),
            ({"allow": ["Sub:1@2"]}, "'me@example.com'"),
            ({"users": {"Ada@example.com": HASH}}, "would be two users; spell both alike"),
            ({"password_hash": "not a hash"}, "password_hash is not an argon2 hash"),
            ({"apps_path": "/sign-in/callback"}, "apps_path"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_bad(self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], complaint: str) -> None:
        """What is missing or cannot be used is named at construction, and no secret is quoted."""
        for name in ("ISSUER", "CLIENT_ID", "CLIENT_SECRET", "ALLOW"):
            monkeypatch.delenv(f"MCP_OAUTH_OIDC_{name}", raising=False)
        with pytest.raises(ConfigurationError) as caught:
            OidcApproval(**{**GOOD, **settings})
        assert complaint in str(caught.value)
        assert "the secret" not in str(caught.value)

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The environment alone makes a server with a provider; a part of it makes none."""
        url = "https://wiki.example.com"
        for name, value in (
            ("ISSUER", "https://accounts.google.com"),
            ("CLIENT_ID", "wiki"),
            ("CLIENT_SECRET", "the secret"),
        ):
            monkeypatch.setenv(f"MCP_OAUTH_OIDC_{name}", value)
            with pytest.raises(ConfigurationError, match="OidcApproval"):
                SQLAlchemyOAuthProvider(":memory:", base_url=url)
        monkeypatch.setenv("MCP_OAUTH_OIDC_ALLOW", "Ada@example.com, sub:7")
        provider = SQLAlchemyOAuthProvider(":memory:", base_url=url)
        assert isinstance(provider._approval, OidcApproval)
        account = provider._approval.sign_in.account
        assert account is not None
        assert (account.label, list(account.users)) == ("Google", ["ada@example.com", "sub:7"])
        for approval in (AutoApproval, PasskeyApproval, lambda: PasswordApproval(password_hash=HASH)):
            with pytest.raises(ConfigurationError, match="MCP_OAUTH_OIDC_ISSUER or another variable of it is set, but"):
                approval()

    def test_a_name_for_github(self) -> None:
        """The button may call every provider as the owner does."""
        settings: dict[str, Any] = {
            **GOOD,
            "issuer": "https://github.com/",
            "allow": ["login:Ada"],
            "provider_name": "Work",
        }
        account = OidcApproval(**settings).sign_in.account
        assert account is not None
        assert account.label == "Work"


async def signs_in(wiki: Site) -> bool:
    """Whether the user of the provider is signed in."""
    async with Browser() as browser:
        page = await come_back(browser, await browser.open(await wiki.authorize_url()))
        return page.status_code == 200 and bool(user_of(page))


async def nobody_signs_in(wiki: Site) -> None:
    """The user of the provider gets a page, and no session."""
    before = len(await rows_of_kind(wiki, SESSION))
    async with Browser() as browser:
        refused = await come_back(browser, await browser.open(await wiki.authorize_url()))
    assert refused.status_code == 403, refused.text
    assert "Acme did not sign you in." in refused.text
    assert len(await rows_of_kind(wiki, SESSION)) == before


def hmac_signed(claims: dict[str, Any], secret: str) -> str:
    """A token signed with a secret."""
    return jwt.encode({"alg": "HS256"}, claims, jwk.OctKey.import_key(secret), algorithms=["HS256"])


def _changed(cookie: Any, value: str) -> Any:
    cookie.value = value
    return cookie
