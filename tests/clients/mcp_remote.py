"""mcp-remote from npm: it speaks to an application by its standard input and output, and to a server by HTTP."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from tests.clients import NODE_MODULES, need_clients
from tests.clients.apps import ANSWER
from tests.clients.owners import Owner
from tests.example import ExampleServer

SCRIPT = NODE_MODULES / "mcp-remote" / "dist" / "proxy.js"
SECONDS = 60
LOOK_SECONDS = 0.02
RETRIES = 6
"""Of a connection that is refused: at once, then in 0.5 s, 1 s, 2 s and so on."""


class McpRemote:
    """An installation of mcp-remote that has never met the server. Its browser is a person of the test's."""

    def __init__(
        self, url: str, directory: Path, owner: Owner | None = None, *, options: Sequence[str] = (), **environment: str
    ) -> None:
        """`options` are of its command line, and `environment` are variables."""
        self.authorizations = 0
        self._owner = owner
        self._command = [need_clients(), str(SCRIPT), url, *options]
        self._directory = directory
        self._opened = directory / "opened"
        self._opened.touch()
        browser = directory / "browser"
        browser.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >>"{self._opened}"\n')
        browser.chmod(0o755)
        home = str(directory)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "MCP_REMOTE_CONFIG_DIR": home,
            "BROWSER": str(browser),
            **environment,
        }

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Client[Any]]:
        """A client of a process of mcp-remote."""
        node, *arguments = self._command
        transport = StdioTransport(
            node, arguments, env=self._environment, keep_alive=False, log_file=self._directory / "mcp-remote.log"
        )
        person = asyncio.create_task(self._authorize())
        try:
            async with asyncio.timeout(SECONDS), Client(transport) as client:
                yield client
        finally:
            person.cancel()
            await asyncio.wait([person])

    async def call(self) -> int:
        """Call a tool by a new process. Return how often it asked until now."""
        async with self.connected() as client:
            assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
        return self.authorizations

    async def stay_authorized(self, server: ExampleServer) -> None:
        """Ask once, and no more: through a kill -9 of the server, a new process, and an expiry."""
        async with self.connected() as client:
            for _ in range(2):
                assert (await client.call_tool("read_page", {"title": "Home"})).data == ANSWER
                server.restart()
        issued, registered = self.stored("tokens"), self.stored("client_info")
        assert await self.call() == 1
        assert self.stored("tokens") == issued
        self.lose_access_token()
        assert await self.call() == 1
        assert self.stored("tokens")["refresh_token"] != issued["refresh_token"]
        assert self.stored("client_info")["client_id"] == registered["client_id"]

    def stored(self, what: str) -> dict[str, Any]:
        """Its `tokens` or its `client_info`."""
        return dict(json.loads(self._file(what).read_text()))

    def lose_access_token(self) -> None:
        """Make the stored access token useless, as if it had expired."""
        self._file("tokens").write_text(json.dumps(self.stored("tokens") | {"access_token": "thrown-away"}))

    def _file(self, what: str) -> Path:
        [path] = self._directory.rglob(f"*_{what}.json")
        return path

    def _urls(self) -> list[str]:
        """The URLs that it opened in a browser; with --device-code, those that it printed."""
        log = self._directory / "mcp-remote.log"
        printed = re.findall(r"https?://\S+/device\?user_code=\S+", log.read_text()) if log.exists() else []
        return [*self._opened.read_text().splitlines(), *printed]

    async def _authorize(self) -> None:
        """Follow each URL that is opened to its end, which is at mcp-remote."""
        listening = httpx2.AsyncHTTPTransport(retries=RETRIES)  # it listens a little later than it opens the browser
        async with httpx2.AsyncClient(transport=listening, timeout=60) as http:
            while True:
                for url in self._urls()[self.authorizations :]:
                    self.authorizations += 1
                    if self._owner is not None and "/device?" in url:
                        await self._owner.answer_device(url)
                        continue
                    if self._owner is not None:
                        url = (await self._owner.answer(url)).headers["location"]
                    await http.get(url, follow_redirects=True)
                await asyncio.sleep(LOOK_SECONDS)
