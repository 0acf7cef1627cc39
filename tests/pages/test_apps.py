"""The connected apps over HTTP, the pages' settings, and servers under a path."""

from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import time_machine
from pydantic import AnyUrl
from sqlalchemy import select

from oauth_store import ConfigurationError, PasswordApproval
from oauth_store.credentials import hash_secret
from oauth_store.database.models import SESSION, Token
from oauth_store.pages.apps import SHOWN
from tests.databases import rows_of, sqlite_rows, transaction
from tests.serving import free_port
from tests.sites import HASH, PASSWORD, USERS, Browser, Site, csrf_of, site
from tests.steps import query_of


def grant_ids(page: httpx2.Response) -> list[str]:
    """Return the grants that a page can revoke."""
    return [part.partition('"')[0] for part in page.text.split('name="revoke" value="')[1:] if part[:3] != "all"]


class TestGrants:
    """Which grants a user sees and revokes."""

    async def test_users_see_their_own(self, database_url: str) -> None:
        """Each user lists and revokes the grants that they approved, on every database; "all" means all of theirs."""
        async with site(database_url, approval={"users": USERS}) as wiki, Browser() as ada, Browser() as bob:
            tokens = {
                name: await wiki.connect(subject=name.partition(" ")[0], client_name=name)
                for name in ("ada 1", "ada 2", "bob 1", "eve 1")
            }

            async def live() -> list[str]:
                return [name for name, token in tokens.items() if await wiki.provider.verify_token(token.access_token)]

            of_ada = await ada.sign_in(f"{wiki.url}/apps", "ada's password", username="ada")
            of_bob = await bob.sign_in(f"{wiki.url}/apps", "bob's password", username="bob")
            assert ("ada 1" in of_ada.text, "ada 2" in of_ada.text, "bob 1" in of_ada.text) == (True, True, False)
            assert (len(grant_ids(of_ada)), len(grant_ids(of_bob))) == (2, 1)
            answer = await ada.submit(of_ada, {"revoke": grant_ids(of_bob)[0]})
            assert "It was already revoked." in answer.text
            assert len(await live()) == 4
            await ada.submit(of_ada, {"revoke": grant_ids(of_ada)[0]})
            assert len(await live()) == 3
            answer = await ada.submit(of_ada, {"revoke": "all", "password": "ada's password"})
            assert "1 app no longer has access." in answer.text
            assert await live() == ["bob 1", "eve 1"]

    async def test_one_password_sees_all(self, wiki: Site, browser: Browser) -> None:
        """With one password, the owner sees all grants, also those that former users approved."""
        await wiki.connect(subject="ada", client_name="Of Ada")
        await wiki.connect(subject=None, client_name="Of nobody")
        page = await browser.sign_in(f"{wiki.url}/apps")
        assert ("Of Ada" in page.text, "Of nobody" in page.text) == (True, True)
        assert page.text.count("Allowed by") == 1

    async def test_a_machine(self, wiki: Site, browser: Browser) -> None:
        """A machine is one entry without an address or a user, whose tokens end with its Revoke."""
        machine = {"client_id": "job", "client_secret": "the-secret", "redirect_uris": None}
        await wiki.register(
            client_name="Nightly job",
            grant_types=["client_credentials"],
            token_endpoint_auth_method="client_secret_post",
            **machine,
        )
        form = {"grant_type": "client_credentials", "client_id": "job", "client_secret": "the-secret"}
        tokens = [(await browser.http.post(f"{wiki.url}/token", data=form)).json()["access_token"] for _ in range(2)]
        page = await browser.sign_in(f"{wiki.url}/apps")
        assert (
            page.text.count("Nightly job")
            == page.text.count("<dd>a program without a browser</dd>")
            == len(grant_ids(page))
            == 1
        )
        await browser.submit(page, {"revoke": grant_ids(page)[0]})
        assert [await wiki.provider.verify_token(token) for token in tokens] == [None, None]

    async def test_revoking_ends_everything_of_the_grant(self, wiki: Site, browser: Browser) -> None:
        """The refresh token, access token and code are invalid at once, and the row names the user who revoked them."""
        token = await wiki.connect()
        page = await browser.sign_in(f"{wiki.url}/apps")
        await browser.submit(page, {"revoke": grant_ids(page)[0]})
        rows = await rows_of(wiki.provider, select(Token.revoked_reason).where(Token.kind != SESSION))
        assert [row.revoked_reason for row in rows] == ["revoked on the page by owner"] * 2
        assert await wiki.provider.verify_token(token.access_token) is None

    async def test_very_many(self, wiki: Site, browser: Browser) -> None:
        """Of very many apps, the most recently used are shown, and the page says that there are more."""
        url = await wiki.authorize_url(client_id="shared")
        tokens = []
        async with Browser() as app:
            for _ in range(SHOWN + 3):
                wiki.provider._flood_guard._limiter = type(wiki.provider._flood_guard._limiter)()
                handle = query_of(str((await app.open(url)).request.url))["handle"]
                tokens.append(await wiki.redeem(url, await wiki.provider.approve(handle)))
        page = await browser.sign_in(f"{wiki.url}/apps")
        assert len(grant_ids(page)) == SHOWN
        assert f"These are the {SHOWN} most recently used apps." in page.text
        answer = await browser.submit(page, {"revoke": "all", "password": PASSWORD})
        assert f"{SHOWN + 3} apps no longer have access." in answer.text
        assert [await wiki.provider.verify_token(token.access_token) for token in tokens] == [None] * (SHOWN + 3)


