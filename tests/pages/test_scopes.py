"""What the owner lets an app do: the checkboxes of the consent page and of the page of connected apps."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fastmcp import Client, FastMCP

from oauth_store.flows.clients import OwnersClient
from oauth_store.pages import choices
from tests.scopes import wiki_on
from tests.sites import USERS, Browser, Site, boxes_of, site
from tests.steps import authorization_request, new_client, pkce, registration_options


async def granted(wiki: Site, browser: Browser, url: str, **fields: Any) -> str | None:
    """The scopes in the token response after Allow."""
    answer = await browser.allow(await browser.open(url), **fields)
    return (await wiki.redeem(url, answer.headers["location"])).scope


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


class TestApps:
    """The page on which the owner changes it afterwards."""

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
                    answer = await self.save(browser, page, ticked)
                    assert "can do what you chose, from its next call on." in answer.text
                    assert {tool.name for tool in await client.list_tools()} == expected
                    assert [scope for scope, box in boxes_of(answer).items() if box] == ticked

    @staticmethod
    async def save(browser: Browser, page: Any, ticked: list[str], grant: str | None = None) -> Any:
        """Tick these boxes of the only app, and press Save."""
        grant = grant or page.text.partition('name="save" value="')[2].partition('"')[0]
        return await browser.submit(page, {"save": grant, "scope": ticked})

    @pytest.mark.parametrize("ticked", [[], ["read", "root"], ["root"]])
    async def test_what_cannot_be_saved(self, tmp_path: Path, browser: Browser, ticked: list[str]) -> None:
        """Nothing, or a scope that the page did not offer, changes nothing."""
        async with wiki_on(tmp_path / "oauth.db") as wiki:
            token = await wiki.connect(asks="read write")
            answer = await self.save(browser, await browser.sign_in(f"{wiki.url}/apps"), ticked)
            assert "Nothing was changed" in answer.text
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.scopes == ["read", "write"]

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
                answer = await self.save(bob, of_bob, ["read"], named or "-")
                assert "It was already revoked." in answer.text
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.scopes == ["read", "write"]

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
            verified = await wiki.provider.verify_token(token.access_token)
            assert verified is not None
            assert verified.scopes == ["read", "write"]

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
            assert boxes_of(apps) == {"read": "checked", "write": ""}
            assert "Nothing was changed" in (await self.save(browser, apps, ["admin"])).text
