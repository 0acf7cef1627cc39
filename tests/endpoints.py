"""A real server on a port, and the requests that clients send to its routes."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from tests.deployments import wiki
from tests.serving import free_port, serving
from tests.steps import REDIRECT_URI, authorization_request, pkce, query_of, token_request


class Server:
    """A running server and an HTTP client for it."""

    def __init__(self, http: httpx2.AsyncClient, provider: SQLAlchemyOAuthProvider) -> None:
        self.http = http
        self.provider = provider

    @property
    def resource(self) -> str:
        """The URL of the MCP endpoint."""
        return str(self.http.base_url.join("/mcp"))

    async def register(self, **metadata: Any) -> dict[str, Any]:
        """Register a client, and return the answer."""
        values = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none", "client_name": "Test"}
        answer = await self.http.post("/register", json=values | metadata)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def code(self, client_id: str, **params: str) -> tuple[str, str]:
        """Take a client through /authorize, and return its code and code verifier."""
        verifier, challenge = pkce()
        request = authorization_request(client_id, code_challenge=challenge, **params)
        answer = await self.http.get("/authorize", params=request)
        assert answer.status_code == 302, answer.text
        return query_of(answer.headers["location"])["code"], verifier

    async def exchange(
        self, for_client: str, form: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        """Exchange a fresh code of a client at /token, authenticated by `form` or `headers`."""
        code, verifier = await self.code(for_client)
        return await self.http.post("/token", data=token_request(code, verifier, **(form or {})), headers=headers)

    async def tokens(self, client_id: str) -> dict[str, Any]:
        """The tokens of a public client."""
        answer = await self.exchange(client_id, {"client_id": client_id})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def mcp(self, access_token: str | None) -> httpx2.Response:
        """A call of the MCP endpoint."""
        headers = {"accept": "application/json, text/event-stream"}
        if access_token:
            headers["authorization"] = f"Bearer {access_token}"
        return await self.http.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "ping"}, headers=headers)


def basic(client_id: str, secret: str) -> dict[str, str]:
    """The Authorization header of client_secret_basic (RFC 6749, section 2.3.1)."""
    credentials = f"{quote(client_id, safe='')}:{quote(secret, safe='')}"
    return {"Authorization": "Basic " + base64.b64encode(credentials.encode()).decode()}


@asynccontextmanager
async def running(
    database: str = ":memory:", kind: type[SQLAlchemyOAuthProvider] = SQLAlchemyOAuthProvider, **settings: Any
) -> AsyncIterator[Server]:
    """A server whose provider is of this kind, and has these settings."""
    port = free_port()
    defaults: dict[str, Any] = {"base_url": f"http://127.0.0.1:{port}", "approval": AutoApproval()}
    async with (
        kind(database, **defaults | settings) as provider,
        serving(wiki(provider).http_app(stateless_http=True), port) as url,
        httpx2.AsyncClient(base_url=url) as http,
    ):
        yield Server(http, provider)