class TestSession:
    """The session in the browser and in the database."""

    async def test_it_is_a_hashed_row(self, tmp_path: Path, browser: Browser) -> None:
        """The row has its own kind, is valid for fifteen minutes, and holds only the session's hash."""
        async with site(tmp_path / "oauth.db") as wiki:
            await browser.sign_in(f"{wiki.url}/apps")
            session = session_of(wiki, browser)
        rows = sqlite_rows(
            str(tmp_path / "oauth.db"), "SELECT token_hash, kind, expires_at - created_at, client_id FROM oauth_tokens"
        )
        assert rows == [(hash_secret(session), "session", 900, None)]

    async def test_it_is_no_token_and_a_token_is_none(self, wiki: Site, browser: Browser) -> None:
        """A session is refused as a token, and a token as a session."""
        token = await wiki.connect()
        await browser.sign_in(f"{wiki.url}/apps")
        session = session_of(wiki, browser)
        assert await wiki.provider.verify_token(session) is None
        assert await wiki.provider.load_access_token(session) is None
        for secret in (token.access_token, str(token.refresh_token), f"{token.access_token}.x", "", "x", "é"):
            async with Browser() as attacker:
                cookie = f"{wiki.provider.cookies._name('oauth_store_session')}={secret}".encode()
                page = await attacker.http.get(f"{wiki.url}/apps", headers={b"Cookie": cookie})
                assert ("Password for this server" in page.text, "Sign out" in page.text) == (True, False)

    async def test_it_ends_after_fifteen_minutes(self, wiki: Site, browser: Browser) -> None:
        """Until its last second it lists the apps; after that it neither lists nor revokes."""
        token = await wiki.connect()
        page = await browser.sign_in(f"{wiki.url}/apps")
        async with transaction(wiki.provider) as session:
            expires_at = (await session.execute(select(Token.expires_at).where(Token.kind == SESSION))).scalar_one()
        cookie = f"{wiki.provider.cookies._name('oauth_store_session')}={session_of(wiki, browser)}"
        async with Browser(Cookie=cookie) as other:  # a real browser would drop the cookie
            with time_machine.travel(expires_at - 1, tick=False):
                assert len(grant_ids(await other.open(f"{wiki.url}/apps"))) == 1
            with time_machine.travel(expires_at, tick=False):
                assert grant_ids(await other.open(f"{wiki.url}/apps")) == []
                answer = await other.submit(page, {"revoke": "all"})
                assert "You were signed out." in answer.text
                assert await wiki.provider.verify_token(token.access_token) is not None

    async def test_signing_out_ends_it_and_no_other(self, wiki: Site, browser: Browser) -> None:
        """A session ends when it is signed out, even for a stolen cookie; that of another browser continues."""
        page = await browser.sign_in(f"{wiki.url}/apps")
        cookie = f"{wiki.provider.cookies._name('oauth_store_session')}={session_of(wiki, browser)}"
        async with Browser() as other, Browser(Cookie=cookie) as thief:
            await other.sign_in(f"{wiki.url}/apps")
            assert "Sign out" in (await thief.open(f"{wiki.url}/apps")).text
            await browser.submit(page, {"sign_out": "yes"})
            assert "Sign out" not in (await thief.open(f"{wiki.url}/apps")).text
            assert "Sign out" in (await other.open(f"{wiki.url}/apps")).text

    async def test_signing_in_makes_a_new_one(self, wiki: Site, browser: Browser) -> None:
        """A session that was planted before is not used when the owner signs in."""
        browser.http.cookies.set(
            wiki.provider.cookies._name("oauth_store_session"), "session_planted", domain="127.0.0.1"
        )
        page = await browser.sign_in(f"{wiki.url}/apps")
        assert "Sign out" in page.text
        assert session_of(wiki, browser) != "session_planted"

    @pytest.mark.parametrize("fields", [{"revoke": "all"}, {"sign_out": "yes"}])
    async def test_its_forms_carry_its_token(self, wiki: Site, browser: Browser, fields: dict[str, str]) -> None:
        """Without the token, with another session's, or from another page, nothing is revoked or signed out."""
        await wiki.connect()
        page = await browser.sign_in(f"{wiki.url}/apps")
        async with Browser() as other:
            another = csrf_of(await other.sign_in(f"{wiki.url}/apps"))
        for token in ("", "x", another):
            assert (await browser.submit(page, {**fields, "csrf": token})).status_code == 403
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "same-site"}):
            assert (await browser.submit(page, fields, **headers)).status_code == 403
        left = await browser.open(f"{wiki.url}/apps")
        assert (len(grant_ids(left)), "Sign out" in left.text) == (1, True)

    async def test_signing_in_from_another_page(self, wiki: Site, browser: Browser) -> None:
        """A foreign page cannot sign a browser in, not even with a password that it knows."""
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = await browser.http.post(f"{wiki.url}/apps", data={"password": PASSWORD}, headers=headers)
            assert "set-cookie" not in answer.headers
            assert answer.status_code == 200

    async def test_a_get_changes_nothing(self, wiki: Site, browser: Browser) -> None:
        """A link neither revokes nor signs out."""
        await wiki.connect()
        page = await browser.sign_in(f"{wiki.url}/apps")
        for link in (f"revoke=all&csrf={csrf_of(page)}", f"sign_out=yes&csrf={csrf_of(page)}"):
            assert len(grant_ids(await browser.open(f"{wiki.url}/apps?{link}"))) == 1

    @pytest.mark.parametrize("which", ["", "nonsense", "00", "ff" * 16, "0" * 10_000, "é", "' OR 1=1 --"])
    async def test_nonsense_revokes_nothing(self, wiki: Site, browser: Browser, which: str) -> None:
        """An unknown grant or an invalid id revokes nothing, and nothing breaks."""
        await wiki.connect()
        page = await browser.sign_in(f"{wiki.url}/apps")
        answer = await browser.submit(page, {"revoke": which})
        assert (answer.status_code, len(grant_ids(answer))) == (200, 1)


