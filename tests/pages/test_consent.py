"""The consent page over HTTP: its content, and the answers that it accepts and refuses."""

from urllib.parse import urlencode

import pytest

from oauth_store.browser import request_cookie
from tests.clocks import turned
from tests.sites import PASSWORD, Browser, Site, action_of, csrf_of, handle_of, site
from tests.steps import REDIRECT_URI, query_of

SLACK_SECONDS = 10
"""How long a busy machine may take to open a page. test_provider.py tests the time to the second."""


class TestAnswer:
    """Allow, Deny, and everything that is neither."""

    async def test_allow(self, database_url: str, browser: Browser) -> None:
        """The right password takes the browser to the client, with a code, state and issuer, on every database."""
        async with site(database_url) as wiki:
            url = await wiki.authorize_url()
            answer = await browser.allow(await browser.open(url))
            assert answer.status_code == 303
            assert answer.headers["location"].startswith(f"{REDIRECT_URI}?")
            sent = query_of(answer.headers["location"])
            assert (sent["state"], sent["iss"]) == ("the-state", f"{wiki.url}/")
            token = await wiki.redeem(url, answer.headers["location"])
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.subject == "owner"

    async def test_deny(self, wiki: Site, browser: Browser) -> None:
        """Deny needs no password, is reported to the client, and is final."""
        page = await browser.open(await wiki.authorize_url())
        answer = await browser.submit(page, {"answer": "deny"})
        sent = query_of(answer.headers["location"])
        assert (sent["error"], sent["state"], sent["iss"]) == ("access_denied", "the-state", f"{wiki.url}/")
        assert (await browser.allow(page)).status_code == 410

    async def test_deny_after_allow(self, wiki: Site, browser: Browser) -> None:
        """The owner can go back and deny while the code is not used yet."""
        url = await wiki.authorize_url()
        page = await browser.open(url)
        allowed = await browser.allow(page)
        await browser.submit(page, {"answer": "deny"})
        client = await wiki.provider.get_client(query_of(url)["client_id"])
        assert client is not None
        code = query_of(allowed.headers["location"])["code"]
        assert await wiki.provider.load_authorization_code(client, code) is None

    async def test_allow_again_replaces_the_code(self, wiki: Site, browser: Browser) -> None:
        """A second Allow gives a second code, and the first becomes unknown."""
        url = await wiki.authorize_url()
        page = await browser.open(url)
        first, second = [query_of((await browser.allow(page)).headers["location"])["code"] for _ in range(2)]
        client = await wiki.provider.get_client(query_of(url)["client_id"])
        assert client is not None
        assert await wiki.provider.load_authorization_code(client, first) is None
        assert await wiki.provider.load_authorization_code(client, second) is not None

    async def test_a_used_request_is_over(self, wiki: Site, browser: Browser) -> None:
        """After its code was exchanged, a request gives no other code and shows no form."""
        url = await wiki.authorize_url()
        page = await browser.open(url)
        await wiki.redeem(url, (await browser.allow(page)).headers["location"])
        assert (await browser.allow(page)).status_code == 410
        assert (await browser.open(str(page.url))).status_code == 410

    async def test_an_expired_request_is_over(self, wiki: Site, browser: Browser) -> None:
        """After ten minutes, the right password is too late."""
        page = await browser.open(await wiki.authorize_url())
        with turned(600 - SLACK_SECONDS):
            assert (await browser.open(str(page.url))).status_code == 200
        with turned(601):
            assert (await browser.allow(page)).status_code == 410
            assert (await browser.submit(page, {"answer": "deny"})).status_code == 410

    async def test_neither(self, wiki: Site, browser: Browser) -> None:
        """A form without an answer, or with an unknown one, asks again and does not check the password."""
        page = await browser.open(await wiki.authorize_url())
        for fields in ({}, {"answer": "Allow"}, {"answer": "yes"}):
            answer = await browser.submit(page, {"password": PASSWORD, **fields})
            assert (answer.status_code, "Choose Allow or Deny." in answer.text) == (400, True)

    async def test_only_a_form_answers(self, wiki: Site, browser: Browser) -> None:
        """A GET shows the page and allows nothing, whatever its parameters; other methods are refused."""
        page = await browser.open(await wiki.authorize_url())
        fields = {"answer": "allow", "password": PASSWORD, "csrf": csrf_of(page)}
        link = f"{page.url}&{urlencode(fields)}"
        assert (await browser.http.get(link)).status_code == 200
        assert (await browser.http.head(link)).status_code == 200
        for method in ("PUT", "PATCH", "DELETE"):
            assert (await browser.http.request(method, link, data=fields)).status_code == 405
        assert (await browser.open(str(page.url))).status_code == 200

    async def test_nothing_can_be_changed_on_the_way(self, wiki: Site, browser: Browser) -> None:
        """Fields and parameters with another client, address or scope do not change the request."""
        url = await wiki.authorize_url(asks="read")
        page = await browser.open(url)
        other = {"redirect_uri": "https://evil.example/", "scope": "write", "state": "x", "client_id": "evil"}
        sent = {"csrf": csrf_of(page), "answer": "allow", "password": PASSWORD, **other}
        answer = await browser.http.post(f"{page.url}&{urlencode(other)}", data=sent)
        assert answer.headers["location"].startswith(f"{REDIRECT_URI}?")
        assert query_of(answer.headers["location"])["state"] == "the-state"
        assert (await wiki.redeem(url, answer.headers["location"])).scope == "read"


