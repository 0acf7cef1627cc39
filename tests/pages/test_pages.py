"""The pages: isolated from the rest of the web, and everything from a client is plain text."""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp.server.auth.settings import ClientRegistrationOptions
from pydantic import AnyUrl

from oauth_store.browser import request_cookie
from oauth_store.display import app_name, short_line
from oauth_store.pages.wording import Target, in_words, scopes_in_words
from oauth_store.rate_limits import RateLimits
from tests.sites import PASSWORD, Browser, Site, csrf_of, handle_of, site
from tests.steps import query_of

DEFAULT_IGNORABLE = [
    range(first, last + 1)
    for first, last in (
        *((0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F)),
        *((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
        *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
    )
]
"""From DerivedCoreProperties.txt of Unicode 15."""
SECURITY_HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-type": "text/html; charset=utf-8",
}


class TestHeaders:
    """Every page is isolated."""

    async def test_every_page(self, tmp_path: Path, browser: Browser) -> None:
        """No page can be framed, is cached, sends its address, or may run a script: forms, errors and messages."""
        limits = RateLimits(authorizations_per_address="4/minute")
        async with site(tmp_path / "oauth.db", rate_limits=limits) as wiki:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            apps = f"{wiki.url}/apps"
            pages = [
                (200, page),
                (403, await browser.allow(page, "wrong")),
                (400, await browser.submit(page, {})),
                (403, await browser.submit(page, {"csrf": ""})),
                (413, await browser.submit(page, {"password": "x" * 100_000})),
                (403, await browser.open(f"{wiki.url}/consent?handle=other")),
                (400, await browser.open(f"{wiki.url}/authorize?client_id=unknown&response_type=code")),
                (400, await browser.open(f"{url}&redirect_uri=https%3A%2F%2Fevil.example")),
                (200, await browser.open(apps)),
                (403, await browser.sign_in(apps, "wrong")),
                (200, await browser.sign_in(apps)),
                (403, await browser.http.post(apps, data={"revoke": "all"})),
            ]
            await browser.submit(page, {"answer": "deny"})
            pages.append((410, await browser.open(str(page.url))))
            pages += [(429, await browser.open(url)) for _ in range(2)][1:]
        for status, shown_page in pages:
            assert shown_page.status_code == status
            assert {name: shown_page.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
            nonce = re.search(r'<style nonce="([\w-]+)">', shown_page.text)
            assert nonce is not None
            assert shown_page.headers["content-security-policy"] == (
                f"default-src 'none'; style-src 'nonce-{nonce[1]}'; img-src 'none'; base-uri 'none'; "
                "frame-ancestors 'none'"
            )
            assert '<html lang="en">' in shown_page.text
        nonces = {shown_page.headers["content-security-policy"] for _, shown_page in pages}
        assert len(nonces) == len(pages)

    async def test_an_outage_is_a_page_too(self, tmp_path: Path, browser: Browser) -> None:
        """If the database is down, a page says what to do; the response is still 503 with Retry-After."""
        async with site(tmp_path / "nowhere" / "oauth.db") as wiki:
            browser.http.cookies.set(wiki.provider.cookies._name(request_cookie("some")), "browser_some")
            page = await browser.open(f"{wiki.url}/consent?handle=some")
        assert (page.status_code, page.headers["retry-after"]) == (503, "5")
        assert "Reload this page in a moment" in page.text
        assert {name: page.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS

    async def test_the_redirects(self, wiki: Site, browser: Browser) -> None:
        """Neither redirect is cached, and the client does not learn the page's address."""
        answer = await browser.http.get(await wiki.authorize_url())
        assert answer.headers["cache-control"] == "no-store"
        allowed = await browser.allow(await browser.open(answer.headers["location"]))
        assert (allowed.headers["cache-control"], allowed.headers["referrer-policy"]) == ("no-store", "no-referrer")


class TestWhatIsShown:
    """Everything from a client is plain text."""

    async def test_markup_is_text(self, wiki: Site, browser: Browser) -> None:
        """Markup in a name, a scope or a redirect URI is escaped, or not shown."""
        script = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
        page = await browser.open(
            await wiki.authorize_url(
                client_name=script,
                scope="<img/src=x/onerror=alert(1)> '><b>",
                redirect_uris=[AnyUrl(f"https://evil.example/{script}")],
            )
        )
        assert page.status_code == 200
        assert not re.search(r"<(script|img|b)\b", page.text)
        assert page.text.count("&lt;script&gt;") == 1
        assert "&lt;img/src=x/onerror=alert(1)&gt;" in page.text

    @pytest.mark.parametrize(
        ("name", "displayed"),
        [
            (None, "an app without a name"),
            ("  ", "an app without a name"),
            ("\u200b\u2060\ufeff\u3164\u2800", "an app without a name"),
            ("Cla\u202ed\u2066u\u200fe", "Cla d u e"),
            ("one\r\ntwo\tthree\u2028four", "one two three four"),
            ("x" * 81, f"{'x' * 79}…"),
            ("Claude” (verified) “", "Claude” (verified) “"),
            ("\u0301\u0316", "an app without a name"),
            (" \u0301Claude", "Claude"),
            ("Z\u0301\u0302\u0303\u0304\u0305algo", "Ź\u0302\u0303algo"),
            ("\x00\x1b[31mred", "[31mred"),
            ("日本語のアプリ", "日本語のアプリ"),
        ],
    )
    def test_names(self, name: str | None, displayed: str) -> None:
        """A name is short, on one line, visible, and cannot turn, cover or end the text around it."""
        assert app_name(name) == displayed

    @pytest.mark.parametrize("ending", ['"', "”", "❞", "″", "ʺ", "״", "ˮ", "˝", "</bdi>", "』", "''"])
    async def test_a_name_stands_in_a_box(self, wiki: Site, browser: Browser, ending: str) -> None:
        """No character of a name ends the box around it, in the heading and in the list of apps; the page has the name
        nowhere else."""
        name = f"Claude{ending} is verified. {ending}"
        await wiki.connect(client_name=name)
        page = await browser.open(await wiki.authorize_url(client_name=name))
        apps = await browser.sign_in(f"{wiki.url}/apps")
        grant = re.search('name="revoke" value="([0-9a-f]+)"', apps.text)
        assert grant is not None
        revoked = await browser.http.post(f"{wiki.url}/apps", data={"csrf": csrf_of(apps), "revoke": grant[1]})
        for shown_page in (page, apps, revoked):
            boxes = re.findall(r'<bdi class="name">(.*?)</bdi>', shown_page.text)
            assert [html.unescape(box) for box in boxes] == [name]
            assert shown_page.text.count("is verified.") == 1

    @pytest.mark.parametrize("ignorable", DEFAULT_IGNORABLE)
    def test_a_name_that_looks_like_nothing(self, ignorable: range) -> None:
        """A name of only invisible characters (Unicode's Default_Ignorable_Code_Point) counts as empty."""
        assert app_name("".join(map(chr, ignorable))[:80]) == "an app without a name"
        assert app_name(chr(ignorable[0]) * 3) == "an app without a name"

    def test_a_huge_text_is_cut_before_it_is_looked_at(self) -> None:
        """Characters that are not shown cost nothing."""
        assert short_line("\u200b" * 1_000_000 + "end") == ""

    @pytest.mark.parametrize(
        ("redirect_uri", "target"),
        [
            ("https://claude.ai/api/mcp/auth_callback", ("web", "claude.ai", "Claude", "")),
            ("https://claude.com/api/mcp/auth_callback", ("web", "claude.com", "Claude", "")),
            ("https://chatgpt.com/connector_platform_oauth_redirect", ("web", "chatgpt.com", "ChatGPT", "")),
            ("https://chatgpt.com/connector/oauth/FLLrQdlez6Uf", ("web", "chatgpt.com", "ChatGPT", "")),
            ("https://vscode.dev/redirect", ("web", "vscode.dev", "Visual Studio Code", "")),
            ("https://insiders.vscode.dev/redirect", ("web", "insiders.vscode.dev", "Visual Studio Code", "")),
            ("https://www.cursor.com/agents/mcp/oauth/callback", ("web", "www.cursor.com", "Cursor", "")),
            ("https://claude.ai/any/path?to=https://evil.example", ("web", "claude.ai", None, "")),
            ("https://claude.ai/api/mcp/auth_callback?to=https://evil.example", ("web", "claude.ai", None, "")),
            ("https://claude.ai/api/mcp/auth_callback/", ("web", "claude.ai", None, "")),
            ("https://claude.ai:8443/api/mcp/auth_callback", ("web", "claude.ai:8443", None, "")),
            ("https://chatgpt.com:8443/x", ("web", "chatgpt.com:8443", None, "")),
            ("https://chatgpt.com/connector/oauth/", ("web", "chatgpt.com", None, "")),
            ("https://chatgpt.com/connector/oauth/x/../../evil", ("web", "chatgpt.com", None, "")),
            ("https://chatgpt.com/connector/oauth/x?to=https://evil.example", ("web", "chatgpt.com", None, "")),
            ("https://chatgpt.com/connector/oauth/x%2f..%2fevil", ("web", "chatgpt.com", None, "")),
            ("http://claude.ai/cb", ("web", "claude.ai", None, "")),
            ("https://evil.example/claude.ai", ("web", "evil.example", None, "")),
            ("https://claude.ai.evil.example/cb", ("web", "claude.ai.evil.example", None, "ai.evil.example")),
            ("https://claude-ai.example/cb", ("web", "claude-ai.example", None, "")),
            ("https://wiki.example/cb", ("web", "wiki.example", "an app that this server knows", "")),
            ("https://wiki.example:443/cb", ("web", "wiki.example", "an app that this server knows", "")),
            ("https://wiki.example:8443/cb", ("web", "wiki.example:8443", None, "")),
            ("http://wiki.example/cb", ("web", "wiki.example", None, "")),
            ("https://\u0441laude.ai/cb", ("web", "xn--laude-0ye.ai", None, "")),
            ("https://claude。ai/api/mcp/auth_callback", ("web", "claude.ai", "Claude", "")),
            ("https://localhost.evil.example/cb", ("web", "localhost.evil.example", None, "")),
            ("https://127.0.0.1.evil.example/cb", ("web", "127.0.0.1.evil.example", None, "1.evil.example")),
            ("https://claude.ai@evil.example/cb", ("web", "evil.example", None, "")),
            ("http://127.0.0.1:9000/cb", ("loopback", "127.0.0.1:9000", None, "")),
            ("http://localhost/cb", ("loopback", "localhost", None, "")),
            ("http://[::1]:9000/cb", ("loopback", "[::1]:9000", None, "")),
            ("cursor://anysphere.cursor-mcp/oauth/callback", ("app", "cursor://anysphere.cursor-mcp", None, "")),
            ("ftp://evil.example/cb", ("app", "ftp://evil.example", None, "")),
            ("evil://cl\u0430ude.ai/cb", ("app", "evil://cl%D0%B0ude.ai", None, "")),
            ("claude.ai:/api/mcp/auth_callback", ("app", "claude.ai:", None, "")),
            ("com.example.app:/claude.ai", ("app", "com.example.app:", None, "")),
        ],
    )
    def test_targets(self, redirect_uri: str, target: tuple[Any, ...]) -> None:
        """The page shows the host that a browser would go to, in letters that cannot be mistaken."""
        found = Target.of(str(AnyUrl(redirect_uri)), known_hosts={"wiki.example"})
        assert (found.kind, found.host, found.known_as, found.ending) == target

    @pytest.mark.parametrize(
        ("redirect_uri", "start"),
        [
            ("cursor://anysphere.cursor-mcp/oauth/callback", "cursor://anysphere.cursor-mcp"),
            ("claude.ai:/cb", "claude.ai:"),
        ],
    )
    async def test_a_link_of_an_apps_own(self, wiki: Site, browser: Browser, redirect_uri: str, start: str) -> None:
        """Both pages show the start of such links; the consent page says that the app cannot be verified."""
        page = await browser.open(await wiki.authorize_url(redirect_uris=[AnyUrl(redirect_uri)]))
        assert f'links starting with <strong class="host">{start}</strong>' in page.text
        assert "An app on this device is asking. This page cannot verify which one." in page.text
        assert "The address of" not in page.text
        await wiki.connect(redirect_uris=[AnyUrl(redirect_uri), AnyUrl("https://app.example:8443/cb")])
        apps = await browser.sign_in(f"{wiki.url}/apps")
        assert f"<dd>{start}, app.example:8443</dd>" in apps.text

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            (1, "1 second"),
            (90, "90 seconds"),
            (600, "10 minutes"),
            (3600, "1 hour"),
            (5400, "90 minutes"),
            (86400, "1 day"),
            (2592000, "30 days"),
        ],
    )
    def test_durations(self, seconds: int, words: str) -> None:
        """A duration is in the largest suitable unit."""
        assert in_words(seconds) == words

    async def test_for_how_long(self, wiki: Site, browser: Browser) -> None:
        """A client with refresh tokens stays until it is revoked; one without has to ask again."""
        page = await browser.open(await wiki.authorize_url())
        assert "Until you revoke it, or until it goes unused for 30 days" in page.text
        page = await browser.open(await wiki.authorize_url(grant_types=["authorization_code"]))
        assert "1 hour; then it has to ask again" in page.text

    def test_scopes(self) -> None:
        """Scopes have the owner's descriptions, if any; no scopes means everything."""
        descriptions = {"read": "read every page"}
        assert scopes_in_words(["read", "write", "offline_access"], descriptions) == [
            "read every page",
            "write",
            "stay connected while you are away",
        ]
        assert scopes_in_words([], descriptions) == ["use everything that this server offers to apps"]

    async def test_every_scope_can_be_seen(self, tmp_path: Path, browser: Browser) -> None:
        """No scope is left out: those that do not fit are behind "and 32 more"."""
        scopes = [f"scope-{number}" for number in range(40)]
        options = ClientRegistrationOptions(enabled=True, valid_scopes=scopes)
        async with site(tmp_path / "oauth.db", client_registration_options=options) as wiki:
            page = await browser.open(await wiki.authorize_url(scope=" ".join(scopes)))
        assert all(f"<bdi>{scope}</bdi>" in page.text for scope in scopes)
        assert "and 32 more" in page.text


class TestDatabaseFile:
    """The database file has nothing that gives access."""

    async def test_no_secret_is_in_it(self, tmp_path: Path, browser: Browser) -> None:
        """The file has no handle, cookie, form token, session, code or password."""
        async with site(tmp_path / "oauth.db") as wiki:
            url = await wiki.authorize_url()
            page = await browser.open(url)
            allowed = await browser.allow(page)
            apps = await browser.sign_in(f"{wiki.url}/apps")
            secrets = {
                "handle": handle_of(page),
                "form token": csrf_of(page),
                "code": query_of(allowed.headers["location"])["code"],
                "apps token": csrf_of(apps),
                "password": PASSWORD,
                **{cookie: value.partition(".")[2] or value for cookie, value in browser.http.cookies.items()},
            }
            assert len(secrets) == 8
            # SQLite's files are for other processes to look into while it has them open
            grep = (
                "import pathlib, sys; print(b''.join(map(pathlib.Path.read_bytes, pathlib.Path('.').iterdir())).hex())"
            )
            found = subprocess.run(
                [sys.executable, "-c", grep], cwd=tmp_path, capture_output=True, check=True, text=True
            )
        stored = bytes.fromhex(found.stdout)
        assert b"Test client" in stored
        for name, secret in secrets.items():
            assert secret.encode() not in stored, name

    async def test_a_handle_or_a_cookie_is_no_code(self, wiki: Site, browser: Browser) -> None:
        """The browser's secrets of an approved request are not valid at the token endpoint."""
        url = await wiki.authorize_url()
        page = await browser.open(url)
        await browser.allow(page)
        client = await wiki.provider.get_client(query_of(url)["client_id"])
        assert client is not None
        for carried in (handle_of(page), csrf_of(page), *browser.http.cookies.values()):
            assert await wiki.provider.load_authorization_code(client, carried) is None
            assert await wiki.provider.verify_token(carried) is None
