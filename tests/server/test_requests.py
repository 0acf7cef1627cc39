"""What clients send that is odd but right, and what is wrong, at /register, /authorize, /token, /revoke and /mcp."""

import asyncio
import json
from typing import Any

import httpx2
import pytest
from mcp.server.auth.provider import AuthorizationParams, AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull

from oauth_store import RateLimits, SQLAlchemyOAuthProvider
from oauth_store.flows.clients import StoredClient
from tests.clocks import turned
from tests.endpoints import Server, running
from tests.steps import REDIRECT_URI, authorization_request, challenge_of, query_of, registration_options, token_request

PUBLIC: dict[str, Any] = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}
EVIL = "https://evil.example/callback"


def with_settings(**settings: Any) -> pytest.MarkDecorator:
    """Run a test on a server with these settings."""
    return pytest.mark.parametrize("server", [settings], indirect=True, ids=["server"])


FORM = "application/x-www-form-urlencoded"
UNREADABLE = '--x\r\nContent-Disposition: form-data; name="client_id"\r\n\r\n\\ud800\r\n--x--\r\n'


def mistaken(client_id: str, redirect_uri: str, params: dict[str, str]) -> dict[str, str]:
    """An authorization request with these mistakes, or one that lacks almost everything."""
    if not params:
        return {"client_id": client_id, "redirect_uri": redirect_uri}
    return authorization_request(client_id, redirect_uri=redirect_uri) | params


class TestRegistration:
    """Dynamic client registration (RFC 7591)."""

    async def test_null_is_left_out(self, server: Server) -> None:
        """A client that writes null for what it does not have registers as one that leaves it out."""
        odd = dict.fromkeys(("grant_types", "response_types", "application_type", "scope", "contacts", "jwks"))
        registered = (await server.http.post("/register", json=PUBLIC | odd)).json()
        plain = (await server.http.post("/register", json=PUBLIC)).json()
        for one in (registered, plain):
            del one["client_id"], one["client_id_issued_at"]
        assert registered == plain

    @with_settings(client_registration_options=registration_options("read", "write"))
    async def test_a_scope_that_does_not_exist_is_dropped(self, server: Server) -> None:
        """The answer says what was registered; where no scope exists, it is an error."""
        answer = await server.http.post("/register", json=PUBLIC | {"scope": "read profile offline_access"})
        assert (answer.status_code, answer.json()["scope"]) == (201, "read offline_access")
        answer = await server.http.post("/register", json=PUBLIC | {"scope": "profile"})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")

    @with_settings(rate_limits=RateLimits(registrations_per_address="1/hour"))
    async def test_only_what_leaves_a_row_counts(self, server: Server) -> None:
        """A page that posts texts, and a client that makes mistakes, use up nobody's allowance."""
        for _ in range(3):
            answer = await server.http.post("/register", json={"redirect_uris": []})
            assert answer.status_code == 400
            for headers in (
                {"content-type": "text/plain"},
                {"content-type": "application/x-www-form-urlencoded"},
                {"content-type": "application/json", "sec-fetch-mode": "no-cors"},
                {},
            ):
                answer = await server.http.post("/register", content=b'{"redirect_uris": ["x:/"]}', headers=headers)
                assert answer.status_code == 400
                assert "Content-Type: application/json" in answer.json()["error_description"]
        assert (await server.http.post("/register", json=PUBLIC)).status_code == 201
        assert (await server.http.post("/register", json=PUBLIC)).status_code == 429

    @pytest.mark.parametrize("metadata", [[], "text", 1, None, {"contacts": ["a"] * 101}, {"redirect_uris": [1] * 101}])
    async def test_what_is_too_much_is_a_short_error(self, server: Server, metadata: Any) -> None:
        """An error does not repeat what was sent."""
        values = PUBLIC | metadata if isinstance(metadata, dict) else metadata
        answer = await server.http.post("/register", json=values)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")
        answer = await server.http.post("/register", json=PUBLIC | {"contacts": [1] * 100})
        assert len(answer.text) < 500


