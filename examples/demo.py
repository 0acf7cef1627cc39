"""Kill a server under its MCP client, lose the response to a refresh, and revoke: here, and on `InMemoryOAuthProvider`.

`make demo` runs it. It starts a real server in its own process, connects a real client over HTTP, and prints every
OAuth request of the client as it happens. The persistent server asks its owner for a password, on a page; the
demonstration fills in the form over HTTP. Exits 1 if the client of that server had to authorize again, or if it got in
after it was revoked.
"""

import asyncio
import html
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
from fastmcp import Client, FastMCP
from fastmcp.client.auth.oauth import ClientNotFoundError
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from fastmcp.utilities.tests import HeadlessOAuth
from key_value.aio.stores.memory import MemoryStore
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.shared.auth import OAuthToken

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "examples" / "server.py"
START_SECONDS = 30
CALL_SECONDS = 30
REFRESH = "POST /token (refresh_token) 200"


QUESTIONS = (
    "Had to authorize again after the kill?",
    "... after the lost response?",
    "A revoked client is refused at its next call?",
)
Answers = tuple[str, str, str]


class DemoError(Exception):
    """The demonstration failed."""


def main() -> None:
    """Run both demonstrations and compare them."""
    warnings.filterwarnings("ignore", message="Using in-memory token storage")  # only the server is killed
    logging.getLogger("mcp.client.auth").setLevel(logging.CRITICAL)  # it logs a traceback for each new registration
    os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    started = time.monotonic()
    try:
        persistent = asyncio.run(demonstrate_persistent())
        in_memory = asyncio.run(demonstrate_in_memory())
    except DemoError as error:
        sys.exit(f"the demonstration failed: {error}")
    say(f"\n{'':<46}SQLAlchemy...  InMemoryOAuthProvider")
    for question, here, there in zip(QUESTIONS, persistent, in_memory, strict=True):
        say(f"{question:<46}{here:<15}{there}")
    say(f"({time.monotonic() - started:.0f} seconds)")
    if persistent != ("no", "no", "yes"):
        sys.exit("the persistent server did not keep a promise")


async def demonstrate_persistent() -> Answers:
    """Return the answers of examples/server.py."""
    say("SQLAlchemyOAuthProvider, on a fresh SQLite file")
    with tempfile.TemporaryDirectory() as directory:
        settings = {"MCP_OAUTH_DB": str(Path(directory) / "oauth.db")}
        say("  alembic upgrade head")
        run_tool("alembic", "upgrade", "head", settings=settings)
        say("  oauth-store hash-password")
        password = secrets.token_urlsafe(16)
        settings["MCP_OAUTH_PASSWORD_HASH"] = run_tool("oauth_store", "hash-password", typed=password).strip()
        server = Server([str(SERVER)], Path(directory) / "server.log", settings)
        return await demonstrate(server, password, settings)


async def demonstrate_in_memory() -> Answers:
    """Return the answers of the same server on `InMemoryOAuthProvider`."""
    say("\nInMemoryOAuthProvider, the same again")
    with tempfile.TemporaryDirectory() as directory:
        server = Server([__file__, "in-memory-server"], Path(directory) / "server.log", {})
        return await demonstrate(server)


async def demonstrate(server: "Server", password: str | None = None, settings: dict[str, str] | None = None) -> Answers:
    """Authorize a client, kill the server, start it again, lose a response, revoke. `settings` are for the commands."""
    app = ClientApp(server.url, password)
    try:
        server.start()
        say(f"  server started, process {server.pid}, {server.url}")
        say("  a client connects for the first time")
        await app.call_tool()
        server.kill()
        say("  kill -9")
        server.start()
        say(f"  server started again, process {server.pid}")
        say("  the client reconnects with its stored tokens")
        await app.call_tool()
        say("  the client reconnects without its access token, so it has to refresh")
        await app.keep(refresh_token=True)
        refreshes = app.requests.count(REFRESH)
        await app.call_tool()
        if app.requests.count(REFRESH) != refreshes + 1:
            raise DemoError("the client did not refresh")
        after_the_kill = app.authorizations
        say("  a refresh, whose response is lost on the way")
        await app.lose_a_response()
        say("  the client refreshes again, with the refresh token that it has")
        await app.keep(refresh_token=True)
        await app.call_tool()
        answers = _yes(after_the_kill > 1), _yes(app.authorizations > after_the_kill)
        if settings is None:
            return *answers, "there is no command for it"
        say("  oauth-store revoke --all")
        run_tool("oauth_store", "revoke", "--all", "--yes", settings=settings)
        status = await app.status()
        say(f"    the next call of the client       {status}")
        return *answers, _yes(status == 401)
    finally:
        server.kill()


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


