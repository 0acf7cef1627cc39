"""examples/oidc_approval.py, with a real OpenID Connect provider and its sign-in form."""

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from fastmcp import Client, FastMCP
from fastmcp.server.dependencies import get_access_token
from fastmcp.utilities.tests import HeadlessOAuth

from examples.oidc_approval import CALLBACK, PAGE, OidcApproval
from oauth_store import ConfigurationError, SQLAlchemyOAuthProvider
from tests.openid import CLIENT_ID, CLIENT_SECRET, Browser, OpenIdProvider, hidden_fields
from tests.serving import free_port, serving
from tests.steps import authorization_request, pkce, query_of

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "oidc_approval.py"
CLIENT_URI = "http://127.0.0.1:9/callback"
PORT = free_port()
BASE_URL = f"http://127.0.0.1:{PORT}"
CALLBACK_URL = BASE_URL + CALLBACK

Wiki = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture(scope="module")
def upstream() -> Iterator[OpenIdProvider]:
    """A provider that knows our server."""
    with OpenIdProvider(CALLBACK_URL) as provider:
        yield provider


@pytest.fixture
def wiki(upstream: OpenIdProvider, tmp_path: Path) -> Wiki:
    """Serve a wiki whose owner is ada, on the same SQLite file every time, and yield the URL of its MCP endpoint."""

    @asynccontextmanager
    async def serve(**settings: str) -> AsyncIterator[str]:
        approval = OidcApproval(
            {
                "OIDC_ISSUER": upstream.issuer,
                "OIDC_CLIENT_ID": CLIENT_ID,
                "OIDC_CLIENT_SECRET": CLIENT_SECRET,
                "OIDC_OWNER_EMAILS": "grace@example.com, ada@example.com",
                **settings,
            }
        )
        async with SQLAlchemyOAuthProvider(tmp_path / "oauth.db", base_url=BASE_URL, approval=approval) as provider:
            mcp: FastMCP[None] = FastMCP("wiki", auth=provider)

            @mcp.tool
            def whoami() -> str | None:
                token = get_access_token()
                return token.subject if token else None

            async with serving(mcp.http_app(stateless_http=True), PORT) as url:
                yield f"{url}/mcp"

    return serve


@pytest.fixture
async def browser(upstream: OpenIdProvider) -> AsyncIterator[Browser]:
    """The browser of the owner."""
    async with Browser(BASE_URL, upstream.issuer) as browser:
        yield browser


@pytest.fixture
async def other_browser(upstream: OpenIdProvider) -> AsyncIterator[Browser]:
    """The browser of somebody else."""
    async with Browser(BASE_URL, upstream.issuer) as browser:
        yield browser


async def request_url(code_challenge: str | None = None, **metadata: Any) -> str:
    """Register a client, and return the URL that it opens in a browser."""
    async with httpx2.AsyncClient(base_url=BASE_URL) as http:
        metadata = {"redirect_uris": [CLIENT_URI], "token_endpoint_auth_method": "none", **metadata}
        client = (await http.post("/register", json=metadata)).json()
    challenge = {} if code_challenge is None else {"code_challenge": code_challenge}
    asked = authorization_request(client["client_id"], redirect_uri=metadata["redirect_uris"][0], **challenge)
    return f"{BASE_URL}/authorize?{urlencode(asked)}"


def is_question(page: httpx2.Response) -> bool:
    """Whether a page is the one that asks for Allow or Deny."""
    return page.status_code == 200 and 'value="allow"' in page.text


def is_sign_in_form(page: httpx2.Response, upstream: OpenIdProvider) -> bool:
    """Whether a page is the sign-in form of the provider."""
    return str(page.url).startswith(upstream.issuer) and 'name="login"' in page.text


