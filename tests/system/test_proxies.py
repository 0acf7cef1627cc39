"""The configurations of docs/deploying.md, in nginx and Caddy as Debian has them: clients get in through each."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from argon2 import PasswordHasher
from fastmcp import Client, Context, FastMCP

from oauth_store import AutoApproval, PasswordApproval, RateLimits, SQLAlchemyOAuthProvider
from tests.clients.apps import ANSWER, KINDS, Outcome, make_app
from tests.deployments import discover, wiki
from tests.serving import free_port, self_signed, serving, wait_for_port
from tests.sites import action_of, csrf_of
from tests.steps import REDIRECT_URI, authorization_request, query_of

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

PAGE = Path(__file__).parent.parent.parent / "docs" / "deploying.md"
START_SECONDS = 20
PASSWORD = "correct horse battery staple"
REGISTRATION = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}

NGINX = """
user {user};
daemon off;
pid {directory}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {site}
}}
"""
CADDY = """
{{
	admin off
	auto_https off
	storage file_system {directory}/caddy
}}
{site}
"""


def configuration(language: str, title: str) -> str:
    """The block of the page in this language whose first line is the comment `title`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if block.startswith(f"# {title}\n")]
    return str(block)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of 127.0.0.1, which signs itself, and its key, in one file."""
    path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
    path.write_bytes(self_signed("127.0.0.1"))
    return path


@pytest.fixture(autouse=True)
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients, those on node too, take the certificate for good."""
    for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"):
        monkeypatch.setenv(name, str(certificate))


def _need(binary: str) -> str:
    path = shutil.which(binary)
    if path is None and os.environ.get("OAUTH_STORE_TEST_REQUIRE_PROXIES") == "1":
        pytest.fail(f"no {binary} here, and OAUTH_STORE_TEST_REQUIRE_PROXIES is set")
    if path is None:
        pytest.skip(f"no {binary} here")
    return path


class Proxy:
    """nginx or Caddy in front of servers on this machine, at an https port of its own."""

    def __init__(self, binary: str, title: str, certificate: Path, directory: Path) -> None:
        self.port = free_port()
        self.host = f"https://127.0.0.1:{self.port}"
        self._path = _need(binary)
        self._title, self._binary, self._directory = title, binary, directory
        self._certificate = certificate

    @contextmanager
    def running(self, *upstreams: int) -> Iterator[None]:
        """Run it before the servers on these ports, in the place of 8000, 8001, ..."""
        site = configuration(self._binary if self._binary == "nginx" else "caddyfile", self._title)
        for number, port in enumerate(upstreams):
            site = site.replace(f"127.0.0.1:{8000 + number}", f"127.0.0.1:{port}")
        assert "127.0.0.1:80" not in site
        path = self._directory / f"{self._binary}.conf"
        if self._binary == "nginx":
            site = site.replace("listen 443 ssl;", f"listen 127.0.0.1:{self.port} ssl;")
            site = re.sub(r"/\S+fullchain.pem", str(self._certificate), site)
            site = re.sub(r"/\S+privkey.pem", str(self._certificate), site)
            site = re.sub(r"(?:wiki\.)?example\.com", "127.0.0.1", site)
            path.write_text(NGINX.format(user=self._directory.owner(), directory=self._directory, site=site))
            command = [self._path, "-p", str(self._directory), "-e", "stderr", "-c", str(path)]
        else:
            tls = f"{self.host} {{\n\tbind 127.0.0.1\n\ttls {self._certificate} {self._certificate}\n"
            site = re.sub(r"^(?:wiki\.)?example\.com \{\n", tls, site, flags=re.MULTILINE)
            path.write_text(CADDY.format(directory=self._directory, site=site))
            command = [self._path, "run", "--adapter", "caddyfile", "--config", str(path)]
        assert "example.com" not in site
        log = self._directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"XDG_CONFIG_HOME": str(self._directory)},  # where Caddy saves what it was given
            )
        try:
            wait_for_port(process, self.port, log, START_SECONDS)
            yield
        finally:
            process.terminate()
            assert process.wait(START_SECONDS) == 0, log.read_text()


@asynccontextmanager
async def server(base_url: str, database: str = ":memory:", **settings: Any) -> AsyncIterator[int]:
    """A server with this public URL, on a port of its own, which is yielded."""
    port = free_port()
    settings = {"approval": AutoApproval(), **settings}
    provider = SQLAlchemyOAuthProvider(database, base_url=base_url, **settings)
    async with provider, serving(wiki(provider).http_app(stateless_http=True), port):
        yield port


@asynccontextmanager
async def behind(proxy: Proxy, path: str, **settings: Any) -> AsyncIterator[str]:
    """A server behind a proxy. Yields its public URL."""
    async with server(f"{proxy.host}{path}", **settings) as port:
        with proxy.running(port):
            yield f"{proxy.host}{path}"


PROXIES = [
    pytest.param((binary, title, path), id=f"{binary}-{'under-a-path' if path else 'at-the-root'}")
    for binary in ("nginx", "caddy")
    for title, path in (("a host of its own", ""), ("under a path", "/wiki"))
]