class TestAuthorization:
    """/authorize (RFC 6749, section 4.1.1)."""

    async def ask(self, server: Server, *more: tuple[str, str], **params: str) -> Any:
        """Send an authorization request of a new client by GET and by POST. Return the answers, which are alike."""
        client = await server.register()
        pairs: Any = [*authorization_request(client["client_id"], **params).items(), *more]
        answers = [await server.http.get("/authorize", params=pairs)]
        data: dict[str, Any] = {}
        for name, value in pairs:
            data.setdefault(name, []).append(value)
        answers.append(await server.http.post("/authorize", data=data))
        assert answers[0].status_code == answers[1].status_code
        return answers[0]

    @pytest.mark.parametrize("name", ["resource", "redirect_uri", "code_challenge_method", "scope", "state"])
    async def test_an_empty_parameter_is_left_out(self, server: Server, name: str) -> None:
        """RFC 6749, section 3.1: it counts as one that was not sent."""
        answer = await self.ask(server, **{name: ""})
        assert "code" in query_of(answer.headers["location"])

    async def test_an_empty_challenge_is_missing(self, server: Server) -> None:
        """Nobody is asked for what can never be redeemed."""
        answer = await self.ask(server, code_challenge="")
        assert query_of(answer.headers["location"])["error"] == "invalid_request"

    @pytest.mark.parametrize("challenge", ["x", "x" * 42, "x" * 44, f"{'x' * 42}=", f"{'x' * 42}+", "x" * 128])
    async def test_a_challenge_is_one_of_s256(self, server: Server, challenge: str) -> None:
        """43 characters of base64url, which a SHA-256 has (RFC 7636, section 4.2)."""
        answer = await self.ask(server, code_challenge=challenge)
        assert query_of(answer.headers["location"])["error"] == "invalid_request"

    async def test_one_of_several_resources_will_do(self, server: Server) -> None:
        """RFC 8707, section 2: the server's own is among them, wherever it stands; else it is another's request."""
        for pairs in (
            [("resource", server.resource)],
            [("resource", server.resource), ("resource", "https://other.example")],
        ):
            answer = await self.ask(server, *pairs, resource="https://another.example")
            assert "code" in query_of(answer.headers["location"])
        answer = await self.ask(server, ("resource", "https://other.example"), resource="https://another.example")
        assert query_of(answer.headers["location"])["error"] == "invalid_target"

    async def test_a_parameter_with_two_values_is_refused(self, server: Server) -> None:
        """The same value twice is one; of two, nobody knows which was meant."""
        answer = await self.ask(server, ("state", "the-state"))
        assert "code" in query_of(answer.headers["location"])
        answer = await self.ask(server, ("redirect_uri", EVIL))
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        "params",
        [
            {"scope": " ".join(map(str, range(101)))},
            {"scope": "x" * 8193},
            {"redirect_uri": f"{REDIRECT_URI}/{'x' * 8192}"},
        ],
        ids=["scopes", "scope", "redirect_uri"],
    )
    async def test_nobody_asks_for_so_much(self, server: Server, params: dict[str, str]) -> None:
        """What is asked for is bounded before it is compared with anything."""
        answer = await self.ask(server, **params)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")

    async def test_scopes_that_do_not_exist(self, server: Server) -> None:
        """Asked for alone they are `invalid_scope`, for the client to read."""
        client = await server.register(scope="read")
        answer = await server.http.get("/authorize", params=authorization_request(client["client_id"], scope="write"))
        assert query_of(answer.headers["location"])["error"] == "invalid_scope"

    @pytest.mark.parametrize("params", [{}, {"response_type": "token"}, {"code_challenge": "x"}, {"scope": "nonsense"}])
    @pytest.mark.parametrize("uri", [EVIL, "com.example.app:/callback", "http://127.0.0.1:9000/callback"])
    async def test_an_error_leads_to_this_machine_alone(self, server: Server, params: dict[str, str], uri: str) -> None:
        """RFC 9700, section 4.11.2: elsewhere it is a page, before the owner ever let the client in, and after."""
        client = await server.register(redirect_uris=[uri], scope="read")
        for _ in range(2):
            answer = await server.http.get(
                "/authorize", params=mistaken(client["client_id"], uri, params), headers={"accept": "text/html"}
            )
            if uri.startswith("http://127.0.0.1"):
                assert answer.headers["location"].startswith(f"{uri}?error=")
            else:
                assert (answer.status_code, "location" in answer.headers) == (400, False)
                assert "This request cannot be processed" in answer.text
            await server.code(client["client_id"], redirect_uri=uri)


