"""The pages of a server that issues tokens for others too."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from oauth_store.database.models import ACCESS
from tests.commands import run
from tests.databases import tokens_of
from tests.families import FILES, WIKI
from tests.scopes import SCOPES
from tests.sites import PASSWORD, Browser, Site, site
from tests.steps import query_of, registration_options


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[Site]:
    """A server with a password that issues tokens for two others."""
    options = registration_options(*SCOPES)
    async with site(tmp_path / "oauth.db", resources=[WIKI, FILES], client_registration_options=options) as served:
        yield served


async def asked(auth: Site, resource: str | None, **metadata: Any) -> str:
    """The link of a request for a resource."""
    url = await auth.authorize_url(**metadata)
    return url if resource is None else str(httpx2.URL(url).copy_merge_params({"resource": resource}))


async def connected(auth: Site, resource: str | None, name: str) -> str:
    """Let an app in, and return its access token."""
    url = await asked(auth, resource, client_name=name)
    async with Browser() as browser:
        allowed = await browser.allow(await browser.open(url))
        return (await auth.redeem(url, allowed.headers["location"])).access_token


class TestConsent:
    """The question."""

    async def test_it_names_the_server(self, auth: Site) -> None:
        """The page names the server that the app is going to use, and lists no tools of this one."""
        async with Browser() as browser:
            page = await browser.open(await asked(auth, FILES))
            assert '<bdi class="name">files.example.com</bdi>?' in page.text
            assert "whoami" not in page.text
            own = await browser.open(await asked(auth, None))
            assert "files.example.com" not in own.text
            assert '<bdi class="name">Test client</bdi> to use 127.0.0.1' in own.text


class TestApps:
    """The page of connected apps."""

    async def test_grouped(self, auth: Site) -> None:
        """Apps stand under the server that they use, in the order of the servers."""
        for resource, name in ((FILES, "Files app"), (None, "Own app"), (WIKI, "Wiki app")):
            await connected(auth, resource, name)
        async with Browser() as browser:
            page = (await browser.sign_in(f"{auth.url}/apps")).text
        shown = ("Own app", ">wiki.example.com</h2>", "Wiki app", ">files.example.com</h2>", "Files app")
        places = [page.index(text) for text in shown]
        assert places == sorted(places)

    async def test_two_of_one_name(self, tmp_path: Path) -> None:
        """An app stands once, under its own server, also if another one is called the same."""
        root = "https://wiki.example.com/"
        async with site(tmp_path / "oauth.db", resources=[WIKI, root]) as served, Browser() as browser:
            await connected(served, WIKI, "Wiki app")
            page = (await browser.sign_in(f"{served.url}/apps")).text
            assert page.count(">Wiki app<") == 1
            await connected(served, root, "Root app")
            page = (await browser.open(f"{served.url}/apps")).text
            assert page.count(">wiki.example.com</h2>") == 2
            assert page.index(">Wiki app<") < page.rindex(">wiki.example.com</h2>") < page.index(">Root app<")

    async def test_one_server(self, tmp_path: Path) -> None:
        """With one server there is no group, and nothing to choose for a token."""
        async with site(tmp_path / "oauth.db") as alone, Browser() as browser:
            await alone.connect()
            page = await browser.sign_in(f"{alone.url}/apps")
            assert 'class="server-name"' not in page.text
            assert 'name="resource"' not in page.text

    async def test_each_is_changed_and_revoked(self, auth: Site) -> None:
        """Save, Revoke and Revoke all work for the apps of every server."""
        token = await connected(auth, FILES, "Files app")
        await connected(auth, WIKI, "Wiki app")
        async with Browser() as browser:
            page = await browser.sign_in(f"{auth.url}/apps")
            rows = {row.resource: row for row in await tokens_of(auth.provider)}
            saved = await browser.submit(
                page, {"save": rows[FILES].grant_id.hex(), "scope": ["read"], "had": rows[FILES].scopes}
            )
            assert "can do what you chose" in saved.text
            revoked = await browser.submit(page, {"revoke": rows[FILES].grant_id.hex()})
            assert "no longer has access" in revoked.text
            assert await auth.provider.load_access_token(token) is None
            ended = await browser.submit(page, {"revoke": "all", "password": PASSWORD})
            assert "1 app no longer has access" in ended.text

    async def test_a_token_for_one_server(self, auth: Site) -> None:
        """A new token is for the server that is chosen, and for no other that a form may name."""
        async with Browser() as browser:
            page = await browser.sign_in(f"{auth.url}/apps")
            made = await browser.create_token(page, name="script", expires="30d", scope=["read"], resource=FILES)
            assert "can use files.example.com with this token" in made.text
            bad = await browser.create_token(
                page, name="other", expires="30d", scope=["read"], resource="https://evil.example/mcp"
            )
            assert "issues no tokens for that one" in bad.text
        assert [row.resource for row in await tokens_of(auth.provider) if row.kind == ACCESS] == [FILES]


async def test_another_server_on_the_database(auth: Site, tmp_path: Path) -> None:
    """A server that is not named in `resources` shows none of the apps, as before."""
    await connected(auth, FILES, "Files app")
    async with site(tmp_path / "oauth.db") as stranger, Browser() as browser:
        assert "Files app" not in (await browser.sign_in(f"{stranger.url}/apps")).text
        assert query_of(await asked(auth, FILES))["resource"] == FILES


async def test_the_command_groups_too(auth: Site, tmp_path: Path) -> None:
    """`oauth-store grants` has a table for each server."""
    database = str(tmp_path / "oauth.db")
    await connected(auth, FILES, "Files app")
    assert FILES not in run("grants", database=database).stdout
    await connected(auth, WIKI, "Wiki app")
    shown = run("grants", database=database).stdout
    first, second = sorted(((WIKI, "Wiki app"), (FILES, "Files app")), key=lambda named: shown.index(named[0]))
    assert shown.index(first[0]) < shown.index(first[1]) < shown.index(second[0]) < shown.index(second[1])


async def test_tokens_of_two_servers(auth: Site, tmp_path: Path) -> None:
    """The command spells a server as the provider does, and lists tokens by server; a wrong URL makes none."""
    database = str(tmp_path / "oauth.db")
    await auth.provider.check_schema()
    for resource in ("HTTPS://Wiki.example.com/mcp", FILES):
        assert run("token", "create", "ci", "--resource", resource, database=database).returncode == 0
    assert run("token", "create", "ci", "--resource", "wiki", database=database).returncode == 1
    shown = run("token", "list", database=database).stdout
    assert WIKI in shown
    assert FILES in shown
    assert sorted({str(row.resource) for row in await tokens_of(auth.provider)}) == [FILES, WIKI]
