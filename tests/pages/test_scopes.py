"""What the owner lets an app do: the checkboxes of the consent page and of the page of connected apps."""

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fastmcp import Client, FastMCP
from fastmcp.server.auth import require_scopes
from fastmcp.server.dependencies import get_http_headers
from markupsafe import escape
from mcp.shared.auth import OAuthToken

from oauth_store.credentials import is_personal_token
from oauth_store.flows.clients import OwnersClient
from oauth_store.pages import choices
from tests.commands import run_json
from tests.scopes import SCOPES, wiki_on
from tests.sites import PASSWORD, USERS, Browser, Site, action_of, boxes_of, csrf_of, site
from tests.steps import authorization_request, new_client, pkce, registration_options


async def granted(wiki: Site, browser: Browser, url: str, **fields: Any) -> str | None:
    """The scopes in the token response after Allow."""
    answer = await browser.allow(await browser.open(url), **fields)
    return (await wiki.redeem(url, answer.headers["location"])).scope


async def save(browser: Browser, page: Any, ticked: list[str], grant: str | None = None) -> Any:
    """Tick these boxes of the only app, and press Save."""
    grant = grant or page.text.partition('name="save" value="')[2].partition('"')[0]
    return await browser.submit(page, {"save": grant, "scope": ticked})


async def scopes_of(wiki: Site, token: OAuthToken) -> list[str]:
    """What the server lets the bearer of an access token do."""
    verified = await wiki.provider.verify_token(token.access_token)
    assert verified is not None
    return verified.scopes