class Guarded(SQLAlchemyOAuthProvider):
    """A provider of an application, which looks at the clients itself."""

    allowed = True

    async def get_client(self, client_id: str) -> StoredClient | None:
        """Know nobody who is not allowed."""
        return await super().get_client(client_id) if self.allowed else None


class Refusing(SQLAlchemyOAuthProvider):
    """A provider of an application that lets nobody in."""

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        """Refuse."""
        raise AuthorizeError("access_denied", f"not {client.client_id}")


class TestOverrides:
    """FastMCP's public methods are asked, also where an application has its own."""

    async def test_a_client_that_the_application_does_not_know(self) -> None:
        """It is unknown at /authorize and at /revoke."""
        async with running(kind=Guarded) as server:
            client = await server.register()
            code, verifier = await server.code(client["client_id"])
            form = token_request(code, verifier, client_id=client["client_id"])
            tokens = (await server.http.post("/token", data=form)).json()
            assert isinstance(server.provider, Guarded)
            server.provider.allowed = False
            request = authorization_request(client["client_id"])
            assert (await server.http.get("/authorize", params=request)).status_code == 400
            form = {"token": tokens["refresh_token"], "client_id": client["client_id"]}
            assert (await server.http.post("/revoke", data=form)).status_code == 401

    async def test_a_request_that_the_application_refuses(self) -> None:
        """It gets no code."""
        async with running(kind=Refusing) as server:
            client = await server.register()
            answer = await server.http.get("/authorize", params=authorization_request(client["client_id"]))
            assert query_of(answer.headers["location"])["error"] == "access_denied"