class TestSettings:
    """The owner's settings."""

    async def test_branding(self, tmp_path: Path, browser: Browser) -> None:
        """The pages show the owner's name, logo and color; the policy allows only the logo's origin."""
        approval = {"name": "Our <wiki>", "logo_url": "https://img.example/logo.png?a=1&b=2", "accent": "#ffee00"}
        async with site(tmp_path / "oauth.db", approval=approval) as wiki:
            page = await browser.open(await wiki.authorize_url())
        assert "to use Our &lt;wiki&gt;?" in page.text
        assert '<img src="https://img.example/logo.png?a=1&amp;b=2" alt="">' in page.text
        assert "--accent: #ffee00; --on-accent: #000000;" in page.text
        assert "img-src https://img.example;" in page.headers["content-security-policy"]

    async def test_scope_descriptions(self, tmp_path: Path, browser: Browser) -> None:
        """Both pages show the owner's descriptions of scopes."""
        async with site(tmp_path / "oauth.db", approval={"scope_descriptions": {"read": "read <all>"}}) as wiki:
            page = await browser.open(await wiki.authorize_url())
            assert "<li><bdi>read &lt;all&gt;</bdi></li>" in page.text
            await wiki.connect()
            assert "<bdi>read &lt;all&gt;</bdi>, <bdi>write</bdi>" in (await browser.sign_in(f"{wiki.url}/apps")).text

    async def test_known_hosts(self, tmp_path: Path, browser: Browser) -> None:
        """For a host that the owner configured there is no warning."""
        redirect_uris = [AnyUrl("https://app.example/cb")]
        for known_hosts, warned in (((), True), (("app.example",), False)):
            async with site(tmp_path / "oauth.db", approval={"known_hosts": known_hosts}) as wiki:
                page = await browser.open(await wiki.authorize_url(redirect_uris=redirect_uris))
            assert ("This server does not know this address" in page.text) is warned

    async def test_own_templates(self, tmp_path: Path, browser: Browser) -> None:
        """The owner's template replaces the built-in one, is escaped too, and may extend the built-in ones."""
        directory = tmp_path / "templates"
        directory.mkdir()
        (directory / "consent.html").write_text(
            '{% extends "base.html" %}{% block content %}<h1>Mine: {{ client }}</h1>'
            '<form method="post" action="{{ action }}"><input type="hidden" name="csrf" value="{{ csrf }}">'
            "{% include 'fields.html' %}<button name=answer value=allow>OK</button></form>{% endblock %}"
        )
        async with site(tmp_path / "oauth.db", approval={"templates": directory}) as wiki:
            url = await wiki.authorize_url(client_name="<b>")
            page = await browser.open(url)
            assert "<h1>Mine: &lt;b&gt;</h1>" in page.text
            assert (await browser.allow(page)).status_code == 303
            assert "Connected apps" in (await browser.open(f"{wiki.url}/apps")).text

    @pytest.mark.parametrize("text", [b"{% if %}", b"{{", b"\xff"])
    def test_a_template_that_cannot_be_read(self, tmp_path: Path, text: bytes) -> None:
        """A mistake in a template is an error at construction, not when an app connects."""
        (tmp_path / "message.html").write_bytes(text)
        with pytest.raises(ConfigurationError, match=r"templates: message\.html cannot be read"):
            PasswordApproval(password_hash=HASH, templates=tmp_path)

    async def test_the_path_of_the_apps(self, tmp_path: Path, browser: Browser) -> None:
        """The page is at the path that the owner sets, or disabled."""
        for path, statuses in (("/apps", [200, 404]), ("/manage/apps", [404, 200]), (None, [404, 404])):
            async with site(tmp_path / "oauth.db", approval={"apps_path": path}) as wiki:
                found = [await browser.open(f"{wiki.url}{one}") for one in ("/apps", "/manage/apps")]
                assert [page.status_code for page in found] == statuses

    @pytest.mark.parametrize("path", ["apps", "/", "", "/consent", "/token", "/a{b}", "/apps?x", "/apps#x", "//evil"])
    def test_a_path_that_cannot_be(self, path: str) -> None:
        """A path that is invalid, taken, or special to the router is an error at construction."""
        with pytest.raises(ConfigurationError, match="apps_path is"):
            PasswordApproval(password_hash=HASH, apps_path=path)