class TestFlow:
    """What the owner does."""

    @pytest.mark.filterwarnings("ignore:Using in-memory token storage")
    @pytest.mark.parametrize(
        "owners",
        [
            {},
            {"OIDC_OWNER_SUBJECTS": "ada", "OIDC_OWNER_EMAILS": ""},
            {"OIDC_OWNER_SUBJECTS": "1,ada", "OIDC_OWNER_EMAILS": "grace@example.com"},
        ],
        ids=["by email", "by subject", "by either"],
    )
    async def test_a_client_gets_in_when_the_owner_has_signed_in_and_allowed_it(
        self, wiki: Wiki, browser: Browser, owners: dict[str, str]
    ) -> None:
        """From `fastmcp.Client` through the provider's form and our question to a tool call, with the owner's `sub`."""

        class OwnersOAuth(HeadlessOAuth):
            async def redirect_handler(self, authorization_url: str) -> None:
                question = await browser.sign_in(await browser.open(authorization_url), "ada")
                assert is_question(question), question.text
                answer = await browser.send(question, {"answer": "allow"})
                assert answer.status_code == 303
                answer.status_code = 302  # the only redirect that HeadlessOAuth knows
                self._stored_response = answer  # type: ignore[assignment]  # it is declared as None

        async with wiki(**owners) as url, Client(url, auth=OwnersOAuth(url)) as client:
            assert (await client.call_tool("whoami")).data == "ada"

    async def test_the_question_says_who_asks_and_where_the_code_goes(self, wiki: Wiki, browser: Browser) -> None:
        """The page names client, target and who is signed in, escaped, in a browser that may not frame or keep it."""
        name = "<script>alert(1)</script>\u202eEvil"
        async with wiki():
            url = await request_url(client_name=name, redirect_uris=["https://evil.example/cb"], scope="read write")
            question = await browser.sign_in(await browser.open(url), "ada")
        assert '<bdi class="name">&lt;script&gt;alert(1)&lt;/script&gt;Evil</bdi>' in question.text
        assert "<strong>evil.example</strong>" in question.text
        assert re.findall('name="scope" value="([^"]*)" checked', question.text) == ["read", "write"]
        assert "ada@example.com (subject ada)" in question.text
        assert "frame-ancestors 'none'" in question.headers["content-security-policy"]
        assert question.headers["cache-control"] == "no-store"
        assert question.headers["referrer-policy"] == "no-referrer"

    async def test_a_link_of_an_apps_own_is_shown_as_one(self, wiki: Wiki, browser: Browser) -> None:
        """A scheme of an application's own cannot pose as a web address, nor hide what stands for its host."""
        async with wiki():
            url = await request_url(redirect_uris=["evil://claude.ai/callback"])
            question = await browser.sign_in(await browser.open(url), "ada")
        assert is_question(question)
        assert "opens links that begin with evil://claude.ai</strong>" in question.text

    async def test_the_owner_chooses_what_the_app_may_do(self, wiki: Wiki, browser: Browser) -> None:
        """What is ticked is in the token response; without a tick, or with a scope that has no box, nothing is."""
        verifier, challenge = pkce()
        async with wiki():
            url = await request_url(challenge, scope="read write offline_access")
            question = await browser.sign_in(await browser.open(url), "ada")
            assert re.findall('name="scope" value="([^"]*)"', question.text) == ["read", "write"]
            nothing = await browser.send(question, {"answer": "allow"})
            assert (nothing.status_code, "Choose at least one, or deny." in nothing.text) == (400, True)
            unknown = await browser.send(question, {"answer": "allow", "scope": "admin"})
            assert unknown.status_code == 410
            answer = await browser.send(question, {"answer": "allow", "scope": "write"})
            async with httpx2.AsyncClient(base_url=BASE_URL) as http:
                form = {
                    "grant_type": "authorization_code",
                    "code": query_of(answer.headers["location"])["code"],
                    "client_id": query_of(url)["client_id"],
                    "redirect_uri": CLIENT_URI,
                    "code_verifier": verifier,
                }
                token = (await http.post("/token", data=form)).json()
        assert token["scope"] == "write offline_access"

    async def test_the_owner_may_deny(self, wiki: Wiki, browser: Browser) -> None:
        """Deny tells the client so, with its state; and the request is over."""
        async with wiki():
            question = await browser.sign_in(await browser.open(await request_url()), "ada")
            answer = await browser.send(question, {"answer": "deny"})
            told = query_of(answer.headers["location"])
            assert (told["error"], told["state"], told["iss"]) == ("access_denied", "the-state", f"{BASE_URL}/")
            late = await browser.send(question, {"answer": "allow"})
        assert late.status_code == 410

    async def test_a_sign_in_outlives_a_restart_but_not_a_change_of_owners(self, wiki: Wiki, browser: Browser) -> None:
        """Another process with the same settings takes the answer; one with other owners asks to sign in again."""
        async with wiki():
            question = await browser.sign_in(await browser.open(await request_url()), "ada")
        async with wiki(OIDC_OWNER_EMAILS="grace@example.com"):
            assert (await browser.send(question, {"answer": "allow"})).status_code == 403
        async with wiki():
            answer = await browser.send(question, {"answer": "allow"})
            assert "code" in query_of(answer.headers["location"])


