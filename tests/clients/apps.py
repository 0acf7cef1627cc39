"""Client applications of each kind: what they have stored outlives them, and every OAuth request is noted."""

import asyncio
import json
import os
import signal
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.utilities.tests import HeadlessOAuth
from key_value.aio.stores.memory import MemoryStore
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken

from tests.clients import CLIENT, need_clients

KINDS = ["fastmcp", "typescript-v1", "typescript-v2"]
METHODS = ["none", "client_secret_post", "client_secret_basic"]
CALL_SECONDS = 60
PATIENCE_SECONDS = 15
"""After which node is asked whether it waits for anybody. It closes idle sockets after 4."""
CALLS = 3
ANSWER = "Home: for authorized clients only"
"""Of the tool that every application calls: examples/server.py has it."""


@dataclass
class Outcome:
    """One tool call: its answer, the OAuth requests it took, and how often a browser was opened."""

    answer: str
    requests: list[str]
    authorizations: int


class App(ABC):
    """A client application. Each call starts it afresh, with what it has stored.

    Its client_id is `document`, the URL of its metadata document; without one it registers, for this `method`.
    """

    def __init__(self, url: str, method: str, document: str | None = None) -> None:
        self.url = url
        self.method = method
        self.document = document

    @abstractmethod
    async def call(self) -> Outcome:
        """Connect, and call a tool."""

    @abstractmethod
    async def client(self) -> OAuthClientInformationFull:
        """The registration that is stored."""

    @abstractmethod
    async def tokens(self) -> OAuthToken:
        """The tokens that are stored."""

    @abstractmethod
    async def lose_access_token(self) -> None:
        """Make the stored access token useless, as if it had expired."""