class TestPaths:
    """Servers that are not at the root of their host."""

    async def test_under_a_path(self, tmp_path: Path, browser: Browser) -> None:
        """Every link, form and redirect includes the path; the cookies are valid for it."""
        async with site(tmp_path / "oauth.db", path="/wiki") as wiki:
            assert wiki.url.endswith("/wiki")
            url = await wiki.authorize_url()
            page = await browser.open(url)
            assert urlsplit(str(page.url)).path == "/wiki/consent"
            assert f"to use {wiki.url.removeprefix('http://')}?" in page.text
            answer = await browser.allow(page)
            assert (await wiki.redeem(url, answer.headers["location"])).access_token
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert str(apps.url) == f"{wiki.url}/apps"
            assert len(grant_ids(apps)) == 1
            assert (await browser.submit(apps, {"sign_out": "yes"})).headers["location"] == f"{wiki.url}/apps"

    async def test_two_servers_on_one_host(self, tmp_path: Path, browser: Browser) -> None:
        """Browsers send the cookies of one server to the other: neither uses nor replaces the other's."""
        async with site(tmp_path / "one.db", path="/one") as one, site(tmp_path / "two.db", path="/two") as two:
            assert "Sign out" in (await browser.sign_in(f"{one.url}/apps")).text
            assert "Sign out" not in (await browser.open(f"{two.url}/apps")).text
            assert "Sign out" in (await browser.sign_in(f"{two.url}/apps")).text
            assert "Sign out" in (await browser.open(f"{one.url}/apps")).text

    async def test_on_https(self, tmp_path: Path) -> None:
        """Behind an https proxy, every cookie is __Host-, Secure, HttpOnly, and for the path "/"."""
        port = free_port()
        async with (
            site(tmp_path / "oauth.db", base_url="https://wiki.example.com/wiki", port=port) as wiki,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as proxied,
        ):
            url = await wiki.authorize_url()
            started = await proxied.get(f"/authorize?{urlsplit(url).query}")
            page = started.headers["location"]
            assert page.startswith("https://wiki.example.com/wiki/consent?")
            cookie = started.headers["set-cookie"]
            sent = {"Cookie": cookie.partition(";")[0]}
            shown = await proxied.get(f"/consent?{urlsplit(page).query}", headers=sent)
            assert "to use wiki.example.com/wiki?" in shown.text
            fields = {"csrf": csrf_of(shown), "answer": "allow", "password": PASSWORD}
            allowed = await proxied.post(f"/consent?{urlsplit(page).query}", data=fields, headers=sent)
            signed_in = await proxied.post("/apps", data={"password": PASSWORD})
        cookies = [cookie, *allowed.headers.get_list("set-cookie"), *signed_in.headers.get_list("set-cookie")]
        assert len(cookies) == 4
        for one in cookies:
            name, _, attributes = one.partition("=")
            assert name.startswith("__Host-oauth_store_")
            strict = "session" in name
            assert {part.strip() for part in attributes.split(";")[1:] if "Max-Age" not in part} == {
                "HttpOnly",
                "Secure",
                "Path=/",
                f"SameSite={'strict' if strict else 'lax'}",
            }


def session_of(wiki: Site, browser: Browser) -> str:
    """Return the session of a browser."""
    session = browser.http.cookies.get(wiki.provider.cookies._name("oauth_store_session"))
    assert session is not None
    return session