class TestConsent:
    """The page on which the owner lets an app in."""

    async def test_each_scope_has_a_box(self, database_url: str, browser: Browser) -> None:
        """What the app asked for is ticked, the rest is offered, and each box names the tools that it opens."""
        words = {"write": "Edit your pages"}
        async with wiki_on(database_url, approval={"scope_descriptions": words}) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="write read"))
            assert boxes_of(page) == {"write": "checked", "read": "checked", "admin": ""}
            assert "Edit your pages" in page.text
            assert "Tools: <bdi>edit_page</bdi></span>" in page.text
            assert "Tools that only read: <bdi>read_page</bdi></span>" in page.text
            assert "Tools that can delete or overwrite: <bdi>inner_drop_all</bdi></span>" in page.text
            assert "Allow more than it asked for" in page.text
            assert "whoami" not in page.text  # no scope opens it

    @pytest.mark.parametrize(
        ("ticked", "expected"),
        [(None, "read write"), (["read"], "read"), (["admin"], "admin"), (["read", "write", "admin"], None)],
    )
    async def test_what_is_ticked_is_granted(
        self, database_url: str, browser: Browser, ticked: list[str] | None, expected: str | None
    ) -> None:
        """No less and no more, whatever was asked for."""
        async with wiki_on(database_url) as wiki:
            url = await wiki.authorize_url(asks="read write")
            fields = {} if ticked is None else {"scope": ticked}
            assert await granted(wiki, browser, url, **fields) == (expected or "read write admin")

    async def test_a_required_scope_cannot_be_unticked(self, tmp_path: Path, browser: Browser) -> None:
        """Its box is ticked and fixed, and a form without it grants it."""
        async with wiki_on(tmp_path / "oauth.db", required_scopes=["read"]) as wiki:
            url = await wiki.authorize_url(asks="write")
            assert boxes_of(await browser.open(url)) == {"write": "checked", "read": "checked disabled", "admin": ""}
            assert await granted(wiki, browser, url, scope=["admin"]) == "read admin"

    @pytest.mark.parametrize(
        ("ticked", "complaint"),
        [
            (["read", "root"], "Choose among these permissions."),
            (["read", "<script>"], "Choose among these permissions."),
            ([], "Choose at least one permission, or Deny."),
        ],
    )
    async def test_what_cannot_be_granted(
        self, tmp_path: Path, browser: Browser, ticked: list[str], complaint: str
    ) -> None:
        """A form that names an unknown scope, or none, is shown again, and the request still waits."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            url = await wiki.authorize_url(asks="read")
            page = await browser.open(url)
            answer = await browser.allow(page, scope=ticked)
            assert (answer.status_code, complaint in answer.text) == (400, True)
            assert "<script>" not in answer.text
            assert (await browser.allow(page)).status_code == 303

    async def test_a_wrong_password_keeps_the_boxes(self, tmp_path: Path, browser: Browser) -> None:
        """What was ticked is ticked on the page that asks again, also what was offered."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            page = await browser.open(await wiki.authorize_url(asks="read write"))
            answer = await browser.allow(page, "a guess", scope=["write", "admin"])
            assert answer.status_code == 403
            assert boxes_of(answer) == {"read": "", "write": "checked", "admin": "checked"}
            assert "<details open>" in answer.text

    @pytest.mark.parametrize(
        "settings",
        [{}, {"required_scopes": ["read"]}, {"required_scopes": ["read"], "client_registration_options": None}],
    )
    async def test_nothing_to_choose(self, tmp_path: Path, browser: Browser, settings: dict[str, Any]) -> None:
        """A server without scopes, or with required ones alone, has the page without boxes."""
        options = {"client_registration_options": registration_options(*settings.get("required_scopes", ()))}
        async with site(tmp_path / "oauth.db", **{**options, **settings}) as wiki:
            url = await wiki.authorize_url(scope=None)
            page = await browser.open(url)
            assert boxes_of(page) == {}
            assert 'name="choices"' not in page.text
            await granted(wiki, browser, url)

    async def test_a_template_of_the_owner_s_own(self, tmp_path: Path, browser: Browser) -> None:
        """One without boxes lists what was asked for, and that is granted."""
        (tmp_path / "consent.html").write_text(
            '<form method="post" action="{{ action }}"><input name="csrf" value="{{ csrf }}">{{ scopes }}</form>'
        )
        async with wiki_on(tmp_path / "oauth.db", approval={"templates": tmp_path}) as wiki:
            assert await granted(wiki, browser, await wiki.authorize_url(asks="read write")) == "read write"

    @pytest.mark.parametrize(("ticked", "expected"), [("", "read write"), ("write", "write")])
    async def test_a_template_with_boxes_of_its_own(
        self, tmp_path: Path, browser: Browser, ticked: str, expected: str
    ) -> None:
        """What such a form names is what is granted, also if it forgot the field that says that it has boxes."""
        (tmp_path / "consent.html").write_text(
            '<form method="post" action="{{ action }}"><input name="csrf" value="{{ csrf }}">'
            '{% for choice in choices %}<input name="scope" value="{{ choice.scope }}">{% endfor %}</form>'
        )
        async with wiki_on(tmp_path / "oauth.db", approval={"templates": tmp_path}) as wiki:
            url = await wiki.authorize_url(asks="read write")
            assert await granted(wiki, browser, url, **({"scope": [ticked]} if ticked else {})) == expected

    async def test_another_request_s_page(self, tmp_path: Path, browser: Browser) -> None:
        """A form of one request that is sent to another one's address grants nothing, nor widens either."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            first, second = await wiki.authorize_url(asks="admin"), await wiki.authorize_url(asks="read")
            of_first, of_second = await browser.open(first), await browser.open(second)
            for page, target in ((of_first, of_second), (of_second, of_first)):
                mixed = {"csrf": csrf_of(page), "answer": "allow", "password": PASSWORD, "choices": "shown"}
                scope = {"scope": ["read", "write", "admin"]}
                answer = await browser.http.post(action_of(target), data={**mixed, **scope})
                assert (answer.status_code, "Nothing was allowed" in answer.text) == (403, True)
            assert await granted(wiki, browser, second) == "read"
            assert await granted(wiki, browser, first) == "admin"

    async def test_another_browser_s_form(self, tmp_path: Path, browser: Browser) -> None:
        """A complete form of a browser that did not start the request grants nothing, with the right password too."""
        async with wiki_on(tmp_path / "oauth.db") as wiki, Browser() as stranger:
            url = await wiki.authorize_url(asks="read")
            page = await browser.open(url)
            assert (await stranger.allow(page, scope=["read", "write", "admin"])).status_code == 403
            assert await granted(wiki, browser, url) == "read"

    @pytest.mark.parametrize("ticked", [["read"], ["write"]])
    async def test_offline_access(self, tmp_path: Path, browser: Browser, ticked: list[str]) -> None:
        """It has no box, cannot be ticked, and is granted to who asked for it; Save keeps it."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            url = await wiki.authorize_url(asks="read offline_access")
            page = await browser.open(url)
            assert boxes_of(page) == {"read": "checked", "write": "", "admin": ""}
            assert (await browser.allow(page, scope=["offline_access"])).status_code == 400
            answer = await browser.allow(page, scope=ticked)
            token = await wiki.redeem(url, answer.headers["location"])
            assert set((token.scope or "").split()) == {*ticked, "offline_access"}
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert "offline_access" not in boxes_of(apps)
            await save(browser, apps, ["admin"])
            assert set(await scopes_of(wiki, token)) == {"admin", "offline_access"}

    async def test_a_server_under_a_path(self, database_url: str, browser: Browser) -> None:
        """Boxes, tools and required scopes are the same, and so is Save."""
        options = {"path": "/family/wiki", "required_scopes": ["read"]}
        async with wiki_on(database_url, **options) as wiki:
            url = await wiki.authorize_url(asks="write")
            page = await browser.open(url)
            assert boxes_of(page) == {"write": "checked", "read": "checked disabled", "admin": ""}
            assert "<bdi>edit_page</bdi>" in page.text
            answer = await browser.allow(page, scope=["write"])
            token = await wiki.redeem(url, answer.headers["location"])
            assert token.scope == "write read"
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert "<bdi>inner_drop_all</bdi>" in apps.text
            assert "from its next call on" in (await save(browser, apps, ["admin"])).text
            assert set(await scopes_of(wiki, token)) == {"read", "admin"}
            async with Client(f"{wiki.url}/mcp", auth=token.access_token) as client:
                tools = {tool.name for tool in await client.list_tools()}
            assert tools == {"whoami", "read_page", "inner_drop_all"}

    async def test_a_hundred_scopes(self, tmp_path: Path, browser: Browser) -> None:
        """All of them can be ticked, granted, and taken away again, but for one."""
        scopes = [f"https://wiki.example/auth/space-{number}.{'x' * 60}" for number in range(100)]
        async with wiki_on(tmp_path / "oauth.db", client_registration_options=registration_options(*scopes)) as wiki:
            url = await wiki.authorize_url(asks=scopes[0], scope=None)
            answer = await browser.allow(await browser.open(url), scope=scopes)
            token = await wiki.redeem(url, answer.headers["location"])
            assert (token.scope or "").split() == scopes
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert list(boxes_of(apps).values()) == ["checked"] * 100
            await save(browser, apps, scopes[99:])
            assert await scopes_of(wiki, token) == scopes[99:]

    @pytest.mark.parametrize("markup", ["<script>alert(1)</script>", "'onclick='alert(1)", "&lt;b&gt;", "{{csrf}}"])
    async def test_a_scope_that_is_markup(self, tmp_path: Path, browser: Browser, markup: str) -> None:
        """It is text on both pages, and the box is of that very scope."""
        async with wiki_on(
            tmp_path / "oauth.db", client_registration_options=registration_options("read", markup)
        ) as wiki:
            url = await wiki.authorize_url(asks="read", scope=None)
            page = await browser.open(url)
            assert boxes_of(page) == {"read": "checked", markup: ""}
            token = await wiki.redeem(url, (await browser.allow(page, scope=[markup])).headers["location"])
            assert token.scope == markup
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert boxes_of(apps) == {markup: "checked", "read": ""}
            for shown in (page, apps):
                assert "<script" not in shown.text
                assert "<bdi>" + str(escape(markup)) + "</bdi>" in shown.text
            await save(browser, apps, ["read"])
            assert await scopes_of(wiki, token) == ["read"]

    async def test_a_tool_that_is_markup(self, tmp_path: Path, browser: Browser) -> None:
        """Its title is text, on one line, with its own direction."""

        def lie(mcp: FastMCP[None]) -> None:
            title = "<img src=x>\n\u202eread only"
            mcp.tool(lambda: 1, name="lie", title=title, auth=require_scopes("write"))

        async with wiki_on(tmp_path / "oauth.db", tools=lie) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="write"))
            assert "Tools: <bdi>&lt;img src=x&gt; read only</bdi>" in page.text

    async def test_the_dangerous_tools_come_first(self, tmp_path: Path, browser: Browser) -> None:
        """However many tools a scope opens, those that can delete are named, not counted."""

        def add(mcp: FastMCP[None]) -> None:
            for number in range(20):
                mcp.tool(lambda: 1, name=f"a{number}", auth=require_scopes("write"), annotations={"readOnlyHint": True})
            mcp.tool(lambda: 1, name="zap", auth=require_scopes("write"), annotations={"destructiveHint": True})

        async with wiki_on(tmp_path / "oauth.db", tools=add) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="write"))
            assert "Tools that can delete or overwrite: <bdi>zap</bdi></span>" in page.text
            assert "and 15 more</span>" in page.text

    async def test_pages_share_a_list_of_the_tools(
        self, tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Anyone can load a page: fifty at once have the tools listed as often as one; later, a new tool is shown."""
        listed = 0

        class Counting(FastMCP[None]):
            async def list_tools(self, **options: Any) -> Any:
                nonlocal listed
                listed += 1
                return await super().list_tools(**options)

        counting = Counting("counting")
        counting.tool(lambda: 1, name="first", auth=require_scopes("write"))
        monkeypatch.setattr(choices, "TOOLS_KEPT_SECONDS", 0)
        async with wiki_on(tmp_path / "oauth.db", tools=lambda mcp: mcp.mount(counting)) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="read"))
            assert "<bdi>first</bdi>" in page.text
            by_one, listed = listed, 0
            counting.tool(lambda: 1, name="second", auth=require_scopes("write"))
            monkeypatch.setattr(choices, "TOOLS_KEPT_SECONDS", 60)
            pages = await asyncio.gather(*(browser.http.get(str(page.url)) for _ in range(50)))
            assert all("<bdi>first</bdi>, <bdi>second</bdi>" in page.text for page in pages)
            assert listed == by_one > 0

    async def test_forty_scopes(self, tmp_path: Path, browser: Browser) -> None:
        """They fold: eight are in sight, the others one click away, each once."""
        scopes = [f"scope:{number}" for number in range(40)]
        async with wiki_on(tmp_path / "oauth.db", client_registration_options=registration_options(*scopes)) as wiki:
            page = await browser.open(await wiki.authorize_url(asks=" ".join(scopes[:20]), scope=None))
            assert list(boxes_of(page)) == scopes
            assert "and 12 more" in page.text

    async def test_a_server_whose_tools_cannot_be_listed(
        self,
        tmp_path: Path,
        browser: Browser,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The page works without them, and the log says why."""

        class Slow(FastMCP[None]):
            async def list_tools(self, **_: Any) -> Any:
                await asyncio.sleep(60)

        monkeypatch.setattr(choices, "TOOLS_SECONDS", 0.1)
        async with wiki_on(tmp_path / "oauth.db", tools=lambda mcp: mcp.mount(Slow("slow"))) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="read"))
            assert list(boxes_of(page)) == ["read", "write", "admin"]
        assert "which tools a scope opens" in caplog.text

    async def test_a_server_on_another_machine(self, tmp_path: Path, browser: Browser) -> None:
        """It never gets the headers of the owner's browser, such as the password of a reverse proxy."""
        seen: list[dict[str, str]] = []

        class Elsewhere(FastMCP[None]):
            async def list_tools(self, **_: Any) -> Any:
                seen.append(get_http_headers(include={"authorization"}))  # as FastMCP's proxies do
                return []

        async with wiki_on(tmp_path / "oauth.db", tools=lambda mcp: mcp.mount(Elsewhere("elsewhere"))) as wiki:
            browser.http.headers["Authorization"] = "Basic b3duZXI6c2VjcmV0"
            await browser.open(await wiki.authorize_url(asks="read"))
        assert seen
        assert not any(seen)

    async def test_many_views_ask_the_server_once(self, tmp_path: Path, browser: Browser) -> None:
        """Anyone can open a consent page, and a list of many tools takes the server a while."""
        asked = 0

        class Counting(FastMCP[None]):
            async def list_tools(self, **_: Any) -> Any:
                nonlocal asked
                asked += 1
                return []

        async with wiki_on(tmp_path / "oauth.db", tools=lambda mcp: mcp.mount(Counting("counting"))) as wiki:
            page = await browser.open(await wiki.authorize_url(asks="read"))
            before = asked
            await asyncio.gather(*(browser.open(str(page.url)) for _ in range(5)))
            assert asked == before > 0


