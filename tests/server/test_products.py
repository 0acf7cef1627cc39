"""The requests of agent products, replayed as they were recorded: see tests/products.py."""

from typing import Any

import httpx2
import pytest

from tests.clients.apps import ANSWER
from tests.deployments import discover
from tests.documents import DocumentHost
from tests.endpoints import Server, running
from tests.products import PRODUCTS, Product, fresh, sent
from tests.serving import free_port
from tests.steps import challenge_of, query_of

BROWSER = {"user-agent": "Mozilla/5.0 (X11; Linux x86_64)", "accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
TOOL_CALL = {"method": "tools/call", "params": {"name": "read_page", "arguments": {"title": "Home"}}}

WAYS = [
    pytest.param(product, by_document, id=f"{product}, {'document' if by_document else 'registration'}")
    for product in PRODUCTS
    for by_document in ((True, False) if product.document else (False,))
]


class Replay:
    """A product at a server, with what it has stored. It sends the headers of the recording and no others."""

    def __init__(self, product: Product, server: Server, metadata: dict[str, Any], scope: str) -> None:
        self.product = product
        self.server = server
        self.metadata = metadata
        self.url = server.resource
        self.scope = scope
        self.callback = product.callback_at(free_port())
        self.client: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}

    async def send(self, method: str, url: str, accept: str | None, **options: Any) -> httpx2.Response:
        """The answer to a request of the product."""
        headers = options.pop("headers", {}) | {"accept": accept, "user-agent": self.product.agent}
        named = {name: value for name, value in headers.items() if value is not None}
        return await self.server.http.send(httpx2.Request(method, url, headers=named, **options))

    async def register(self) -> None:
        """Register, and keep what the product reads of the answer."""
        body = {
            **self.product.registered,
            "redirect_uris": [self.callback],
            "grant_types": list(self.product.grants),
            **sent(self.product.registration, {"scope": self.scope}),
        }
        answer = await self.send("POST", self.metadata["registration_endpoint"], self.product.accept[0], json=body)
        assert answer.status_code == 201, answer.text
        self.client = answer.json()
        assert self.client.items() >= {name: value for name, value in body.items() if value}.items()
        assert ("client_secret" in self.client) == (self.client["token_endpoint_auth_method"] != "none")

    async def authorize(self) -> None:
        """Take the owner through the authorization, and exchange the code."""
        state, verifier = fresh(self.product.state_length), fresh(self.product.verifier_length)
        values = {
            "response_type": "code",
            "client_id": self.client["client_id"],
            "code_challenge": challenge_of(verifier),
            "code_challenge_method": "S256",
            "redirect_uri": self.callback,
            "state": state,
            "scope": self.scope,
            "resource": self.url,
        }
        query = sent(self.product.authorization, values)
        endpoint = self.metadata["authorization_endpoint"]
        answer = await self.server.http.get(endpoint, params=query, headers=BROWSER)
        assert answer.status_code == 302, answer.text
        location = answer.headers["location"]
        assert location.startswith(f"{self.callback}?")
        returned = query_of(location)
        assert (returned["state"], returned["iss"]) == (state, self.metadata["issuer"])
        self.take(await self.token(self.product.exchange, code=returned["code"], code_verifier=verifier))

    async def token(self, names: str, **values: str) -> httpx2.Response:
        """The answer to a form at /token."""
        given = {
            "grant_type": "authorization_code" if "code" in values else "refresh_token",
            "client_id": self.client["client_id"],
            "client_secret": self.client.get("client_secret", ""),
            "redirect_uri": self.callback,
            "scope": self.scope,
            "resource": self.url,
        }
        return await self.send(
            "POST",
            self.metadata["token_endpoint"],
            self.product.accept[1],
            data=sent(names, given | values),
            headers={"content-type": self.product.form_type},
        )

    async def refresh(self) -> httpx2.Response:
        """The answer to a refresh."""
        assert self.product.refresh is not None
        return await self.token(self.product.refresh, refresh_token=self.tokens["refresh_token"])

    def take(self, answer: httpx2.Response) -> None:
        """Keep the tokens of an answer, which are new, and all that the product asked for."""
        assert answer.status_code == 200, answer.text
        tokens = answer.json()
        assert (tokens["token_type"], tokens["expires_in"]) == ("Bearer", 3600)
        assert (tokens.get("scope") or "") == self.scope
        assert ("refresh_token" in tokens) == ("refresh_token" in self.product.grants)
        for name in ("access_token", "refresh_token"):
            assert name not in tokens or tokens[name] != self.tokens.get(name)
        self.tokens = tokens

    async def call(self, message: dict[str, Any], **headers: str) -> httpx2.Response:
        """The answer to a message at the MCP endpoint."""
        return await self.send(
            "POST",
            self.url,
            self.product.accept[2],
            json={"jsonrpc": "2.0", "id": 1, **message},
            headers=headers | {"authorization": f"Bearer {self.tokens['access_token']}"},
        )

    async def works(self) -> None:
        """Open a session with the product's first message, and call a tool."""
        opened = await self.call(self.product.opening, **self.product.headers)
        assert opened.status_code == 200, opened.text
        assert "capabilities" in opened.text
        assert ANSWER in (await self.call(TOOL_CALL)).text

    async def is_refused(self) -> None:
        """Read the challenge of the MCP endpoint, and have the refresh refused, on which products ask anew."""
        answer = await self.call(self.product.opening, **self.product.headers)
        assert answer.status_code == 401
        assert "/.well-known/oauth-protected-resource/mcp" in answer.headers["www-authenticate"]
        if self.product.refresh is not None:
            refused = await self.refresh()
            assert (refused.status_code, refused.json()["error"]) == (401, "invalid_grant")