@pytest.fixture(params=PROXIES)
def proxy_and_path(request: pytest.FixtureRequest, certificate: Path, tmp_path: Path) -> tuple[Proxy, str]:
    """Each proxy with each configuration, and the path at which the server is."""
    binary, title, path = request.param
    return Proxy(binary, title, certificate, tmp_path), path


@pytest.mark.parametrize("kind", KINDS)
async def test_real_clients_get_in_and_refresh(proxy_and_path: tuple[Proxy, str], kind: str, tmp_path: Path) -> None:
    """A real client discovers, registers, is authorized, calls, and refreshes, all through https."""
    proxy, path = proxy_and_path
    async with behind(proxy, path) as url:
        app = make_app(kind, f"{url}/mcp", "none", tmp_path)
        first = await app.call()
        assert (first.answer, first.authorizations) == (ANSWER, 1)
        assert await app.call() == Outcome(ANSWER, [], 0)
        if kind == "fastmcp" and path:
            return  # a restarted Python client refreshes at /token of the host (python-sdk issue 3240)
        await app.lose_access_token()
        refreshed = await app.call()
        assert (refreshed.answer, refreshed.authorizations) == (ANSWER, 0)


async def test_the_owner_signs_in_through_the_proxy(proxy_and_path: tuple[Proxy, str]) -> None:
    """The consent page is where the browser is sent, keeps its cookies over https, and sends the code to the client."""
    proxy, path = proxy_and_path
    approval = PasswordApproval(password_hash=PasswordHasher(1, 8, 1).hash(PASSWORD))
    html_only = {"accept": "text/html"}
    async with behind(proxy, path, approval=approval) as url, httpx2.AsyncClient(headers=html_only) as browser:
        metadata = await discover(browser, f"{url}/mcp")
        client_id = await register(browser, metadata["registration_endpoint"])
        request = authorization_request(client_id)
        page = await browser.get(metadata["authorization_endpoint"], params=request, follow_redirects=True)
        assert page.status_code == 200, page.text
        assert urlsplit(str(page.url)).path == f"{path}/consent"
        assert all(name.startswith("__Host-") for name in browser.cookies)
        form = {"csrf": csrf_of(page), "answer": "allow"}
        answer = await browser.post(action_of(page), data=form | {"password": PASSWORD})
        callback = query_of(answer.headers["location"])
        assert callback["code"].startswith("code_")
        assert callback["iss"] == metadata["issuer"]


async def test_answers_are_not_held_back(proxy_and_path: tuple[Proxy, str]) -> None:
    """What a tool reports while it works reaches the client before the tool ends."""
    proxy, path = proxy_and_path
    heard = asyncio.Event()
    mcp = FastMCP("slow")

    @mcp.tool
    async def work(ctx: Context) -> str:
        await ctx.report_progress(0.5, 1)
        await asyncio.wait_for(heard.wait(), 10)
        return "done"

    async def on_progress(_progress: float, _total: float | None, _message: str | None) -> None:
        heard.set()

    port = free_port()
    async with serving(mcp.http_app(stateless_http=True), port):
        with proxy.running(port):
            async with Client(f"{proxy.host}{path}/mcp") as client:
                assert (await client.call_tool("work", {}, progress_handler=on_progress)).data == "done"


async def test_limits_count_who_is_behind_the_proxy(proxy_and_path: tuple[Proxy, str]) -> None:
    """Each address has its own limit, and nobody gets another one by an X-Forwarded-For of their own."""
    proxy, path = proxy_and_path
    limits = RateLimits(registrations_per_address="2/hour")
    async with behind(proxy, path, rate_limits=limits) as url:
        async with httpx2.AsyncClient(transport=from_address("127.0.0.2")) as one:
            for number, status in ((1, 201), (2, 201), (3, 429)):
                spoofed = {"x-forwarded-for": f"192.0.2.{number}"}
                assert (await one.post(f"{url}/register", json=REGISTRATION, headers=spoofed)).status_code == status
        async with httpx2.AsyncClient(transport=from_address("127.0.0.3")) as other:
            await register(other, f"{url}/register")


@pytest.mark.parametrize("binary", ["nginx", "caddy"])
async def test_replicas_share_one_database(binary: str, certificate: Path, database_url: str, tmp_path: Path) -> None:
    """Two servers on one database, behind a proxy that takes them in turn, are one server to a client."""
    proxy = Proxy(binary, "two replicas", certificate, tmp_path)
    async with server(proxy.host, database_url) as one, server(proxy.host, database_url) as two:
        with proxy.running(one, two):
            app = make_app("fastmcp", f"{proxy.host}/mcp", "none", tmp_path)
            assert (await app.call()).answer == ANSWER
            for _ in range(3):
                assert await app.call() == Outcome(ANSWER, [], 0)
                await app.lose_access_token()
                refreshed = await app.call()
                assert (refreshed.answer, refreshed.authorizations) == (ANSWER, 0)


async def register(http: httpx2.AsyncClient, endpoint: str) -> str:
    """The client_id of a new public client."""
    answer = await http.post(endpoint, json=REGISTRATION)
    return str(answer.raise_for_status().json()["client_id"])


def from_address(address: str) -> httpx2.AsyncHTTPTransport:
    """Requests that come from another address of this machine."""
    return httpx2.AsyncHTTPTransport(local_address=address)