class TestApps:
    """The page on which the owner changes it afterwards."""

    async def test_an_old_page_gives_nothing_back(self, database_url: str, browser: Browser) -> None:
        """What was taken away after a page was shown stays away when that page is saved."""
        async with wiki_on(database_url) as wiki:
            token = await wiki.connect(asks="read write")
            page = await browser.sign_in(f"{wiki.url}/apps")
            [shown] = re.findall('name="had" value="([^"]*)"', page.text)
            assert shown == "read write"
            await save(browser, page, ["read"])
            grant = page.text.partition('name="save" value="')[2].partition('"')[0]
            chosen = {"save": grant, "scope": ["read", "write", "admin"]}
            answer = await browser.submit(page, {**chosen, "had": shown})
            assert "Nothing was changed: this page was out of date;" in answer.text
            assert boxes_of(answer) == {"read": "checked", "write": "", "admin": ""}
            assert await scopes_of(wiki, token) == ["read"]
            for _ in range(2):  # a second click, or a reload
                assert "can do what you chose" in (await browser.submit(answer, {**chosen, "had": "read"})).text
            assert await scopes_of(wiki, token) == ["read", "write", "admin"]

    async def test_a_client_that_stays_connected_sees_a_tool_come_and_go(
        self, database_url: str, browser: Browser
    ) -> None:
        """From the next call on, without a refresh, and in the rows of a refresh too."""
        async with wiki_on(database_url) as wiki:
            token = await wiki.connect(asks="read", client_name="Claude")
            page = await browser.sign_in(f"{wiki.url}/apps")
            assert boxes_of(page) == {"read": "checked", "write": "", "admin": ""}
            async with Client(f"{wiki.url}/mcp", auth=token.access_token) as client:
                for ticked, expected in (
                    (["read", "write"], {"whoami", "read_page", "edit_page"}),
                    (["read"], {"whoami", "read_page"}),
                    (["admin"], {"whoami", "inner_drop_all"}),
                ):
                    assert await client.list_tools()
                    answer = await save(browser, page, ticked)
                    assert "can do what you chose, from its next call on." in answer.text
                    assert {tool.name for tool in await client.list_tools()} == expected
                    assert [scope for scope, box in boxes_of(answer).items() if box] == ticked

    @pytest.mark.parametrize("ticked", [[], ["read", "root"], ["root"]])
    async def test_what_cannot_be_saved(self, tmp_path: Path, browser: Browser, ticked: list[str]) -> None:
        """Nothing, or a scope that the page did not offer, changes nothing."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            token = await wiki.connect(asks="read write")
            answer = await save(browser, await browser.sign_in(f"{wiki.url}/apps"), ticked)
            assert "Nothing was changed" in answer.text
            assert await scopes_of(wiki, token) == ["read", "write"]

    async def test_a_required_scope_cannot_be_taken_away(self, tmp_path: Path, browser: Browser) -> None:
        """Its box is fixed; a form that leaves all boxes out keeps it and takes the others."""
        async with wiki_on(tmp_path / "oauth.db", required_scopes=["read"]) as wiki:
            token = await wiki.connect(asks="read write")
            apps = await browser.sign_in(f"{wiki.url}/apps")
            assert boxes_of(apps) == {"read": "checked disabled", "write": "checked", "admin": ""}
            await save(browser, apps, [])
            assert await scopes_of(wiki, token) == ["read"]

    async def test_a_scope_that_the_server_has_dropped(self, tmp_path: Path, browser: Browser) -> None:
        """Who has it keeps it until the owner unticks it, and can then not get it back; nobody else is offered it."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            token = await wiki.connect(asks="read admin")
            waiting = await wiki.authorize_url(asks="read admin")
            page = await browser.open(waiting)
        port = int(wiki.url.rpartition(":")[2])
        fewer = registration_options("read", "write")
        async with wiki_on(tmp_path / "oauth.db", port=port, client_registration_options=fewer) as later:
            later.verifiers = wiki.verifiers
            apps = await browser.sign_in(f"{later.url}/apps")
            assert boxes_of(apps) == {"read": "checked", "admin": "checked", "write": ""}
            apps = await save(browser, apps, ["write", "admin"])
            assert set(await scopes_of(later, token)) == {"write", "admin"}
            apps = await save(browser, apps, ["write"])
            assert boxes_of(apps) == {"write": "checked", "read": ""}
            assert "Nothing was changed" in (await save(browser, apps, ["write", "admin"])).text
            assert await scopes_of(later, token) == ["write"]
            assert boxes_of(await browser.open(await later.authorize_url(scope=None))) == {
                "read": "checked",
                "write": "checked",
            }
            answer = await browser.allow(page, scope=["read"])
            assert (await later.redeem(waiting, answer.headers["location"])).scope == "read"

    async def test_a_template_of_the_owner_s_own(self, tmp_path: Path, browser: Browser) -> None:
        """A page of apps without boxes revokes, and changes no scope."""
        (tmp_path / "apps.html").write_text(
            '{% for app in apps %}<form method="post" action="{{ action }}"><input name="csrf" value="{{ csrf }}">'
            '{{ app.scopes|join(",") }}<button name="revoke" value="{{ app.grant_id }}"></button></form>{% endfor %}'
        )
        async with wiki_on(tmp_path / "oauth.db", approval={"templates": tmp_path}) as wiki:
            token = await wiki.connect(asks="read write")
            page = await browser.sign_in(f"{wiki.url}/apps")
            assert "read,write" in page.text
            await browser.submit(page, {"scope": ["admin"]})
            assert await scopes_of(wiki, token) == ["read", "write"]
            grant = page.text.partition('name="revoke" value="')[2].partition('"')[0]
            await browser.submit(page, {"revoke": grant, "scope": ["admin"]})
            assert await wiki.provider.verify_token(token.access_token) is None

    async def test_a_page_that_is_old(self, tmp_path: Path, browser: Browser) -> None:
        """Save of a page that was opened before another change sets what it shows, and no scope between."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            token = await wiki.connect(asks="read write")
            old = await browser.sign_in(f"{wiki.url}/apps")
            await save(browser, old, ["admin"])
            await save(browser, old, ["read"])
            assert await scopes_of(wiki, token) == ["read"]

    async def test_a_grant_of_another_user(self, tmp_path: Path) -> None:
        """The page of one user changes nothing of another's, nor of a grant that has ended or never was."""
        async with (
            wiki_on(tmp_path / "oauth.db", approval={"users": USERS}) as wiki,
            Browser() as ada,
            Browser() as bob,
        ):
            token = await wiki.connect(subject="ada", asks="read write")
            await wiki.connect(subject="bob", asks="read write")
            of_ada = await ada.sign_in(f"{wiki.url}/apps", "ada's password", username="ada")
            of_bob = await bob.sign_in(f"{wiki.url}/apps", "bob's password", username="bob")
            grant = of_ada.text.partition('name="save" value="')[2].partition('"')[0]
            for named in (grant, "00" * 16, "no hex", ""):
                answer = await save(bob, of_bob, ["read"], named or "-")
                assert "It was already revoked." in answer.text
            assert await scopes_of(wiki, token) == ["read", "write"]

    async def test_a_form_of_another_page(self, tmp_path: Path, browser: Browser) -> None:
        """Without the token of the page, and from another site, nothing changes."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            token = await wiki.connect(asks="read write")
            page = await browser.sign_in(f"{wiki.url}/apps")
            grant = page.text.partition('name="save" value="')[2].partition('"')[0]
            for fields, headers in (
                ({"csrf": "guessed"}, {}),
                ({}, {"Origin": "https://evil.example"}),
                ({}, {"Sec-Fetch-Site": "cross-site"}),
            ):
                answer = await browser.submit(page, {"save": grant, "scope": ["read"], **fields}, **headers)
                assert answer.status_code == 403
            assert await scopes_of(wiki, token) == ["read", "write"]

    async def test_a_client_that_was_added_by_hand(self, tmp_path: Path, browser: Browser) -> None:
        """Both pages offer what its owner named for it, and no more."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            await wiki.provider.register_client(
                OwnersClient.model_validate(new_client(client_id="by-hand").model_dump())
            )
            verifier, challenge = pkce()
            wiki.verifiers["by-hand"] = verifier
            request = authorization_request("by-hand", code_challenge=challenge, scope="read")
            url = f"{wiki.url}/authorize?{urlencode(request)}"
            page = await browser.open(url)
            assert boxes_of(page) == {"read": "checked", "write": ""}
            assert (await browser.allow(page, scope=["read", "admin"])).status_code == 400
            await granted(wiki, browser, url)
            apps = await browser.sign_in(f"{wiki.url}/apps")
            of_app = apps.text.partition('<ul class="apps">')[2].partition("</ul>")[0]  # a personal token may have all
            assert [scope for scope in SCOPES if f'value="{scope}"' in of_app] == ["read", "write"]
            assert "Nothing was changed" in (await save(browser, apps, ["admin"])).text


