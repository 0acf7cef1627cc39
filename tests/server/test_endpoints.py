"""The routes, over HTTP: a real server on a port, and requests as clients send them."""

import time
from collections.abc import AsyncIterator

import pytest

from oauth_store.flows.clients import Standing, StoredClient
from tests.endpoints import Server, basic, running
from tests.steps import REDIRECT_URI, authorization_request, new_client, pkce, token_request


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server on each kind of database."""
    async with running(database_url) as server:
        yield server


class TestClientAuthentication:
    """How a client authenticates at /token and /revoke (RFC 6749, section 2.3)."""

    async def test_a_public_client_needs_no_secret(self, server: Server) -> None:
        """A client of the method none gets its tokens by client_id and PKCE."""
        client = await server.register()
        assert "client_secret" not in client
        assert (await server.tokens(client["client_id"]))["access_token"]

    async def test_client_secret_post(self, server: Server) -> None:
        """A secret in the body lets its client in."""
        client = await server.register(token_endpoint_auth_method="client_secret_post")
        answer = await server.exchange(
            client["client_id"], {key: client[key] for key in ("client_id", "client_secret")}
        )
        assert answer.status_code == 200

    async def test_client_secret_basic_without_client_id_in_the_body(self, server: Server) -> None:
        """A secret in the Authorization header lets its client in, as both TypeScript SDKs send it."""
        client = await server.register(token_endpoint_auth_method="client_secret_basic")
        answer = await server.exchange(client["client_id"], headers=basic(client["client_id"], client["client_secret"]))
        assert answer.status_code == 200, answer.text
        refreshed = await server.http.post(
            "/token",
            data={"grant_type": "refresh_token", "refresh_token": answer.json()["refresh_token"]},
            headers=basic(client["client_id"], client["client_secret"]),
        )
        assert refreshed.status_code == 200, refreshed.text

    @pytest.mark.parametrize("method", ["client_secret_post", "client_secret_basic"])
    async def test_a_wrong_or_missing_secret_is_invalid_client(self, server: Server, method: str) -> None:
        """A confidential client without its secret gets 401 invalid_client, and its code is not used up."""
        client = await server.register(token_endpoint_auth_method=method)
        client_id, secret = client["client_id"], client["client_secret"]
        code, verifier = await server.code(client_id)
        form = token_request(code, verifier)
        for attempt, headers in (
            (form | {"client_id": client_id}, None),
            (form | {"client_id": client_id, "client_secret": "wrong"}, None),
            (form | {"client_id": client_id, "client_secret": ""}, None),
            (form, basic(client_id, "wrong")),
            (form, basic(client_id, "")),
            (form, {"Authorization": "Basic nonsense"}),
            (form | {"client_id": "somebody-else"}, basic(client_id, secret)),
            (form | {"client_id": client_id, "client_secret": secret}, basic(client_id, secret)),
        ):
            answer = await server.http.post("/token", data=attempt, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            assert secret not in answer.text
            assert ("www-authenticate" in answer.headers) == (headers is not None)
        answer = await server.http.post("/token", data=form | {"client_id": client_id, "client_secret": secret})
        assert answer.status_code == 200

    async def test_an_unknown_client_is_invalid_client(self, server: Server) -> None:
        """A client that is not registered gets 401 invalid_client, on which clients register anew."""
        for path in ("/token", "/revoke"):
            form = {"client_id": "nobody", "grant_type": "refresh_token", "refresh_token": "x", "token": "x"}
            answer = await server.http.post(path, data=form)
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")

    @pytest.mark.parametrize(("expires_in", "accepted"), [(None, True), (60, True), (-1, False)])
    async def test_a_secret_is_good_until_it_expires(
        self, server: Server, expires_in: int | None, accepted: bool
    ) -> None:
        """A secret that has expired is invalid_client at both endpoints; 0 is never (RFC 7591, section 3.2.1)."""
        client = new_client(
            client_secret="s3cret",
            client_secret_expires_at=0 if expires_in is None else int(time.time()) + expires_in,
            token_endpoint_auth_method="client_secret_post",
        )
        await server.provider.register_client(client)
        credentials = {"client_id": client.client_id, "client_secret": "s3cret"}
        exchanged = await server.exchange(client.client_id, credentials)
        revoked = await server.http.post("/revoke", data=credentials | {"token": "nonsense"})
        assert [exchanged.status_code, revoked.status_code] == [200 if accepted else 401] * 2
        assert accepted or exchanged.json()["error"] == revoked.json()["error"] == "invalid_client"

    async def test_a_secret_that_this_server_has_lost(self, server: Server) -> None:
        """A confidential client of whose secret nothing is stored does not get in without one."""
        client = new_client(token_endpoint_auth_method="client_secret_post")
        await server.provider.register_client(client)
        for secret in ({}, {"client_secret": "any"}):
            answer = await server.exchange(client.client_id, {"client_id": client.client_id, **secret})
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


class TestToken:
    """The token endpoint."""

    async def test_pkce_is_verified(self, server: Server) -> None:
        """A wrong code_verifier gets invalid_grant, and does not use the code up."""
        client_id = (await server.register())["client_id"]
        code, verifier = await server.code(client_id)
        form = token_request(code, verifier, client_id=client_id)
        wrong = await server.http.post("/token", data=form | {"code_verifier": pkce()[0]})
        assert wrong.json()["error"] == "invalid_grant"
        right = await server.http.post("/token", data=form)
        assert right.status_code == 200

    async def test_a_replay_without_pkce_ends_nothing(self, server: Server) -> None:
        """Who holds an old code, but not its verifier, cannot sign the owner out; who holds both can."""
        client_id = (await server.register())["client_id"]
        code, verifier = await server.code(client_id)
        form = token_request(code, verifier, client_id=client_id)
        token = (await server.http.post("/token", data=form)).json()
        replay = await server.http.post("/token", data=form | {"code_verifier": pkce()[0]})
        assert replay.json()["error"] == "invalid_grant"
        assert (await server.mcp(token["access_token"])).status_code != 401
        replay = await server.http.post("/token", data=form)
        assert replay.json()["error"] == "invalid_grant"
        assert (await server.mcp(token["access_token"])).status_code == 401

    async def test_a_scope_of_a_refresh_may_have_any_white_space(self, server: Server) -> None:
        """Claude sends a leading space: it is no scope."""
        client_id = (await server.register(scope="read"))["client_id"]
        token = await server.tokens(client_id)
        answer = await server.http.post(
            "/token",
            data={
                "grant_type": "refresh_token",
                "client_id": client_id,
                "refresh_token": token["refresh_token"],
                "scope": " read ",
            },
        )
        assert answer.status_code == 200, answer.text

    async def test_a_body_of_six_megabytes_is_refused(self, server: Server) -> None:
        """A body over the SDK's limit is 413, on every route that takes one."""
        for path in ("/token", "/revoke", "/register", "/authorize"):
            answer = await server.http.post(path, content=b"a=" + b"x" * 6 * 2**20)
            assert answer.status_code == 413, path