class ClientApp:
    """An MCP client application: its storage, its OAuth requests, and how often its owner had to authorize it.

    `password` is the owner's password for the consent page. None means that the server asks for no approval.
    """

    def __init__(self, url: str, password: str | None = None) -> None:
        self.url = url
        self.password = password
        self.storage = MemoryStore()
        self.requests: list[str] = []
        self.authorizations = 0

    def connect(self, mode: str = "auto") -> Client[Any]:
        """Return a client that starts with the stored tokens, as after a restart of its application."""
        transport = StreamableHttpTransport(self.url, auth=CountingOAuth(self), httpx_client_factory=self._http_client)
        return Client(transport, mode=mode)

    async def call_tool(self) -> None:
        """Connect and call a tool."""
        async with asyncio.timeout(CALL_SECONDS), self.connect() as client:
            result = await client.call_tool("read_page", {"title": "Home"})
        say(f"    tool answered: {result.data}")

    async def tokens(self) -> OAuthToken:
        """Return the stored tokens."""
        tokens = await CountingOAuth(self).token_storage_adapter.get_tokens()
        if tokens is None:
            raise DemoError("the client has stored no tokens")
        return tokens

    async def client_id(self) -> str:
        """Return the client_id that the server issued to the client."""
        client = await CountingOAuth(self).token_storage_adapter.get_client_info()
        if client is None:
            raise DemoError("the client is not registered")
        return str(client.client_id)

    async def keep(self, *, refresh_token: bool) -> None:
        """Delete the stored access token, and the refresh token unless `refresh_token` is true."""
        tokens = (await self.tokens()).model_copy(update={"access_token": ""})
        if not refresh_token:
            tokens.refresh_token = None
        await CountingOAuth(self).token_storage_adapter.set_tokens(tokens)

    async def lose_a_response(self) -> None:
        """Refresh as the client would, and throw the response away."""
        refresh_token, client_id = (await self.tokens()).refresh_token, await self.client_id()
        form = {"grant_type": "refresh_token", "refresh_token": str(refresh_token), "client_id": client_id}
        async with self._http_client(timeout=CALL_SECONDS) as http:
            await http.post(self.url.replace("/mcp", "/token"), data=form)

    async def status(self) -> int:
        """Return the status of a call with the stored access token, without a new attempt."""
        headers = {"Authorization": f"Bearer {(await self.tokens()).access_token}", "Accept": "application/json"}
        async with httpx2.AsyncClient(timeout=CALL_SECONDS) as http:
            return (await http.post(self.url, json={}, headers=headers)).status_code

    def saw(self, response: httpx2.Response) -> None:
        """Record and print a request of the client if it is part of OAuth."""
        request = response.request
        url = urlsplit(str(request.url))
        if url.path.startswith("/.well-known/") or (url.path == "/mcp" and response.status_code != 401):
            return
        what = f"{request.method} {url.path}"
        if url.path == "/authorize":
            what += f" (PKCE {parse_qs(url.query)['code_challenge_method'][0]})"
        if (request.method, url.path) == ("POST", "/consent"):
            typed = parse_qs(request.content.decode())["password"][0]
            what += " (the password)" if typed == self.password else " (a wrong password)"
        if url.path == "/token":
            what += f" ({parse_qs(request.content.decode())['grant_type'][0]})"
        self.requests.append(f"{what} {response.status_code}")
        asks = urlsplit(response.headers.get("location", "")).path == "/consent"
        meaning = "  redirect to the consent page" if asks else _MEANINGS.get((url.path, response.status_code), "")
        say(f"    {what:<36}{response.status_code}{meaning}")

    def _http_client(self, *arguments: Any, **options: Any) -> httpx2.AsyncClient:
        async def watch(response: httpx2.Response) -> None:
            self.saw(response)

        return httpx2.AsyncClient(*arguments, event_hooks={"response": [watch]}, **options)


