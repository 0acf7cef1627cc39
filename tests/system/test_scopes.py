"""Real clients of a server whose owner chooses what they may do, on the consent page and afterwards."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.utilities.tests import HeadlessOAuth
from key_value.aio.stores.memory import MemoryStore
from sqlalchemy import select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store.database.models import ACCESS, REFRESH, Token, is_live
from oauth_store.flows.scopes import changes_of
from tests.chaos import Child
from tests.clients.apps import CALL_SECONDS, TypeScriptApp
from tests.clients.mcp_remote import McpRemote
from tests.clients.owners import Owner
from tests.databases import rows_of
from tests.scopes import SCOPES, serve_wiki, wiki_on
from tests.serving import free_port
from tests.sites import HASH, Browser, Site
from tests.workers import present_refresh_token

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


def tools_of(scopes: Iterable[str]) -> set[str]:
    """The tools of the wiki that a token with these scopes opens."""
    needs = {"whoami": set(), "read_page": {"read"}, "edit_page": {"read", "write"}, "inner_drop_all": {"admin"}}
    return {tool for tool, needed in needs.items() if needed <= set(scopes)}


class Connected(ABC):
    """A client that stays connected."""

    @abstractmethod
    async def tools(self) -> set[str]:
        """What it lists, in the session that it has."""

    @abstractmethod
    async def scopes(self) -> set[str]:
        """The scopes of the token response that it has stored last."""

    @abstractmethod
    async def lose_access_token(self) -> None:
        """Make its access token useless, as if it had expired."""


class _ByFastMCP(Connected):
    """One that lists its tools through a `fastmcp.Client`."""

    def __init__(self, client: Client[Any]) -> None:
        self._client = client

    async def tools(self) -> set[str]:
        return {tool.name for tool in await self._client.list_tools()}


class _Python(_ByFastMCP):
    def __init__(self, client: Client[Any], oauth: HeadlessOAuth) -> None:
        super().__init__(client)
        self._oauth = oauth

    async def scopes(self) -> set[str]:
        stored = await self._oauth.token_storage_adapter.get_tokens()
        assert stored is not None
        return set((stored.scope or "").split())

    async def lose_access_token(self) -> None:
        # what this client sends is in its memory; one that it takes for expired, it refreshes
        self._oauth.context.token_expiry_time = 1


class _TypeScript(Connected):
    def __init__(self, app: TypeScriptApp, process: asyncio.subprocess.Process) -> None:
        self._app = app
        self._process = process

    async def tools(self) -> set[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"list\n")
        async with asyncio.timeout(CALL_SECONDS):
            line = await self._process.stdout.readline()
        assert line, "the client ended"
        return set(json.loads(line)["answer"].split())

    async def scopes(self) -> set[str]:
        return set(((await self._app.tokens()).scope or "").split())

    async def lose_access_token(self) -> None:
        await self._app.lose_access_token()


class _McpRemote(_ByFastMCP):
    def __init__(self, client: Client[Any], remote: McpRemote) -> None:
        super().__init__(client)
        self._remote = remote

    async def scopes(self) -> set[str]:
        return set(self._remote.stored("tokens").get("scope", "").split())

    async def lose_access_token(self) -> None:
        self._remote.lose_access_token()


@asynccontextmanager
async def python(url: str, owner: Owner) -> AsyncIterator[Connected]:
    """`fastmcp.Client`."""

    class AtTheOwners(HeadlessOAuth):
        async def redirect_handler(self, authorization_url: str) -> None:
            answer = await owner.answer(authorization_url)
            answer.status_code = 302  # the only redirect that HeadlessOAuth knows
            self._stored_response = answer  # type: ignore[assignment]  # it is declared as None

    oauth = AtTheOwners(url, token_storage=MemoryStore(), client_name="test")
    async with Client(StreamableHttpTransport(url, auth=oauth)) as client:
        yield _Python(client, oauth)


@asynccontextmanager
async def typescript(version: str, url: str, owner: Owner, directory: Path) -> AsyncIterator[Connected]:
    """tests/clients/client.mjs, on one of the TypeScript SDKs."""
    async with owner.serving() as browser:
        app = TypeScriptApp(url, "none", version, directory, owner=browser)
        process = await app.start()
        try:
            yield _TypeScript(app, process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def mcp_remote(url: str, owner: Owner, directory: Path) -> AsyncIterator[Connected]:
    """The product from npm."""
    remote = McpRemote(url, directory, owner)
    async with remote.connected() as client:
        yield _McpRemote(client, remote)


CLIENTS = ["fastmcp", "typescript-v1", "typescript-v2", "mcp-remote"]


@asynccontextmanager
async def connected(kind: str, wiki: Site, owner: Owner, directory: Path) -> AsyncIterator[Connected]:
    """A client of each kind that has never met the server, and connects."""
    directory.mkdir(exist_ok=True)
    url = f"{wiki.url}/mcp"
    if kind == "fastmcp":
        connecting = python(url, owner)
    elif kind == "mcp-remote":
        connecting = mcp_remote(url, owner, directory)
    else:
        connecting = typescript(kind.removeprefix("typescript-"), url, owner, directory)
    async with connecting as client:
        yield client


def without_scopes_in_metadata(app: ASGIApp) -> ASGIApp:
    """A proxy in front of a server that leaves `scopes_supported` out: clients then ask for nothing."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if not scope.get("path", "").startswith("/.well-known/"):
            await app(scope, receive, send)
            return
        begun: list[Message] = []

        async def strip(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message)
                return
            body = message.get("body", b"")
            if begun[0]["status"] == 200:
                body = json.dumps({k: v for k, v in json.loads(body).items() if k != "scopes_supported"}).encode()
            headers = [(k, v) for k, v in begun[0]["headers"] if k.lower() != b"content-length"]
            await send({**begun[0], "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({**message, "body": body})

        await app(scope, receive, strip)

    return proxy


ASKING: dict[str, tuple[dict[str, Any], set[str], list[str]]] = {
    # what the server is like, what clients then ask for, and a choice of the owner's that is another one
    "nothing": ({"wrap": without_scopes_in_metadata}, set(), ["read", "write"]),
    "read": ({"required_scopes": ["read"]}, {"read"}, ["read", "admin"]),
    "all": ({}, set(SCOPES), ["admin"]),
}


@pytest.mark.parametrize(
    ("kind", "asking"),
    # without anything to go by, mcp-remote asks for openid, email and profile
    [(kind, asking) for kind in CLIENTS for asking in ASKING if (kind, asking) != ("mcp-remote", "nothing")],
)
async def test_what_was_ticked_is_what_a_client_gets(kind: str, asking: str, tmp_path: Path) -> None:
    """Whatever it asks for: the token response and the list of tools have what the owner ticked, and nothing else."""
    settings, asks, another = ASKING[asking]
    async with wiki_on(tmp_path / "oauth.db", **settings) as wiki:
        for number, ticks in enumerate((None, another)):
            owner = Owner(ticks)
            async with connected(kind, wiki, owner, tmp_path / str(number)) as client:
                expected = (asks or set(SCOPES)) if ticks is None else set(ticks)
                assert await client.tools() == tools_of(expected)
                assert [set(asked.split()) for asked in owner.asked] == [asks]
                assert await client.scopes() == expected


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_client_that_stays_connected(kind: str, tmp_path: Path) -> None:
    """Each Save is in its next list of tools, without a new authorization, and is still there after a refresh."""
    async with wiki_on(tmp_path / "oauth.db") as wiki, Browser() as browser:
        owner = Owner(["read"])
        async with connected(kind, wiki, owner, tmp_path / "client") as client:
            assert await client.tools() == tools_of(["read"])
            page = await browser.sign_in(f"{wiki.url}/apps")
            grant = page.text.partition('name="save" value="')[2].partition('"')[0]
            for scopes in (["read", "write"], ["admin"], ["read"], ["read", "write", "admin"], ["write"]):
                page = await browser.submit(page, {"save": grant, "scope": scopes})
                assert "from its next call on" in page.text
                assert await client.tools() == tools_of(scopes)
            assert await client.scopes() == {"read"}  # of the token response, which is older than the choices
            await client.lose_access_token()
            assert await client.tools() == tools_of(["write"])
            assert await client.scopes() == {"write"}
            assert len(owner.asked) == 1


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_refresh_after_more_was_allowed(kind: str, tmp_path: Path) -> None:
    """What the owner adds outlives the refresh of a client that repeats the scopes of its last token response."""
    async with wiki_on(tmp_path / "oauth.db") as wiki, Browser() as browser:
        owner = Owner(["read"])
        async with connected(kind, wiki, owner, tmp_path / "client") as client:
            assert await client.tools() == tools_of(["read"])
            page = await browser.sign_in(f"{wiki.url}/apps")
            grant = page.text.partition('name="save" value="')[2].partition('"')[0]
            await browser.submit(page, {"save": grant, "scope": ["read", "write"]})
            for _ in range(3):
                await client.lose_access_token()
                assert await client.tools() == tools_of(["read", "write"])
                assert await client.scopes() == {"read", "write"}
            assert len(owner.asked) == 1


KILLS = 12


async def test_a_kill_between_save_and_its_answer(database_url: str) -> None:
    """After each of twelve kill -9 the grant has one choice or the other, in all its rows, and the client works.

    What was answered is what it has.
    """
    port, counts = free_port(), Counter[str]()
    async with wiki_on(database_url, port=port) as wiki:
        token = await wiki.connect(asks="read write", client_name="Claude")
        [client_id] = wiki.verifiers
    before, page, duration = ["read", "write"], None, 0.1
    async with Browser() as browser:
        for kill in range(KILLS):
            after = ["read"] if "write" in before else ["read", "write"]
            with Child(serve_wiki, database_url, port, HASH) as server:
                assert server.receive() == "listens"
                async with Client(f"{wiki.url}/mcp", auth=token.access_token) as client:
                    assert {tool.name for tool in await client.list_tools()} == tools_of(before)
                page = page or await browser.sign_in(f"{wiki.url}/apps")
                grant = page.text.partition('name="save" value="')[2].partition('"')[0]
                began = time.monotonic()
                saving = asyncio.create_task(browser.submit(page, {"save": grant, "scope": after}))
                if kill == 0:
                    await saving
                    duration = time.monotonic() - began
                else:
                    await asyncio.sleep(2 * duration * kill / KILLS)  # a little later each time
                server.kill()
                [answer] = await asyncio.gather(saving, return_exceptions=True)
            async with wiki_on(database_url, port=port) as wiki:
                live = is_live(int(time.time())) & Token.kind.in_((ACCESS, REFRESH))
                rows = await rows_of(wiki.provider, select(Token.kind, Token.scopes, Token.grant_id).where(live))
                assert {row.kind for row in rows} == {ACCESS, REFRESH}
                [now] = {row.scopes.split() == after for row in rows}  # all of them, or none
                counts["answered" if isinstance(answer, httpx2.Response) else "saved" if now else "not saved"] += 1
                assert now or not isinstance(answer, httpx2.Response), answer.text
                before = after if now else before
                assert {tuple(row.scopes.split()) for row in rows} == {tuple(before)}
                changes = (await wiki.provider._store.read(changes_of, [rows[0].grant_id]))[rows[0].grant_id]
                assert len(changes) == counts["answered"] + counts["saved"]
                registered = await wiki.provider.get_client(client_id)
                assert registered is not None
                token = await present_refresh_token(wiki.provider, registered, token.refresh_token)
                assert (token.scope or "").split() == before
    assert counts["answered"] < KILLS, "no kill came in time"