class TestTokens:
    """Personal tokens, for programs that cannot sign in."""

    @staticmethod
    def shown(page: Any) -> str:
        """The token that a page shows, or nothing."""
        found = re.search(r'<code class="secret">([^<]*)</code>', page.text)
        return found[1] if found else ""

    async def test_one_is_made_and_shown_once(self, database_url: str, browser: Browser) -> None:
        """The page shows it once; it does what was ticked, is in the list, and ends with Revoke."""
        async with wiki_on(database_url, approval={"apps_path": "/apps"}) as wiki:
            page = await browser.sign_in(f"{wiki.url}/apps")
            fields: dict[str, Any] = {"name": " n8n ", "scope": ["read", "write"], "expires": "never"}
            page = await browser.create_token(page, **fields)
            text = self.shown(page)
            assert is_personal_token(text)
            assert page.headers["cache-control"] == "no-store"
            assert '<bdi class="name">n8n</bdi> can use this server with this token.' in page.text
            again = await browser.open(f"{wiki.url}/apps")
            assert text not in again.text
            assert ("a personal token" in again.text, "<dt>Expires</dt><dd>never</dd>" in again.text) == (True, True)
            assert "<dt>Last used</dt><dd>never</dd>" in again.text
            async with Client(f"{wiki.url}/mcp", auth=text) as client:
                assert {tool.name for tool in await client.list_tools()} == {"whoami", "read_page", "edit_page"}
            token = await wiki.provider.verify_token(text)
            assert token is not None
            assert (token.subject, token.scopes) == ("owner", ["read", "write"])
            grant = again.text.partition('name="save" value="')[2].partition('"')[0]
            await browser.submit(again, {"revoke": grant})
            assert await wiki.provider.verify_token(text) is None

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"name": ""}, "the token&#39;s name is empty or longer than 100 characters"),
            ({"name": "x" * 101}, "the token&#39;s name is empty"),
            ({"name": "n8n", "expires": "soon"}, "the expiry is &#39;soon&#39;"),
            ({"name": "n8n", "scope": []}, "choose at least one permission"),
            ({"name": "n8n", "scope": ["read", "root"]}, "choose at least one permission"),
        ],
    )
    async def test_what_cannot_be_made(
        self, tmp_path: Path, browser: Browser, fields: dict[str, Any], complaint: str
    ) -> None:
        """The page says why, shows no token, and nothing is stored."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            page = await browser.sign_in(f"{wiki.url}/apps")
            page = await browser.create_token(page, **{"scope": ["read"], "expires": "30d", **fields})
            assert "Nothing was changed" in page.text
            assert complaint in page.text
            assert self.shown(page) == ""
            assert "No app can use" in page.text

    @pytest.mark.parametrize(
        ("required", "words"),
        [
            (["read"], "nothing: it lacks a permission that this server requires of every app"),
            ([], "use what needs no permission"),
        ],
    )
    async def test_one_without_scopes(self, tmp_path: Path, browser: Browser, required: list[str], words: str) -> None:
        """The page does not claim that such a token, which the command line can make, may use everything."""
        async with wiki_on(tmp_path / "oauth.db", required_scopes=required) as wiki:
            await browser.sign_in(f"{wiki.url}/apps")
            create = ["token", "create", "cron", "--resource", f"{wiki.url}/mcp"]
            await asyncio.to_thread(run_json, *create, database=str(tmp_path / "oauth.db"))
            page = await browser.open(f"{wiki.url}/apps")
            assert f"<dt>Can</dt><dd><bdi>{words}</bdi></dd>" in page.text

    async def test_a_required_scope_is_in_it(self, tmp_path: Path, browser: Browser) -> None:
        """Without it, the server would refuse the token; on a server without scopes there is nothing to tick."""
        async with wiki_on(tmp_path / "oauth.db", required_scopes=["read"]) as wiki:
            page = await browser.sign_in(f"{wiki.url}/apps")
            page = await browser.create_token(page, name="n8n", scope=["write"], expires="30d")
            token = await wiki.provider.verify_token(self.shown(page))
            assert token is not None
            assert token.scopes == ["read", "write"]
        async with site(tmp_path / "none.db") as wiki:
            page = await browser.sign_in(f"{wiki.url}/apps")
            page = await browser.create_token(page, name="n8n", expires="1y")
            assert await wiki.provider.verify_token(self.shown(page)) is not None

    async def test_a_user_s_own(self, tmp_path: Path) -> None:
        """A token acts for the user who made it, whom another user's page does not show."""
        users = {"users": USERS}
        async with wiki_on(tmp_path / "oauth.db", approval=users) as wiki, Browser() as ada, Browser() as bob:
            of_ada = await ada.sign_in(f"{wiki.url}/apps", "ada's password", username="ada")
            of_bob = await bob.sign_in(f"{wiki.url}/apps", "bob's password", username="bob")
            form: dict[str, Any] = {"name": "n8n", "scope": ["read"], "expires": "30d"}
            of_ada = await ada.create_token(of_ada, "ada's password", **form)
            of_bob = await bob.create_token(of_bob, "bob's password", **form)
            for page, user in ((of_ada, "ada"), (of_bob, "bob")):
                token = await wiki.provider.verify_token(self.shown(page))
                assert token is not None
                assert token.subject == user
                assert page.text.count('class="app"') == 1

    async def test_a_form_of_another_page(self, tmp_path: Path, browser: Browser) -> None:
        """No page of another site makes a token."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            page = await browser.sign_in(f"{wiki.url}/apps")
            form = {"create": "token", "name": "n8n", "scope": ["read"], "expires": "30d"}
            assert (await browser.submit(page, {**form, "csrf": "guessed"})).status_code == 403
            assert (await browser.submit(page, form, Origin="https://evil.example")).status_code == 403