class TestRevoke:
    """The revocation endpoint (RFC 7009)."""

    @pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
    @pytest.mark.parametrize("hint", [None, "access_token", "refresh_token", "something_else"])
    async def test_a_public_client_revokes(self, server: Server, kind: str, hint: str | None) -> None:
        """A public client gets 200 whatever the hint, and both of its tokens are dead."""
        client_id = (await server.register())["client_id"]
        token = await server.tokens(client_id)
        form = {"client_id": client_id, "token": token[kind]} | ({"token_type_hint": hint} if hint else {})
        answer = await server.http.post("/revoke", data=form)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["cache-control"] == "no-store"
        assert (await server.mcp(token["access_token"])).status_code == 401
        refused = await server.http.post(
            "/token",
            data={"grant_type": "refresh_token", "client_id": client_id, "refresh_token": token["refresh_token"]},
        )
        assert refused.json()["error"] == "invalid_grant"

    async def test_a_confidential_client_revokes_with_basic(self, server: Server) -> None:
        """A confidential client that authenticates in the header gets 200 too."""
        client = await server.register(token_endpoint_auth_method="client_secret_basic")
        headers = basic(client["client_id"], client["client_secret"])
        token = (await server.exchange(client["client_id"], headers=headers)).json()
        answer = await server.http.post("/revoke", data={"token": token["refresh_token"]}, headers=headers)
        assert answer.status_code == 200
        assert (await server.mcp(token["access_token"])).status_code == 401

    async def test_a_confidential_client_revokes_nothing_without_its_secret(self, server: Server) -> None:
        """Who knows a confidential client's token and id, but not its secret, gets 401, and the token stays."""
        client = await server.register(token_endpoint_auth_method="client_secret_post")
        credentials = {key: client[key] for key in ("client_id", "client_secret")}
        token = (await server.exchange(client["client_id"], credentials)).json()
        for secret in ({}, {"client_secret": "wrong"}):
            form = {"client_id": client["client_id"], "token": token["access_token"], **secret}
            answer = await server.http.post("/revoke", data=form)
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert (await server.mcp(token["access_token"])).status_code != 401

    async def test_an_unknown_token_is_revoked_already(self, server: Server) -> None:
        """A token that does not exist gets 200."""
        client_id = (await server.register())["client_id"]
        answer = await server.http.post("/revoke", data={"client_id": client_id, "token": "nonsense"})
        assert answer.status_code == 200

    async def test_another_clients_token_stays(self, server: Server) -> None:
        """A client cannot revoke what is not its own."""
        mine, other = [(await server.register())["client_id"] for _ in range(2)]
        token = await server.tokens(mine)
        for presented in (token["access_token"], token["refresh_token"]):
            answer = await server.http.post("/revoke", data={"client_id": other, "token": presented})
            assert answer.status_code == 200
        assert (await server.mcp(token["access_token"])).status_code != 401

    async def test_a_missing_token_is_invalid_request(self, server: Server) -> None:
        """A request without a token is 400 invalid_request."""
        client_id = (await server.register())["client_id"]
        answer = await server.http.post("/revoke", data={"client_id": client_id})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_browser_client_may_call_the_token_routes(server: Server) -> None:
    """CORS lets pages of other origins, such as MCP Inspector, register, get tokens and revoke; never authorize."""
    preflight = {"Origin": "https://inspector.example", "Access-Control-Request-Method": "POST"}
    for path in ("/register", "/token", "/revoke"):
        answer = await server.http.options(path, headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*"), path
    assert "access-control-allow-origin" not in (await server.http.options("/authorize", headers=preflight)).headers


async def test_the_mcp_endpoint_wants_a_token(server: Server) -> None:
    """Without a token, or with a wrong one, it is 401 with a challenge that leads to the metadata."""
    for token in (None, "access_nonsense"):
        answer = await server.mcp(token)
        assert answer.status_code == 401
        assert "/.well-known/oauth-protected-resource/mcp" in answer.headers["www-authenticate"]


class TestSmallCosts:
    """What anyone may send is bounded before it is read."""

    @pytest.mark.parametrize("path", ["/register", "/authorize", "/token", "/revoke"])
    async def test_a_body_is_64_kib_at_most(self, server: Server, path: str) -> None:
        """A longer one is 413, on every route that takes one."""
        assert (await server.http.post(path, content=b"a=" + b"x" * 64 * 2**10)).status_code == 413

    @pytest.mark.parametrize("client_id", ["x" * 20_000, "x\nINFO approval granted", "x\x1b[2K"])
    async def test_a_client_id_that_can_be_none_is_not_logged(
        self, server: Server, client_id: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is refused before FastMCP's handler, whose log would repeat it, and take seconds to color a long one."""
        caplog.set_level("DEBUG")
        for page in (False, True):
            headers = {"accept": "text/html"} if page else {}
            answer = await server.http.get("/authorize", params=authorization_request(client_id), headers=headers)
            assert answer.status_code == 400
            assert ("not registered here" in answer.text) == page
            assert client_id not in answer.text
        ours = [record for record in caplog.records if not record.name.startswith(("httpx2", "httpcore2"))]
        assert not [record for record in ours if client_id in record.getMessage()]

    async def test_a_registration_is_bounded(self, server: Server) -> None:
        """A hundred scopes and fifty redirect URIs are enough."""
        for metadata, status in (
            ({"scope": " ".join(map(str, range(100)))}, 201),
            ({"scope": " ".join(map(str, range(101)))}, 400),
            ({"redirect_uris": [f"{REDIRECT_URI}/{number}" for number in range(50)]}, 201),
            ({"redirect_uris": [f"{REDIRECT_URI}/{number}" for number in range(51)]}, 400),
        ):
            values = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none", **metadata}
            assert (await server.http.post("/register", json=values)).status_code == status

    def test_scopes_are_looked_up_once(self) -> None:
        """Of a registration from before there was a bound, many scopes that are asked for cost no second."""
        scopes = " ".join(map(str, range(7_700)))
        metadata = new_client(scope=scopes).model_dump_json()
        client = StoredClient.load(metadata, Standing(limited=True))
        started = time.process_time()
        assert client.validate_scope(" ".join(f"unknown-{number}" for number in range(29_000)) + " 7") == ["7"]
        assert time.process_time() - started < 0.5
