"""A server whose database goes away, and clients that use it over HTTP meanwhile and are owed an answer."""

import asyncio
import re
import secrets
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.chaos import Child, serve
from tests.serving import free_port
from tests.steps import REDIRECT_URI, authorization_request, pkce, query_of, token_request

PASSWORD = "pa55word-of-the-database"
LOG_CHARACTERS = 8000
"""Of the end of a server's log, with a failure."""
BACK_SECONDS = 60
"""How long a server may take to work again; the tests do not wait that long, but for the moment that it does."""

WRITES = {"register", "authorize", "exchange", "refresh", "revoke"}
ALL = WRITES | {"mcp"}
"""The routes. The two grant types of /token count as two."""


class Away(Exception):
    """503, `temporarily_unavailable` and Retry-After."""


class Refused(Exception):
    """A well-formed refusal of the OAuth endpoints, with its error code."""


class Wiki:
    """A server process, and a client application that uses it over HTTP."""

    def __init__(self, url: str, directory: Path, user: int | None, port: int | None) -> None:
        self.log_file = directory / "server.log"
        self.port = port or free_port()
        self.child = Child(serve, url, self.port, self.log_file, user)
        self.http = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=60,
            trust_env=False,
            limits=httpx2.Limits(max_connections=100),
        )
        self.seen: Counter[tuple[str, int]] = Counter()
        self.slowest: defaultdict[str, float] = defaultdict(float)
        self.secrets = {PASSWORD}

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    async def ask(self, route: str, method: str, path: str, **request: Any) -> httpx2.Response:
        """Send a request. Raises `Away` or `Refused`; any other failure fails the test."""
        started = time.monotonic()
        response = await self.http.request(method, path, **request)
        self.seen[route, response.status_code] += 1
        self.slowest[route] = max(self.slowest[route], time.monotonic() - started)
        if response.status_code == 503:
            assert response.json()["error"] == "temporarily_unavailable", response.text
            assert int(response.headers["retry-after"]) > 0
            assert "location" not in response.headers
            raise Away
        if response.status_code in (400, 401):
            raise Refused(response.json()["error"])
        assert response.status_code in (200, 201, 302), f"{route}: {response.status_code} {response.text}"
        return response

    async def register(self) -> str:
        """Register a public client, and return its client_id."""
        metadata = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none", "client_name": "chaos"}
        client_id: str = (await self.ask("register", "POST", "/register", json=metadata)).json()["client_id"]
        return client_id

    async def authorize(self, client_id: str) -> tuple[str, str]:
        """Return a code and its verifier."""
        verifier, challenge = pkce()
        state = secrets.token_urlsafe(16)
        self.secrets |= {verifier, challenge, state}
        query = authorization_request(client_id, code_challenge=challenge, state=state)
        response = await self.ask("authorize", "GET", "/authorize", params=query)
        answer = query_of(response.headers["location"])
        assert "error" not in answer, answer
        self.secrets.add(answer["code"])
        return answer["code"], verifier

    async def exchange(self, client_id: str, code: str, verifier: str) -> dict[str, Any]:
        """Return the token pair of a code."""
        return await self._token("exchange", token_request(code, verifier, client_id=client_id))

    async def refresh(self, client_id: str, refresh_token: str) -> dict[str, Any]:
        """Return the token pair that follows a refresh token."""
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": client_id}
        return await self._token("refresh", form)

    async def _token(self, route: str, form: dict[str, str]) -> dict[str, Any]:
        pair: dict[str, Any] = (await self.ask(route, "POST", "/token", data=form)).json()
        self.secrets |= {pair["access_token"], pair["refresh_token"]}
        return pair

    async def revoke(self, client_id: str, token: str) -> None:
        """Revoke a token."""
        await self.ask("revoke", "POST", "/revoke", data={"token": token, "client_id": client_id})

    async def call(self, access_token: str) -> None:
        """Call a tool of the MCP server."""
        call = {"name": "read_page", "arguments": {"title": "Home"}}
        response = await self.ask(
            "mcp",
            "POST",
            "/mcp",
            json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call},
            headers={
                "Authorization": f"Bearer {access_token}",
                "Accept": "application/json, text/event-stream",
                "MCP-Protocol-Version": "2025-06-18",
            },
        )
        assert "for authorized clients only" in response.text, response.text

    async def sign_in(self) -> tuple[str, dict[str, Any]]:
        """Return a client_id and a token pair."""
        client_id = await self.register()
        return client_id, await self.exchange(client_id, *await self.authorize(client_id))

    async def state(self) -> dict[str, int]:
        """Steps under way, connections that are checked out, and those that were ever opened."""
        state: dict[str, int] = (await self.http.get("/state")).json()
        return state

    def causes(self) -> list[str]:
        """The log lines of the outage. Raises if the log holds a secret or a traceback, which would bury the cause."""
        log = self.log
        assert not [secret for secret in self.secrets if secret in log]
        assert "Traceback" not in log, log
        return [line for line in log.splitlines() if line.startswith("ERROR oauth_store ")]

    async def stop(self) -> None:
        """SIGTERM, and wait until the server has closed everything and ended by itself."""
        process = self.child.process
        assert process.is_alive(), self.log
        process.terminate()
        await asyncio.to_thread(process.join, BACK_SECONDS)
        assert process.exitcode == -signal.SIGTERM, f"the server did not end: {process.exitcode}\n{self.log}"


