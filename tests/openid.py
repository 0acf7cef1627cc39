"""A real OpenID Connect provider in a process of its own, and a browser that goes through its pages and ours."""

import html
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import httpx2

from tests.clients import need_clients

SERVER = Path(__file__).parent / "clients" / "openid.mjs"
CLIENT_ID, CLIENT_SECRET = "wiki", "the secret of the wiki"
HOPS = 20


class OpenIdProvider:
    """A process of tests/clients/openid.mjs, at the same port after every restart."""

    def __init__(self, redirect_uri: str) -> None:
        self.issuer = ""
        self._port = "0"
        self._redirect_uri = redirect_uri
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, and wait until it listens. Skips the test where there is no node."""
        command = [need_clients(), str(SERVER), self._port, CLIENT_ID, CLIENT_SECRET, self._redirect_uri]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.issuer = self._process.stdout.readline().strip()
        if not self.issuer:
            raise RuntimeError(f"the OpenID provider did not start: {self._process.communicate()[1]}")
        self._port = self.issuer.rpartition(":")[2]

    def stop(self) -> None:
        """Kill the process, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()


class Browser:
    """Follows links and redirects, keeps cookies, and sends forms as they are on the page."""

    def __init__(self, *servers: str) -> None:
        """It follows redirects to these URLs alone: where the client listens is for the test to say."""
        self.visited: list[str] = []
        self._servers = servers
        self._http = httpx2.AsyncClient(headers={"Accept": "text/html"}, timeout=30)

    async def open(self, url: str, *, stop_before: str = "\0") -> httpx2.Response:
        """Return the page at the end of all redirects; or the redirect to elsewhere, or to `stop_before`."""
        return await self._follow(await self._http.get(url), stop_before)

    async def send(self, page: httpx2.Response, fields: dict[str, str], *, stop_before: str = "\0") -> httpx2.Response:
        """Send the form of a page, with what is hidden in it."""
        form = re.search(r"<form([^>]*)>(.*?)</form>", page.text, re.DOTALL)
        assert form is not None, page.text
        action = re.search(r'action="([^"]*)"', form[1])
        url = urljoin(str(page.url), html.unescape(action[1])) if action else str(page.url)
        return await self.post(url, {**hidden_fields(page), **fields}, stop_before=stop_before)

    async def post(self, url: str, fields: dict[str, str], *, stop_before: str = "\0") -> httpx2.Response:
        """Send a form that need not be on any page."""
        return await self._follow(await self._http.post(url, data=fields), stop_before)

    async def sign_in(self, page: httpx2.Response, name: str, *, stop_before: str = "\0") -> httpx2.Response:
        """Go through the pages of the OpenID provider: its sign-in form, and its own question."""
        question = await self.send(page, {"login": name, "password": "any will do"}, stop_before=stop_before)
        return await self.send(question, {}, stop_before=stop_before)

    def set_cookie(self, name: str, value: str) -> None:
        """Replace a cookie."""
        self._http.cookies.delete(name)
        self._http.cookies.set(name, value, domain="127.0.0.1", path="/")

    async def _follow(self, response: httpx2.Response, stop_before: str) -> httpx2.Response:
        for _ in range(HOPS):
            self.visited.append(str(response.url))
            if not response.is_redirect:
                return response
            target = urljoin(str(response.url), response.headers["location"])
            if target.startswith(stop_before) or not target.startswith(self._servers):
                return response
            response = await self._http.get(target)
        raise AssertionError(f"more than {HOPS} redirects: {self.visited[-HOPS:]}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._http.aclose()


def hidden_fields(page: httpx2.Response) -> dict[str, str]:
    """What the form of a page sends without anyone having typed it."""
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page.text)
    return {name: html.unescape(value) for name, value in found}