_MEANINGS = {
    ("/mcp", 401): "  not authorized",
    ("/register", 201): "  registered",
    ("/authorize", 302): "  approved, with a code",
    ("/authorize", 400): "  the registration is lost",
    ("/consent", 200): "  the consent page",
    ("/consent", 303): "  allowed, with a code",
    ("/consent", 403): "  refused",
    ("/token", 200): "  an access and a refresh token",
}


class CountingOAuth(HeadlessOAuth):
    """The OAuth side of the client. It counts how often the owner would have to authorize it in a browser."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        super().__init__(app.url, token_storage=app.storage, client_name="demo")

    async def redirect_handler(self, authorization_url: str) -> None:
        """Open the authorization page."""
        async with httpx2.AsyncClient(timeout=CALL_SECONDS) as browser:
            response: Any = await browser.get(authorization_url)
        self._stored_response = response
        self.app.saw(response)
        if response.status_code == 400:  # a client with a browser registers again
            raise ClientNotFoundError
        if self.app.password is not None:
            self._stored_response = await self._allow(response, self.app.password)
        self.app.authorizations += 1

    async def _allow(self, redirect: httpx2.Response, password: str) -> Any:
        """Open the consent page, and press Allow with a wrong password, then with the right one."""
        async with httpx2.AsyncClient(cookies=redirect.cookies, timeout=CALL_SECONDS) as browser:
            page = await browser.get(redirect.headers["location"])
            question = re.search(r"<h1>(.*?)</h1>", page.text)
            csrf = re.search(r'name="csrf" value="(.*?)"', page.text)
            self.app.saw(page)
            if question is None or csrf is None:
                raise DemoError(f"the response is not the consent page:\n{page.text}")
            say(f"    the page asks: {html.unescape(re.sub('<[^>]*>', '', question[1]))}")
            for typed, expected in (("a guess", 403), (password, 303)):
                form = {"csrf": html.unescape(csrf[1]), "password": typed, "answer": "allow"}
                answer = await browser.post(page.url, data=form)
                self.app.saw(answer)
                if answer.status_code != expected:
                    raise DemoError(f"the consent page returned {answer.status_code}; expected {expected}")
        answer.status_code = 302  # the only redirect that HeadlessOAuth knows
        return answer


class Server:
    """A server process, on the same free port at every start."""

    def __init__(self, command: list[str], log: Path, settings: dict[str, str]) -> None:
        self.command = [sys.executable, *command]
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.environment = {**clean_environment(), "PORT": str(self.port), **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it has exited."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=START_SECONDS)
            self._process = None

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


def serve_in_memory() -> None:
    """Serve the same tool as examples/server.py, with FastMCP's own provider."""
    port = int(os.environ["PORT"])
    provider = InMemoryOAuthProvider(
        base_url=f"http://127.0.0.1:{port}", client_registration_options=ClientRegistrationOptions(enabled=True)
    )
    mcp = FastMCP("wiki", auth=provider)

    @mcp.tool
    def read_page(title: str) -> str:
        return f"{title}: for authorized clients only"

    mcp.run(transport="http", host="127.0.0.1", port=port, stateless_http=True, show_banner=False)


def run_tool(module: str, *arguments: str, settings: dict[str, str] | None = None, typed: str = "") -> str:
    """Run a command with `typed` on standard input. Return its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**clean_environment(), **(settings or {})},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DemoError(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Return the environment without the settings of another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MCP_", "FASTMCP_", "BASE_URL"))}


def say(line: str) -> None:
    """Print a line, unbuffered."""
    print(line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["in-memory-server"]:
        serve_in_memory()
    else:
        main()