@asynccontextmanager
async def serving(url: str, user: int | None = None, port: int | None = None) -> AsyncIterator[Wiki]:
    """A server on a database, and afterwards proof that it ended without a complaint."""
    with tempfile.TemporaryDirectory() as directory:
        wiki = Wiki(url, Path(directory), user, port)
        try:
            async with wiki.http:
                assert await asyncio.to_thread(wiki.child.receive) == "listens"
                yield wiki
            await wiki.stop()
            wiki.causes()
        except BaseException as error:
            error.add_note(f"The server's log ends with:\n{wiki.log[-LOG_CHARACTERS:]}")
            raise
        finally:
            wiki.child.kill()


class Stock:
    """What a client has when the outage begins, for each route. Of what can be used but once, there is some more."""

    SPARE = 6

    def __init__(self, wiki: Wiki) -> None:
        self.wiki = wiki
        self.client_id = ""
        self.codes: list[tuple[str, str]] = []
        self.living: dict[str, Any] = {}
        self.refreshing: dict[str, Any] = {}
        self.ending: list[dict[str, Any]] = []
        self.ended: dict[str, Any] = {}

    async def fill(self) -> None:
        """Sign in while all is well."""
        self.client_id, self.living = await self.wiki.sign_in()
        self.refreshing = await self._grant()
        self.ending = [await self._grant() for _ in range(self.SPARE)]
        self.codes = [await self.wiki.authorize(self.client_id) for _ in range(self.SPARE)]
        await self.wiki.call(self.living["access_token"])

    async def _grant(self) -> dict[str, Any]:
        return await self.wiki.exchange(self.client_id, *await self.wiki.authorize(self.client_id))

    async def _register(self) -> None:
        await self.wiki.register()

    async def _authorize(self) -> None:
        await self.wiki.authorize(self.client_id)

    async def _exchange(self) -> None:
        await self.wiki.exchange(self.client_id, *self.codes[-1])
        self.codes.pop()

    async def _refresh(self) -> None:
        self.refreshing = await self.wiki.refresh(self.client_id, self.refreshing["refresh_token"])

    async def _revoke(self) -> None:
        await self.wiki.revoke(self.client_id, self.ending[-1]["refresh_token"])
        self.ended = self.ending.pop()

    async def _mcp(self) -> None:
        await self.wiki.call(self.living["access_token"])

    async def away(self, routes: set[str] = ALL) -> set[str]:
        """Try these routes, all at once, and return those that answered 503. The others did what they are for."""
        steps: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "register": self._register,
            "authorize": self._authorize,
            "exchange": self._exchange,
            "refresh": self._refresh,
            "revoke": self._revoke,
            "mcp": self._mcp,
        }

        async def is_away(route: str) -> bool:
            try:
                await steps[route]()
            except Away:
                return True
            return False

        asked = sorted(routes)
        answers = await asyncio.gather(*(is_away(route) for route in asked))
        return {route for route, answer in zip(asked, answers, strict=True) if answer}

    async def until_away(self, routes: set[str]) -> None:
        """Wait until each of these routes has answered 503."""
        while routes := routes - await self.away(routes):
            assert len(self.codes) > 1, f"these still work: {routes}"
            assert len(self.ending) > 1, f"these still work: {routes}"
            await asyncio.sleep(0.1)

    async def until_back(self) -> None:
        """Wait until all routes work again, with everything that the client had before the outage."""
        deadline = time.monotonic() + BACK_SECONDS
        missing = set(ALL)
        while missing := await self.away(missing):
            assert time.monotonic() < deadline, f"these still fail: {missing}\n{self.wiki.log[-2000:]}"
            await asyncio.sleep(0.05)
        await self.wiki.call(self.refreshing["access_token"])
        with pytest.raises(Refused, match="invalid_token"):
            await self.wiki.call(self.ended["access_token"])


@asynccontextmanager
async def load(wiki: Wiki, tasks: int = 4) -> AsyncIterator[Counter[str]]:
    """Clients that go on as clients do, and come back after a 503, while the body runs. Yields what they count."""
    counts: Counter[str] = Counter()
    over = asyncio.Event()

    async def insist(step: Callable[..., Coroutine[Any, Any, Any]], *arguments: str) -> Any:
        """Repeat a step until it is answered."""
        deadline = time.monotonic() + 2 * BACK_SECONDS
        repeated = False
        while True:
            try:
                answer = await step(*arguments)
            except Away:
                assert time.monotonic() < deadline, wiki.log[-2000:]
                counts["503"] += 1
                repeated = True
                await asyncio.sleep(0.05)
                continue
            except Refused as refusal:
                if repeated and step == wiki.exchange:
                    # the connection broke while the code was being committed: nobody could know whether it was
                    counts["codes in doubt"] += 1
                    return None
                raise AssertionError(f"{step.__name__} was refused: {refusal}") from refusal
            counts["answered"] += 1
            return answer

    async def client() -> None:
        while not over.is_set():
            client_id = await insist(wiki.register)
            pair = await insist(wiki.exchange, client_id, *await insist(wiki.authorize, client_id))
            if pair is None:
                continue
            for _ in range(3):
                await insist(wiki.call, pair["access_token"])
                pair = await insist(wiki.refresh, client_id, pair["refresh_token"])
            await insist(wiki.revoke, client_id, pair["access_token"])
            counts["grants"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(client())
        try:
            yield counts
        finally:
            over.set()


async def finished_grants(counts: Counter[str], more: int) -> None:
    """Wait until the clients of `load` have gone through so many more grants, from /register to /revoke."""
    deadline, before = time.monotonic() + BACK_SECONDS, counts["grants"]
    while counts["grants"] < before + more:
        assert time.monotonic() < deadline, counts
        await asyncio.sleep(0.05)


def says(causes: list[str], pattern: str) -> None:
    """Hold the log against what the operator must be able to read in it, in one line."""
    assert causes, "nothing was logged"
    assert any(re.search(pattern, line) for line in causes), "\n".join(dict.fromkeys(causes))