class TestRefused:
    """Who is not an owner, and who has not signed in."""

    @pytest.mark.parametrize("name", ["mallory", "imposter"])
    async def test_an_identity_that_is_not_allowed_is_refused(
        self, wiki: Wiki, browser: Browser, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A stranger, or somebody with the owner's address unverified, gets a page, and can answer nothing."""
        async with wiki():
            page = await browser.open(await request_url())
            ours = browser.visited[1]
            refused = await browser.sign_in(page, name)
            assert refused.status_code == 403
            assert f"(subject {name})" in refused.text
            assert "not an owner" in caplog.text
            assert (await browser.post(ours, {"answer": "allow"})).status_code == 403

    async def test_an_address_is_no_subject(self, wiki: Wiki, browser: Browser) -> None:
        """Where users choose their own `sub`, one that is spelled like the owner's address is refused."""
        async with wiki():
            refused = await browser.sign_in(await browser.open(await request_url()), "ada@example.com")
        assert refused.status_code == 403
        assert "ada@example.com@example.com (subject ada@example.com)" in refused.text

    async def test_a_cancelled_sign_in_can_be_repeated(
        self, wiki: Wiki, browser: Browser, upstream: OpenIdProvider
    ) -> None:
        """Where the provider says no, a page says so, and leads back to its sign-in form."""
        async with wiki():
            form = await browser.open(await request_url())
            cancel = re.search(r'href="([^"]*/abort)"', form.text)
            assert cancel is not None, form.text
            page = await browser.open(cancel[1])
            assert page.status_code == 400
            assert "You are not signed in" in page.text
            again = re.search(r'href="([^"]*)">Sign in again', page.text)
            assert again is not None, page.text
            form = await browser.open(again[1])
            assert is_sign_in_form(form, upstream)
            assert is_question(await browser.sign_in(form, "ada"))


class TestForged:
    """What an attacker tries."""

    async def test_a_request_of_another_browser_leads_nowhere(
        self, wiki: Wiki, browser: Browser, other_browser: Browser, upstream: OpenIdProvider
    ) -> None:
        """Neither the link to our page, nor the one to the provider's form, lets the owner sign in for an attacker."""
        async with wiki():
            assert is_sign_in_form(await other_browser.open(await request_url()), upstream)
            ours, theirs = other_browser.visited[1:3]
            assert (await browser.open(ours)).status_code == 410
            assert not any(url.startswith(upstream.issuer) for url in browser.visited)

            fixated = await browser.sign_in(await browser.open(theirs), "ada")
            assert fixated.status_code == 400
            assert str(fixated.url).startswith(CALLBACK_URL)
            assert not is_question(await other_browser.open(ours))

    async def test_a_stolen_callback_is_good_in_the_browser_that_began_it_alone(
        self, wiki: Wiki, browser: Browser, other_browser: Browser
    ) -> None:
        """Somebody who gets hold of the callback's URL gets a page; the owner's sign-in is not harmed."""
        async with wiki():
            sent = await browser.sign_in(await browser.open(await request_url()), "ada", stop_before=CALLBACK_URL)
            callback = sent.headers["location"]
            assert (await other_browser.open(callback)).status_code == 400
            await other_browser.open(await request_url())  # has a session of its own now
            assert (await other_browser.open(callback)).status_code == 400
            assert is_question(await browser.open(callback))

    async def test_a_callback_is_good_once(self, wiki: Wiki, browser: Browser) -> None:
        """A replay gets a page, also in the same browser, and leaves the sign-in as it is."""
        async with wiki():
            question = await browser.sign_in(await browser.open(await request_url()), "ada")
            callback = next(url for url in browser.visited if url.startswith(CALLBACK_URL))
            assert (await browser.open(callback)).status_code == 400
            assert "code" in query_of((await browser.send(question, {"answer": "allow"})).headers["location"])

    @pytest.mark.parametrize(
        ("parameter", "status"), [("state", 400), ("nonce", 502), ("code_challenge", 400)], ids=lambda value: str(value)
    )
    async def test_a_sign_in_that_was_tampered_with_lets_nobody_in(
        self, wiki: Wiki, browser: Browser, upstream: OpenIdProvider, parameter: str, status: int
    ) -> None:
        """An ID token for another nonce, a code for another verifier, or another state is refused."""
        async with wiki():
            sent = await browser.open(await request_url(), stop_before=upstream.issuer)
            url = urlsplit(sent.headers["location"])
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            assert query["code_challenge_method"] == "S256"
            query[parameter] = pkce()[1]
            refused = await browser.sign_in(await browser.open(url._replace(query=urlencode(query)).geturl()), "ada")
            assert str(refused.url).startswith(CALLBACK_URL)
            assert refused.status_code == status
            assert (await browser.post(browser.visited[1], {"answer": "allow"})).status_code == 403

    @pytest.mark.parametrize("csrf", [None, "", "guessed", "gü"])
    async def test_only_the_form_of_our_page_is_an_answer(
        self, wiki: Wiki, browser: Browser, other_browser: Browser, csrf: str | None
    ) -> None:
        """A POST without the form's token, one from another browser, or a GET approves nothing."""
        async with wiki():
            question = await browser.sign_in(await browser.open(await request_url()), "ada")
            page = str(question.url)
            forged = {"answer": "allow"} if csrf is None else {"answer": "allow", "csrf": csrf}
            assert (await browser.post(page, forged)).status_code == 403
            assert (await other_browser.send(question, {"answer": "allow"})).status_code == 410
            assert is_question(
                await browser.open(f"{page}&{urlencode({'answer': 'allow', **hidden_fields(question)})}")
            )
            assert "code" in query_of((await browser.send(question, {"answer": "allow"})).headers["location"])

    async def test_a_sign_in_is_good_for_one_request(
        self, wiki: Wiki, browser: Browser, upstream: OpenIdProvider
    ) -> None:
        """Whoever signed in for one client has not signed in for another, not even in the same browser."""
        async with wiki():
            question = await browser.sign_in(await browser.open(await request_url()), "ada")
            second = await browser.open(await request_url(), stop_before=upstream.issuer)
            assert second.headers["location"].startswith(upstream.issuer)
            answered = await browser.post(str(second.url), {"answer": "allow", **hidden_fields(question)})
            assert answered.status_code == 403

    async def test_a_session_that_was_made_up_is_none(self, wiki: Wiki, browser: Browser) -> None:
        """A session cookie that our server did not sign is ignored."""
        async with wiki():
            await browser.open(await request_url())
            browser.set_cookie("sign-in", "eyJzaWduZWRfaW4iOnt9fQ==.x.y")
            assert (await browser.post(browser.visited[1], {"answer": "allow"})).status_code == 403


class TestOutage:
    """What the owner sees while the provider is away."""

    async def test_an_outage_is_a_page_and_ends_by_itself(
        self, wiki: Wiki, browser: Browser, upstream: OpenIdProvider, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where the provider is away, before the sign-in or after it, there is a page; later, all goes on."""
        async with wiki():
            upstream.stop()
            try:
                page = await browser.open(await request_url())
                assert page.status_code == 502
                assert "nobody can sign in: ConnectError" in caplog.text
            finally:
                upstream.start()
            form = await browser.open(str(page.url))
            assert is_sign_in_form(form, upstream)

            sent = await browser.sign_in(form, "ada", stop_before=CALLBACK_URL)
            upstream.stop()
            try:
                late = await browser.open(sent.headers["location"])
            finally:
                upstream.start()
            assert late.status_code == 502
            again = re.search(r'href="([^"]*)">Sign in again', late.text)
            assert again is not None
            assert is_question(await browser.sign_in(await browser.open(again[1]), "ada"))

    async def test_another_spelling_of_the_issuer_is_told_to_the_operator(
        self, wiki: Wiki, browser: Browser, upstream: OpenIdProvider, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An OIDC_ISSUER that the provider does not call itself lets nobody in, and the log says how it does."""
        async with wiki(OIDC_ISSUER=f"{upstream.issuer}/"):
            page = await browser.open(await request_url())
        assert page.status_code == 502
        assert f"OIDC_ISSUER is '{upstream.issuer}/', which calls itself '{upstream.issuer}'" in caplog.text


GOOD = {
    "OIDC_ISSUER": "https://accounts.google.com",
    "OIDC_CLIENT_ID": "wiki",
    "OIDC_CLIENT_SECRET": "the secret",
    "OIDC_OWNER_EMAILS": "ada@example.com",
}


class TestSettings:
    """What the environment says."""

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"OIDC_ISSUER": ""}, "OIDC_ISSUER is not set"),
            ({"OIDC_CLIENT_ID": ""}, "OIDC_CLIENT_ID is not set"),
            ({"OIDC_CLIENT_SECRET": ""}, "OIDC_CLIENT_SECRET is not set"),
            ({"OIDC_OWNER_EMAILS": " , "}, "set OIDC_OWNER_SUBJECTS or OIDC_OWNER_EMAILS"),
            ({"OIDC_ISSUER": "accounts.google.com"}, "OIDC_ISSUER is 'accounts.google.com'; expected"),
            ({"OIDC_ISSUER": "http://accounts.google.com"}, "OIDC_ISSUER is 'http://accounts.google.com'; expected"),
            ({"OIDC_ISSUER": "http://127.0.0.1.evil.example"}, "OIDC_ISSUER is"),
        ],
    )
    def test_a_bad_setting_is_an_error_at_construction(self, settings: dict[str, str], complaint: str) -> None:
        """What is missing or cannot be used is named, and no secret is quoted."""
        with pytest.raises(ConfigurationError, match=complaint) as caught:
            OidcApproval({**GOOD, **settings})
        assert "the secret" not in str(caught.value)

    def test_the_example_does_not_start_without_its_settings(self, tmp_path: Path) -> None:
        """What is missing is one line and an exit code."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OIDC_", "MCP_"))}
        done = subprocess.run(
            [sys.executable, str(EXAMPLE)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr == "cannot start: OIDC_ISSUER is not set; the top of oidc_approval.py explains it\n"

    def test_a_public_server_keeps_its_session_to_https(self) -> None:
        """On https, the session cookie is Secure and of this host alone."""
        provider = SQLAlchemyOAuthProvider(
            ":memory:", base_url="https://wiki.example.com", approval=(approval := OidcApproval(GOOD))
        )
        app = next(route.app for route in approval.routes(provider) if route.path == PAGE)
        assert app.session_cookie == "__Host-sign-in"  # type: ignore[attr-defined]  # a SessionMiddleware
        assert app.security_flags == "httponly; samesite=lax; secure"  # type: ignore[attr-defined]
