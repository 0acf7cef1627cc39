"""Used assertions as rows: what leaves one, and what counts them."""

import base64
import json
from typing import Any

import httpx2
import pytest

from oauth_store.database.models import ASSERTION
from oauth_store.flows.registered import registered_clients
from tests.assertions import Signer, asserting, claims_of
from tests.databases import tokens_of
from tests.documents import DocumentHost
from tests.endpoints import Server, running


class App:
    """A client with a document and a key in it."""

    def __init__(self, server: Server, host: DocumentHost) -> None:
        self.server = server
        self.client_id = host.client_id
        self._signer = Signer()
        host.describe(token_endpoint_auth_method="private_key_jwt", jwks={"keys": [self._signer.public]})

    def form(self, **claims: Any) -> dict[str, str]:
        """Its name, and a good assertion with these changes."""
        url = str(self.server.http.base_url.join("/token"))
        return {"client_id": self.client_id, **asserting(self._signer.sign(claims_of(self.client_id, url, **claims)))}

    async def revoke(self, token: str, form: dict[str, str]) -> httpx2.Response:
        """The response of /revoke."""
        return await self.server.http.post("/revoke", data={"token": token, **form})

    async def rows(self) -> int:
        """How many used assertions are stored."""
        return sum(row.kind == ASSERTION for row in await tokens_of(self.server.provider))


class TestRows:
    """Each is a row of `oauth_tokens` until it expires."""

    async def test_revocations_of_nothing(self, database_url: str, host: DocumentHost) -> None:
        """Anyone may send them: they leave no row. A used assertion is refused there too."""
        async with running(database_url) as server:
            app = App(server, host)
            tokens = (await server.exchange(app.client_id, app.form())).json()
            for _ in range(5):
                assert (await app.revoke("unknown", app.form())).status_code == 200
            assert await app.rows() == 1
            used = app.form()
            assert (await app.revoke(tokens["refresh_token"], used)).status_code == 200
            assert await app.rows() == 2
            for token in ("unknown", tokens["refresh_token"]):
                assert (await app.revoke(token, used)).status_code == 401

    async def test_they_are_no_grants(self, database_url: str, host: DocumentHost) -> None:
        """A client with one grant and three used assertions has one grant."""
        async with running(database_url) as server:
            app = App(server, host)
            tokens = (await server.exchange(app.client_id, app.form())).json()
            for _ in range(2):
                form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"], **app.form()}
                tokens = (await server.http.post("/token", data=form)).json()
            assert await app.rows() == 3
            [client], _ = await server.provider._store.read(registered_clients, None)
            assert (client.live_grants, client.confidential) == (1, True)


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"exp": 10**10}, "valid for more than 300 seconds"),
        ({"iat": 10**10, "exp": 10**10 + 60}, "iat of client_assertion is in the future"),
    ],
)
async def test_what_is_wrong_is_said(host: DocumentHost, claims: dict[str, int], said: str) -> None:
    """A wrong time is named, and no key is fetched for it."""
    async with running() as server:
        app = App(server, host)
        await server.code(app.client_id)
        before = len(host.requests)
        answer = await app.revoke("unknown", app.form(**claims))
        assert (answer.status_code, said in answer.text) == (401, True), answer.text
        assert len(host.requests) == before


async def test_a_header_that_is_nested_deeply(host: DocumentHost) -> None:
    """It is refused, wherever the recursion ends that reads it."""
    async with running() as server:
        app = App(server, host)
        await server.code(app.client_id)
        for depth in range(700, 1000, 4):
            nested = "[" * depth + "]" * depth
            claims = claims_of(app.client_id, str(server.http.base_url.join("/token")))
            text = ".".join(map(_encoded, (f'{{"alg": "ES256", "x": {nested}}}', json.dumps(claims), "signature")))
            form = {"client_id": app.client_id, "token": "x", **asserting(text)}
            assert (await server.http.post("/revoke", data=form)).status_code == 401


def _encoded(text: str) -> str:

    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