class TestToken:
    """/token and /revoke."""

    async def test_a_body_that_is_no_form(self, server: Server) -> None:
        """It is `invalid_request`: at `invalid_client`, clients drop their registration."""
        client = await server.register()
        for path in ("/token", "/revoke"):
            answer = await server.http.post(path, json={"client_id": client["client_id"], "grant_type": "x"})
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
            assert "application/x-www-form-urlencoded" in answer.json()["error_description"]

    @pytest.mark.parametrize("path", ["/authorize", "/token", "/revoke", "/register"])
    @pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
    async def test_only_a_post_has_a_body(self, server: Server, method: str, path: str) -> None:
        """RFC 6749, section 3.2: another method is a question, and neither registers nor exchanges anything."""
        client = await server.register()
        code, verifier = await server.code(client["client_id"])
        form = token_request(code, verifier, client_id=client["client_id"])
        for content in (httpx2.QueryParams(form), json.dumps({"redirect_uris": [REDIRECT_URI]}), UNREADABLE):
            kind = "application/json" if "{" in str(content) else f"{FORM}; charset=undefined"
            if content is UNREADABLE:
                kind = "multipart/form-data; boundary=x; charset=undefined"
            answer = await server.http.request(
                method, path, content=str(content).encode(), headers={"content-type": kind}
            )
            assert answer.status_code in (204, 400, 405)
        assert (await server.http.post("/token", data=form)).status_code == 200

    @pytest.mark.parametrize("charset", ["unicode_escape", "undefined", "utf-7"])
    @pytest.mark.parametrize("path", ["/authorize", "/token", "/revoke"])
    async def test_a_form_has_no_charset_of_its_own(self, server: Server, path: str, charset: str) -> None:
        """The other encoding of forms names one, and yields what cannot be stored: it is none of ours."""
        body = UNREADABLE.encode()
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = await server.http.post(path, content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")

    async def test_the_same_resource_twice_is_one(self, server: Server) -> None:
        """Equal ones are one, and one of several that is ours will do."""
        client = await server.register()
        code, verifier = await server.code(client["client_id"])
        form: dict[str, Any] = token_request(code, verifier, client_id=client["client_id"])
        answer = await server.http.post("/token", data=form | {"resource": [server.resource, server.resource]})
        assert answer.status_code == 200, answer.text
        form = {"grant_type": "refresh_token", "refresh_token": answer.json()["refresh_token"]}
        form |= {"client_id": client["client_id"], "resource": ["https://other.example", server.resource]}
        answer = await server.http.post("/token", data=form)
        assert answer.status_code == 200, answer.text

    @pytest.mark.parametrize("verifier", ["x", "x" * 42, "x" * 129, f"{'x' * 42}+", f"{'x' * 42}é"])
    async def test_a_verifier_is_long_enough(self, server: Server, verifier: str) -> None:
        """43 to 128 unreserved characters (RFC 7636, section 4.1), though the challenge is its own."""
        client = await server.register()
        request = authorization_request(client["client_id"], code_challenge=challenge_of(verifier))
        code = query_of((await server.http.get("/authorize", params=request)).headers["location"])["code"]
        answer = await server.http.post("/token", data=token_request(code, verifier, client_id=client["client_id"]))
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_grant")

    async def test_a_refresh_that_asks_for_more_gets_what_was_granted(self, server: Server) -> None:
        """Clients repeat what they once asked for, granted or not; never is it more."""
        client = await server.register(scope="read")
        answer = await server.exchange(client["client_id"], {"client_id": client["client_id"]})
        form = {"grant_type": "refresh_token", "client_id": client["client_id"]}
        form["refresh_token"] = answer.json()["refresh_token"]
        answer = await server.http.post("/token", data=form | {"scope": "admin"})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
        answer = await server.http.post("/token", data=form | {"scope": "read admin"})
        assert (answer.status_code, answer.json()["scope"]) == (200, "read")

    async def test_no_scope_is_no_empty_one(self, server: Server) -> None:
        """Where there are none, neither answers nor metadata have an empty one (RFC 9728, section 3.2)."""
        client = await server.register()
        tokens = await server.tokens(client["client_id"])
        assert "scope" not in client
        assert "scope" not in tokens
        resource = (await server.http.get("/.well-known/oauth-protected-resource/mcp")).json()
        assert "scopes_supported" not in resource

    @pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
    @pytest.mark.parametrize("state", ["live", "rotated", "expired"])
    async def test_a_token_in_any_state_ends_its_grant(self, server: Server, kind: str, state: str) -> None:
        """A client that signs out ends what it had, though its token was refreshed or has expired meanwhile."""
        client = await server.register()
        tokens = newest = await server.tokens(client["client_id"])
        form = {"grant_type": "refresh_token", "client_id": client["client_id"]}
        if state == "rotated":
            answer = await server.http.post("/token", data=form | {"refresh_token": tokens["refresh_token"]})
            newest = answer.json()
        other = await server.register()
        with turned(3601 if state == "expired" else 0):
            for client_id, lives in ((other["client_id"], True), (client["client_id"], False)):
                revoked = {"token": tokens[kind], "client_id": client_id}
                assert (await server.http.post("/revoke", data=revoked)).status_code == 200
                if state != "expired":
                    assert ((await server.mcp(newest["access_token"])).status_code != 401) is lives
            answer = await server.http.post("/token", data=form | {"refresh_token": newest["refresh_token"]})
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_grant")


@pytest.mark.parametrize("path", ["/register", "/authorize", "/token", "/revoke"])
async def test_who_hangs_up_early_leaves_no_traceback(
    server: Server, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that ends before its body is nobody's error: anyone could fill the log so."""
    kind = "application/json" if path == "/register" else "application/x-www-form-urlencoded"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", server.http.base_url.port)
        writer.write(head.encode() + b"{")
        await writer.drain()
        assert (await server.http.get("/.well-known/oauth-authorization-server")).status_code == 200
        writer.close()
        await writer.wait_closed()
    assert (await server.http.post(path)).status_code < 500
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


class TestProbe:
    """What clients send to /mcp before they have a token."""

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PUT"])
    async def test_every_method_is_challenged(self, server: Server, method: str) -> None:
        """401 says where to sign in (RFC 9728, section 5.1); with a token, a method that there is not is a 405."""
        for headers in ({}, {"authorization": "Bearer nonsense"}):
            answer = await server.http.request(method, "/mcp", headers=headers)
            assert answer.status_code == 401
            metadata = answer.headers["www-authenticate"].partition('resource_metadata="')[2].partition('"')[0]
            assert (await server.http.get(metadata)).status_code == 200
        client = await server.register()
        tokens = await server.tokens(client["client_id"])
        headers = {"authorization": f"Bearer {tokens['access_token']}"}
        answer = await server.http.request(method, "/mcp", headers=headers)
        assert answer.status_code != 401
        assert (answer.status_code == 405) == (method != "POST")

    async def test_other_paths_are_as_they_were(self, server: Server) -> None:
        """A method that another route lacks is a 405, and no challenge."""
        assert (await server.http.get("/token")).status_code == 405
        assert (await server.http.get("/nowhere")).status_code == 404