class TestWhoAnswers:
    """Only the browser that started the request can see and answer it, and only from our page."""

    async def test_another_browser(self, wiki: Site, browser: Browser) -> None:
        """With only the handle, or the cookie of another request, the page can neither be seen nor answered."""
        page = await browser.open(await wiki.authorize_url())
        async with Browser() as other:
            await other.open(await wiki.authorize_url())
            for cookies in ({}, {wiki.provider.cookies._name(request_cookie(handle_of(page))): "browser_guess"}):
                other.http.cookies.update(cookies)
                assert (await other.open(str(page.url))).status_code in (403, 410)
                assert (await other.allow(page)).status_code in (403, 410)
        assert (await browser.open(str(page.url))).status_code == 200

    @pytest.mark.parametrize("handle", ["", "request_unknown", "x" * 5000, "\0", "é"])
    async def test_an_unknown_handle(self, wiki: Site, browser: Browser, handle: str) -> None:
        """An unknown handle gets the same response as one of another browser."""
        assert (await browser.open(f"{wiki.url}/consent?{urlencode({'handle': handle})}")).status_code == 403

    async def test_the_token_of_the_form(self, wiki: Site, browser: Browser) -> None:
        """Without the form's token, with a wrong one, or that of another request, nothing is allowed or denied."""
        page = await browser.open(await wiki.authorize_url())
        another = await browser.open(await wiki.authorize_url())
        for token in ("", "0" * 64, csrf_of(another), "é", "a" * 10_000):
            for fields in ({"answer": "allow", "password": PASSWORD}, {"answer": "deny"}):
                assert (await browser.submit(page, {**fields, "csrf": token})).status_code == 403
        left_out = await browser.http.post(action_of(page), data={"answer": "allow", "password": PASSWORD})
        assert left_out.status_code == 403
        assert (await browser.allow(page)).status_code == 303

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "http://127.0.0.1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    async def test_a_form_of_another_page(self, wiki: Site, browser: Browser, headers: dict[str, str]) -> None:
        """If the browser says that another page sent the form, even the right token is refused."""
        page = await browser.open(await wiki.authorize_url())
        fields = {"answer": "allow", "password": PASSWORD}
        assert (await browser.submit(page, fields, **headers)).status_code == 403

    async def test_what_browsers_say_of_our_own_forms(self, wiki: Site, browser: Browser) -> None:
        """No Origin, "null" (from Referrer-Policy: no-referrer) and our own origin are accepted."""
        for headers in ({}, {"Origin": "null", "Sec-Fetch-Site": "same-origin"}, {"Origin": wiki.url}):
            page = await browser.open(await wiki.authorize_url())
            fields = {"answer": "allow", "password": PASSWORD}
            assert (await browser.submit(page, fields, **headers)).status_code == 303

    async def test_bodies_that_no_form_of_ours_sends(self, wiki: Site, browser: Browser) -> None:
        """A body that is too large, or has another encoding or an odd charset, is refused, and nothing breaks."""
        page = await browser.open(await wiki.authorize_url())
        url = action_of(page)
        assert (await browser.http.post(url, data={"password": "x" * 100_000})).status_code == 413
        fields = {"csrf": (None, csrf_of(page)), "answer": (None, "allow"), "password": (None, PASSWORD)}
        assert (await browser.http.post(url, files=fields)).status_code == 403
        for content_type, body in (
            ("application/json", b'{"answer": "allow"}'),
            ("text/plain", b"answer=allow"),
            (
                "multipart/form-data; boundary=x; charset=utf-7",
                b'--x\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n+2AA-\r\n--x--\r\n',
            ),
            ("application/x-www-form-urlencoded; charset=utf-7", b"csrf=+2AA-"),
            ("application/x-www-form-urlencoded", b"\xff\xfe=%ff&csrf=%ed%a0%80&password=%00"),
        ):
            answer = await browser.http.post(url, content=body, headers={"Content-Type": content_type})
            assert answer.status_code == 403, content_type
        assert (await browser.allow(page)).status_code == 303
