"""Client ID metadata documents and key sets, served over HTTPS by a host of the tests, through FastMCP's own fetcher.

Only what the fetcher asks the world for is pointed at the test: the names' addresses, which addresses are public, and
which certificates to trust.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastmcp.server.auth import ssrf
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.serving import AUTHORITIES, HTTPServer, free_port
from tests.steps import REDIRECT_URI

HOSTNAME = "client.example"
REVALIDATE = {"cache-control": "no-cache"}


@dataclass
class Answer:
    """What the host answers."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class DocumentHost:
    """An HTTPS server at client.example that counts the requests it gets."""

    def __init__(self, certificate: Path, addresses: dict[str, list[str]], public: set[str]) -> None:
        self.port = free_port()
        self.name = f"{HOSTNAME}:{self.port}"
        self.client_id = f"https://{self.name}/client.json"
        self.addresses = addresses
        self.public = public
        self.requests: list[Request] = []
        self.answer = Answer(b"")
        self.keys_url = f"https://{self.name}/keys.json"
        self.keys = Answer(b"", 404)
        self._certificate = certificate
        self._server: HTTPServer | None = None
        self._task: asyncio.Task[None] | None = None
        self.describe()

    def describe(self, *, cache: dict[str, str] | None = None, **metadata: Any) -> None:
        """Serve a document with these changes to a good one. None leaves a field out."""
        document = {
            "client_id": self.client_id,
            "client_name": "Documented client",
            "redirect_uris": [REDIRECT_URI],
            "token_endpoint_auth_method": "none",
            "grant_types": ["authorization_code", "refresh_token"],
        }
        body = {key: value for key, value in (document | metadata).items() if value is not None}
        self.answer = Answer(json.dumps(body).encode(), headers=REVALIDATE if cache is None else cache)

    def publish(self, *keys: dict[str, Any], cache: dict[str, str] | None = None) -> None:
        """Serve a set of these keys at `keys_url`."""
        headers = {"cache-control": "max-age=3600"} if cache is None else cache
        self.keys = Answer(json.dumps({"keys": keys}).encode(), headers=headers)

    def fetches(self, url: str) -> int:
        """How often a URL was asked for."""
        return sum(str(request.url.path) == url.removeprefix(f"https://{self.name}") for request in self.requests)

    async def start(self) -> None:
        """Answer requests."""
        certificate = str(self._certificate)
        self._server = HTTPServer(
            self._respond,
            self.port,
            interface="asgi3",
            lifespan="off",
            ssl_certfile=certificate,
            ssl_keyfile=certificate,
        )
        self._task = await self._server.start()

    async def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None and self._task is not None:
            self._server.stop()
            await self._task
        self._server = self._task = None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.requests.append(request)
        answer = self.keys if request.url.path == "/keys.json" else self.answer
        etag = answer.headers.get("etag")
        if etag is not None and request.headers.get("if-none-match") == etag:
            answer = Answer(b"", 304, answer.headers)
        await Response(answer.body, answer.status, answer.headers)(scope, receive, send)


@asynccontextmanager
async def serving_documents(certificate: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[DocumentHost]:
    """A running host of documents that FastMCP's fetcher finds, trusts and takes for public."""
    host = DocumentHost(certificate, addresses={HOSTNAME: ["127.0.0.1"]}, public={"127.0.0.1"})
    is_ip_allowed = ssrf.is_ip_allowed

    async def resolve_hostname(hostname: str, port: int = 443) -> list[str]:
        if hostname not in host.addresses:
            raise ssrf.SSRFError(f"DNS resolution failed for {hostname}")
        return host.addresses[hostname]

    patch.setattr(ssrf, "resolve_hostname", resolve_hostname)
    patch.setattr(ssrf, "is_ip_allowed", lambda address: address in host.public or is_ip_allowed(address))
    patch.setenv(AUTHORITIES, str(certificate))
    await host.start()
    yield host
    await host.stop()
