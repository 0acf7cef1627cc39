"""One authorization server and the MCP servers whose tokens it issues: on its database, or elsewhere."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
from fastmcp import FastMCP
from fastmcp.server.auth import AuthProvider, RemoteAuthProvider
from fastmcp.server.auth.providers.introspection import IntrospectionTokenVerifier
from fastmcp.server.dependencies import get_access_token
from mcp.shared.auth import OAuthToken
from pydantic import AnyHttpUrl

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider, StoreResource
from oauth_store.flows.clients import OwnersClient
from oauth_store.flows.connected import INTROSPECTION
from oauth_store.flows.registration import add_client
from tests.serving import free_port, serving
from tests.steps import Provider, authorization_params, new_client, query_of, redeem

AUTH, WIKI, FILES = "https://auth.example.com", "https://wiki.example.com/mcp", "https://files.example.com/mcp"
SECRET = "the-secret-of-the-notes"


def family_of(
    make_provider: Provider, database: str, **settings: Any
) -> tuple[SQLAlchemyOAuthProvider, dict[str, StoreResource]]:
    """A provider for two other servers, and these, on its database."""
    provider = make_provider(base_url=AUTH, resources=[WIKI, FILES], **settings)
    return provider, {url: resource_on(database, url) for url in (WIKI, FILES)}


def resource_on(database: str, url: str) -> StoreResource:
    """A server on a database."""
    resource = StoreResource(database, authorization_server=AUTH, base_url=url.removesuffix("/mcp"))
    resource.set_mcp_path("/mcp")
    return resource


async def token_for(provider: SQLAlchemyOAuthProvider, resource: str | None, **metadata: Any) -> OAuthToken:
    """The tokens of a new client for a resource."""
    client = new_client(**metadata)
    await provider.register_client(client)
    url = await provider.authorize(client, authorization_params(resource=resource))
    return await redeem(provider, client, query_of(url)["code"])


def asking(resource: str, client_id: str = "notes") -> OwnersClient:
    """A server that asks about tokens, as `oauth-store clients add --introspects` adds it."""
    return OwnersClient.model_validate(
        {
            "client_id": client_id,
            "client_secret": SECRET,
            "client_name": "Notes",
            "token_endpoint_auth_method": "client_secret_basic",
            "grant_types": [INTROSPECTION],
            "response_types": [],
            "introspects": resource,
        }
    )


def mcp_server(name: str, auth: AuthProvider) -> FastMCP[None]:
    """A server that says what it is called, and who asks."""
    mcp: FastMCP[None] = FastMCP(name, auth=auth)

    @mcp.tool
    def whoami() -> str:
        token = get_access_token()
        return json.dumps([name, token.subject if token else None])

    return mcp


class Family:
    """Four servers on four ports."""

    def __init__(self, ports: list[int]) -> None:
        auth, *others = (f"http://127.0.0.1:{port}" for port in ports)
        self.auth = auth
        self.ports = ports
        self.others = dict(zip(("wiki", "files", "notes"), others, strict=True))

    @classmethod
    def anywhere(cls) -> "Family":
        return cls([free_port() for _ in range(4)])

    @property
    def endpoints(self) -> dict[str, str]:
        """The MCP endpoints of the three that are no authorization server."""
        return {name: f"{url}/mcp" for name, url in self.others.items()}

    def provider(self, database: str | None = None, **settings: Any) -> SQLAlchemyOAuthProvider:
        """The authorization server."""
        options = {"approval": AutoApproval(), **settings}
        return SQLAlchemyOAuthProvider(database, base_url=self.auth, resources=[*self.endpoints.values()], **options)

    def protection(self, name: str, database: str | None = None) -> AuthProvider:
        """What protects one of the others: two share the database, and the third one asks."""
        if name != "notes":
            return StoreResource(database, authorization_server=self.auth, base_url=self.others[name])
        verifier = IntrospectionTokenVerifier(
            introspection_url=f"{self.auth}/introspect", client_id="notes", client_secret=SECRET
        )
        return RemoteAuthProvider(verifier, [AnyHttpUrl(self.auth)], base_url=self.others[name])


@asynccontextmanager
async def served_family(database: str, **settings: Any) -> AsyncIterator[tuple[Family, SQLAlchemyOAuthProvider]]:
    """Four servers in this process."""
    family = Family.anywhere()
    provider = family.provider(database, **settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(provider)
        app = mcp_server("auth", provider).http_app(stateless_http=True)
        await stack.enter_async_context(serving(app, family.ports[0]))
        await provider.issuer.store.write(add_client, asking(family.endpoints["notes"]))
        for port, name in zip(family.ports[1:], family.others, strict=True):
            auth = family.protection(name, database)
            if isinstance(auth, StoreResource):
                await stack.enter_async_context(auth)
            await stack.enter_async_context(serving(mcp_server(name, auth).http_app(stateless_http=True), port))
        yield family, provider


async def called(url: str, token: str | None) -> int:
    """The status of a call of an MCP endpoint."""
    headers = {"accept": "application/json, text/event-stream"}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    async with httpx2.AsyncClient(timeout=60) as http:
        answer = await http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "ping"}, headers=headers)
    return answer.status_code
