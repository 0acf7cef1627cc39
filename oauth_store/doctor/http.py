"""The doctor's HTTP client: one host, no redirects, and a limit to the time and size of a response."""

import asyncio
import re
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import httpx2

from oauth_store.doctor.finding import Finding, problem

TIMEOUT_SECONDS = 10
BODY_BYTES = 64 * 1024
"""Maximum bytes to read of a response; those of `oauth_store` have a few hundred."""


class Asker:
    """Sends requests to the host of one URL, and to no other."""

    def __init__(self, url: str) -> None:
        self.origin = origin(url)
        self._runner = asyncio.Runner()
        # no timeouts of its own: each covers one read, and a server may send a byte a second
        self._http = httpx2.AsyncClient(timeout=None, headers={"User-Agent": "oauth-store doctor"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def ask(self, method: str, url: str, **request: Any) -> "Answer | Finding":
        """Return the response of a URL on this host within `TIMEOUT_SECONDS`, or the problem that there is none."""
        if origin(url) != self.origin:
            raise ValueError(f"{url} is on another host than {self.origin}")
        headers = {"Accept": "application/json, text/event-stream", **request.pop("headers", {})}
        try:
            return self._runner.run(self._ask(method, url, headers=headers, **request))
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
            return _unreachable(url, error)

    async def _ask(self, method: str, url: str, **request: Any) -> "Answer":
        deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
        async with asyncio.timeout_at(deadline):
            response = await self._http.send(self._http.build_request(method, url, **request), stream=True)
        body = b""
        try:
            async with asyncio.timeout_at(deadline):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > BODY_BYTES:
                        break
        except TimeoutError:  # an event stream may never end
            pass
        finally:
            await response.aclose()
        return Answer(response, body[:BODY_BYTES])


class Answer:
    """A response. Redirects are never followed."""

    def __init__(self, response: httpx2.Response, body: bytes) -> None:
        self.url = str(response.url)
        self.status = response.status_code
        self.headers = response.headers
        self.body = body

    @property
    def is_html(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/html") or self.body.lstrip()[:1] == b"<"

    @property
    def location(self) -> str:
        """The target of a redirect, without its query, which may hold a secret."""
        return urlsplit(urljoin(self.url, self.headers.get("location", "")))._replace(query="", fragment="").geturl()

    @property
    def what(self) -> str:
        """The response in a few words."""
        if 300 <= self.status < 400:
            return f"a redirect ({self.status}) to {self.location}"
        return f"{self.status}{' with an HTML page' if self.is_html else ''}"


def origin(url: str) -> str:
    try:
        parsed = urlsplit(url)
        port = parsed.port or {"https": 443, "http": 80}.get(parsed.scheme)
    except ValueError:
        return ""
    host = f"[{parsed.hostname}]" if ":" in (parsed.hostname or "") else parsed.hostname
    default = (parsed.scheme, port) in (("https", 443), ("http", 80))
    return f"{parsed.scheme}://{host}" + ("" if default else f":{port}")


def parameter(answer: Answer, name: str) -> str | None:
    """Return a parameter of the challenge (RFC 9110, section 11.6.1)."""
    found = re.search(rf'[ ,]{name}="([^"]*)"', answer.headers.get("www-authenticate", ""))
    return found[1] if found else None


def _unreachable(url: str, error: Exception) -> Finding:
    if isinstance(error, TimeoutError):
        found = f"{urlsplit(url).hostname}: no complete response after {TIMEOUT_SECONDS} s"
        return problem("connection", found, "does a firewall drop the request, or does the server hang?")
    text = str(error) or type(error).__name__
    found = f"{urlsplit(url).hostname}: {text}"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return problem(
            "https", found, "get a certificate that clients accept, for this host name (Caddy does this automatically)"
        )
    if "SSL" in text or "TLS" in text:
        return problem("https", found, "does this port serve plain http?")
    if isinstance(error, httpx2.ConnectError):
        return problem("connection", found, "is the host name right, the server up, and the port open to clients?")
    return problem("connection", found, "check that this port serves HTTP, and that nothing cuts the connection")