class TypeScriptApp(App):
    """tests/clients/client.mjs, on one of the TypeScript SDKs."""

    def __init__(
        self,
        url: str,
        method: str,
        version: str,
        directory: Path,
        document: str | None = None,
        owner: str | None = None,
    ) -> None:
        super().__init__(url, method, document)
        self._stored = directory / "client.json"
        self._environment = os.environ | ({} if owner is None else {"OWNER": owner})
        self._command = [
            need_clients(),
            "--report-on-signal",
            f"--report-directory={directory}",
            "--report-filename=node.json",
            str(CLIENT),
            version,
            url,
            str(self._stored),
            method,
            *filter(None, [document]),
        ]

    async def call(self) -> Outcome:
        """Call in a process of its own; again in another one where node closed the connection that it waits on.

        It does so in one of some hundred calls behind Caddy, on a busy machine: Caddy aborts an answer, the
        server has no request left, and node has no socket, but its SDK's timer of 60 seconds for that answer.
        """
        for _ in range(CALLS):
            outcome = await self._call()
            if outcome is not None:
                return outcome
        raise AssertionError(f"node closed its connection {CALLS} times in a row")

    async def _call(self) -> Outcome | None:
        process = await self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"call\n")
        output = asyncio.create_task(process.stdout.readline())  # what is promised: how node ends is its own affair
        try:
            done, _ = await asyncio.wait([output], timeout=PATIENCE_SECONDS)
            if not done and not await self._has_sockets(process):
                return None
            async with asyncio.timeout(CALL_SECONDS):
                line = await output
        except TimeoutError:
            print(f"{' '.join(self._command)} gave no answer; the tasks of this process, and node's report:")
            for task in asyncio.all_tasks():  # the server's, where it runs here
                task.print_stack(file=sys.stdout)
            print(json.dumps(await self._report(process), indent=1))
            raise
        finally:
            output.cancel()
            if process.returncode is None:
                process.kill()
            await process.wait()
            assert process.stderr is not None
            errors = (await process.stderr.read()).decode()
            print(errors, end="")
        assert line, errors
        return Outcome(**json.loads(line))

    async def _has_sockets(self, process: asyncio.subprocess.Process) -> bool:
        """Tell whether node has a connection to anything, or has ended."""
        return process.returncode is not None or any(
            handle["type"] == "tcp" for handle in (await self._report(process))["libuv"]
        )

    async def start(self) -> asyncio.subprocess.Process:
        """Start the application. It calls a tool for every line that it gets, or lists the tools.

        Its browser is `owner`, a URL from `Owner.serving()`; without one, it follows the server's redirect.
        """
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, stdin=pipe, stdout=pipe, stderr=pipe
        )

    async def _report(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """What node says of itself, once it is asked by a signal."""
        path = self._stored.parent / "node.json"
        path.unlink(missing_ok=True)
        if process.returncode is None:
            process.send_signal(signal.SIGUSR2)
        for _ in range(100):
            await asyncio.sleep(0.1)
            with suppress(ValueError, OSError):
                report: dict[str, Any] = json.loads(path.read_text())
                return {name: report.get(name) for name in ("javascriptStack", "libuv")}
        return {"javascriptStack": None, "libuv": [{"type": "tcp", "note": "node did not say"}]}

    async def client(self) -> OAuthClientInformationFull:
        return OAuthClientInformationFull.model_validate(json.loads(self._stored.read_text())["client"])

    async def tokens(self) -> OAuthToken:
        return OAuthToken.model_validate(json.loads(self._stored.read_text())["tokens"])

    async def lose_access_token(self) -> None:
        stored = json.loads(self._stored.read_text())
        stored["tokens"]["access_token"] = "thrown-away"
        self._stored.write_text(json.dumps(stored))


class FastMCPApp(App):
    """`fastmcp.Client`."""

    def __init__(self, url: str, method: str, document: str | None = None) -> None:
        super().__init__(url, method, document)
        self._storage = MemoryStore()
        self._outcome = Outcome("", [], 0)

    async def call(self) -> Outcome:
        self._outcome = Outcome("", [], 0)
        transport = StreamableHttpTransport(
            self.url, auth=_WatchedOAuth(self, self._oauth), httpx_client_factory=self._http_client
        )
        async with asyncio.timeout(CALL_SECONDS), Client(transport) as client:
            self._outcome.answer = (await client.call_tool("read_page", {"title": "Home"})).data
        return self._outcome

    async def client(self) -> OAuthClientInformationFull:
        client: OAuthClientInformationFull | None = await self._stored.get_client_info()
        assert client is not None
        return client

    async def tokens(self) -> OAuthToken:
        tokens: OAuthToken | None = await self._stored.get_tokens()
        assert tokens is not None
        return tokens

    async def lose_access_token(self) -> None:
        # on a 401 with a token that it takes for good, this client does not refresh but goes to the browser
        await self._stored.set_tokens((await self.tokens()).model_copy(update={"access_token": ""}))

    def saw(self, response: httpx2.Response) -> None:
        """Note a request that belongs to OAuth, and how the client authenticated."""
        request = response.request
        path = urlsplit(str(request.url)).path
        if path == urlsplit(self.url).path and response.status_code != 401:
            return
        what = f"{request.method} {path}"
        if path.endswith("/token"):
            form = parse_qs(request.content.decode())
            how = "client_secret_post" if "client_secret" in form else "none"
            if request.headers.get("authorization", "").startswith("Basic "):
                how = "client_secret_basic"
            what += f" ({form['grant_type'][0]}, {how})"
        self._outcome.requests.append(f"{what} {response.status_code}")

    def opened_browser(self) -> None:
        """Count it."""
        self._outcome.authorizations += 1

    @property
    def _oauth(self) -> dict[str, Any]:
        metadata = {"token_endpoint_auth_method": self.method}
        return {
            "token_storage": self._storage,
            "client_name": "test",
            "additional_client_metadata": metadata,
            "client_metadata_url": self.document,
        }

    @property
    def _stored(self) -> Any:
        return _WatchedOAuth(self, self._oauth).token_storage_adapter

    def _http_client(
        self,
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
        auth: httpx2.Auth | None = None,
        **options: Any,
    ) -> httpx2.AsyncClient:
        async def watch(response: httpx2.Response) -> None:
            self.saw(response)

        return httpx2.AsyncClient(
            headers=headers, timeout=timeout, auth=auth, event_hooks={"response": [watch]}, **options
        )


class _WatchedOAuth(HeadlessOAuth):
    def __init__(self, app: FastMCPApp, options: dict[str, Any]) -> None:
        self.app = app
        super().__init__(app.url, **options)

    async def redirect_handler(self, authorization_url: str) -> None:
        self.app.opened_browser()
        await super().redirect_handler(authorization_url)
        response: Any = self._stored_response
        self.app.saw(response)


def make_app(kind: str, url: str, method: str, directory: Path, document: str | None = None) -> App:
    """Return an application that has never met the server. It keeps what it stores in `directory`."""
    if kind == "fastmcp":
        return FastMCPApp(url, method, document)
    return TypeScriptApp(url, method, kind.removeprefix("typescript-"), directory, document)