async def arriving(product: Product, server: Server, host: DocumentHost | None, scope: str = "") -> Replay:
    """A product that has found the server, and has registered there, or whose document is served by this host."""
    metadata = await discover(server.http, str(server.http.base_url.join("/mcp")))
    assert metadata["code_challenge_methods_supported"] == ["S256"]
    replay = Replay(product, server, metadata, scope)
    if host is None:
        await replay.register()
        return replay
    assert metadata["client_id_metadata_document_supported"] is True
    portless = product.callback.replace(":*", "")
    host.describe(**product.registered, redirect_uris=[portless], grant_types=list(product.grants))
    replay.client = {"client_id": host.client_id}
    return replay


@pytest.mark.parametrize("scope", ["", "wiki:read wiki:write"], ids=["without scopes", "with required scopes"])
@pytest.mark.parametrize(("product", "by_document"), WAYS)
async def test_a_product_gets_in_and_stays_in(
    product: Product, by_document: bool, scope: str, host: DocumentHost, database_url: str
) -> None:
    """It registers, is authorized, calls a tool and refreshes; revoked, it is refused and then let in as the same."""
    async with running(database_url, required_scopes=scope.split()) as server:
        replay = await arriving(product, server, host if by_document else None, scope)
        await replay.authorize()
        await replay.works()
        if product.refresh is not None:
            replay.take(await replay.refresh())
            await replay.works()

        token = await server.provider.load_access_token(replay.tokens["access_token"])
        assert token is not None
        await server.provider.revoke_token(token)
        await replay.is_refused()
        if by_document:
            replay.callback = product.callback_at(free_port())
        await replay.authorize()
        await replay.works()


@pytest.mark.parametrize("product", [product for product in PRODUCTS if product.name == "mcporter"], ids=str)
async def test_a_new_registration_cannot_use_the_old_refresh_token(server: Server, product: Product) -> None:
    """mcporter, at another port, presents its token as another client: it is refused, and nothing is revoked."""
    replay = await arriving(product, server, None)
    await replay.authorize()
    first = replay.client
    replay.callback = product.callback_at(free_port())
    await replay.register()
    refused = await replay.refresh()
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_grant")
    await replay.works()
    replay.client = first
    replay.take(await replay.refresh())


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("product", [product for product in PRODUCTS if product.probes], ids=str)
async def test_a_probe_without_a_token_is_challenged(server: Server, product: Product, method: str) -> None:
    """A product that asks whether it needs a token reads in the challenge where to get one."""
    replay = Replay(product, server, {}, "")
    answer = await replay.send(method, replay.url, product.accept[2])
    assert answer.status_code == 401
    assert "/.well-known/oauth-protected-resource/mcp" in answer.headers["www-authenticate"]
