"""What the MCP authorization specification asks of the routes, line by line of docs/conformance.md."""

import pytest
from mcp.server.auth.settings import ClientRegistrationOptions

from tests.endpoints import Server
from tests.steps import REDIRECT_URI, authorization_request, query_of, token_request

with_scopes = pytest.mark.parametrize(
    "server",
    [
        {
            "required_scopes": ["read"],
            "client_registration_options": ClientRegistrationOptions(
                enabled=True, valid_scopes=["read", "write", "offline_access"]
            ),
        }
    ],
    indirect=True,
)


class TestMetadata:
    """The discovery documents (RFC 8414, RFC 9728)."""

    async def test_what_clients_look_for(self, server: Server) -> None:
        """The server metadata offers public clients, S256, metadata documents and `iss`."""
        for path in ("/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"):
            answer = await server.http.get(path, headers={"origin": "https://inspector.example"})
            if answer.status_code == 404:
                continue
            metadata = answer.json()
            assert metadata["token_endpoint_auth_methods_supported"] == [
                "none",
                "client_secret_post",
                "client_secret_basic",
                "private_key_jwt",
            ]
            assert metadata["revocation_endpoint_auth_methods_supported"][0] == "none"
            assert metadata["code_challenge_methods_supported"] == ["S256"]
            assert metadata["client_id_metadata_document_supported"] is True
            assert metadata["authorization_response_iss_parameter_supported"] is True
            grant_types = ["authorization_code", "refresh_token", "client_credentials"]
            assert metadata["grant_types_supported"] == grant_types
            assert metadata["issuer"] == str(server.provider.issuer_url)
            assert answer.headers["access-control-allow-origin"] == "*"

    @with_scopes
    async def test_offline_access_is_not_the_resources(self, server: Server) -> None:
        """offline_access is in the server metadata, and not in that of the protected resource."""
        resource = (await server.http.get("/.well-known/oauth-protected-resource/mcp")).json()
        assert resource["scopes_supported"] == ["read", "write"]
        metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
        assert metadata["scopes_supported"] == ["read", "write", "offline_access"]


class TestScopes:
    """Scopes as claude.ai asks for them."""

    @with_scopes
    @pytest.mark.parametrize("scope", [None, " offline_access", "read offline_access", "write unknown"])
    async def test_a_client_without_scopes_gets_those_of_the_server(self, server: Server, scope: str | None) -> None:
        """Whatever a client that registered without scopes asks for, its token works at the MCP endpoint."""
        client = await server.register()
        params = {} if scope is None else {"scope": scope}
        code, verifier = await server.code(client["client_id"], **params)
        answer = await server.http.post("/token", data=token_request(code, verifier, client_id=client["client_id"]))
        token = answer.json()
        assert "read" in token["scope"].split()
        assert (await server.mcp(token["access_token"])).status_code not in (401, 403)
        form = {"grant_type": "refresh_token", "client_id": client["client_id"], "scope": " offline_access"}
        answer = await server.http.post("/token", data=form | {"refresh_token": token["refresh_token"]})
        assert answer.status_code == 200, answer.text
        assert (await server.mcp(answer.json()["access_token"])).status_code not in (401, 403)

    @with_scopes
    async def test_a_scope_that_the_server_does_not_have_is_refused_at_registration(self, server: Server) -> None:
        """A registration for an unknown scope is invalid_client_metadata; offline_access is known."""
        answer = await server.http.post("/register", json={"redirect_uris": [REDIRECT_URI], "scope": "admin"})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")
        assert (await server.register(scope="read offline_access"))["scope"] == "read offline_access"


class TestRegistration:
    """Dynamic registration (RFC 7591)."""

    @pytest.mark.parametrize(
        "redirect_uris",
        [
            ["javascript:alert(1)"],
            ["data:text/html,x"],
            ["ftp://evil.example/callback"],
            ["WebCal://evil.example/callback"],
            ["view-source:https://evil.example/"],
            ["http://wiki.example.com/callback"],
            ["https://wiki.example.com/callback#fragment"],
            ["https://user@wiki.example.com/callback"],
            ["https://wiki.example.com/callback", "http://evil.example/callback"],
            [],
            None,
        ],
    )
    async def test_bad_redirect_uris_are_refused(self, server: Server, redirect_uris: list[str] | None) -> None:
        """Where a code must not be sent cannot be registered."""
        answer = await server.http.post("/register", json={"redirect_uris": redirect_uris})
        assert answer.status_code == 400
        assert answer.json()["error"] in ("invalid_redirect_uri", "invalid_client_metadata")
        assert answer.headers["cache-control"] == "no-store"

    @pytest.mark.parametrize("application_type", ["native", "web", None])
    async def test_cursor_registers_three_at_once(self, server: Server, application_type: str | None) -> None:
        """Custom schemes, https and loopback are accepted together, whatever kind of application it says it is."""
        uris = ["cursor://anysphere.cursor-mcp/oauth/callback", "https://www.cursor.com/cb", "http://localhost:8787/cb"]
        more = {} if application_type is None else {"application_type": application_type}
        assert (await server.register(redirect_uris=uris, **more))["redirect_uris"] == uris

    async def test_plain_http_stays_refused_and_is_told_why(self, server: Server) -> None:
        """A web application with plain http to a public host reads what is wrong with that, and what to do."""
        metadata = {"redirect_uris": ["http://wiki.example.com/callback"], "application_type": "web"}
        answer = await server.http.post("/register", json=metadata)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_redirect_uri")
        assert "a redirect URI uses http to another machine; use https" in answer.json()["error_description"]

    async def test_nobody_else_may_keep_the_answer(self, server: Server) -> None:
        """201 and 400 of /register, and all of /token and /revoke, are no-store."""
        for path, body in (("/register", {"redirect_uris": [REDIRECT_URI]}), ("/register", {})):
            assert (await server.http.post(path, json=body)).headers["cache-control"] == "no-store"
        for path in ("/token", "/revoke"):
            assert (await server.http.post(path, data={})).headers["cache-control"] == "no-store"

    async def test_a_registration_that_is_too_large_is_refused(self, server: Server) -> None:
        """More than 32 KiB of metadata are not stored."""
        body = {"redirect_uris": [REDIRECT_URI], "client_name": "x" * 33_000}
        answer = await server.http.post("/register", json=body)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")


class TestAuthorize:
    """The authorization endpoint."""

    async def test_errors_carry_state_and_issuer(self, server: Server) -> None:
        """An error redirect has `iss` (RFC 9207), byte for byte the issuer of the metadata, and the state."""
        client_id = (await server.register())["client_id"]
        issuer = (await server.http.get("/.well-known/oauth-authorization-server")).json()["issuer"]
        for wrong, error in (
            ({"response_type": "token"}, "unsupported_response_type"),
            ({"code_challenge_method": "plain"}, "invalid_request"),
            ({"resource": "https://other.example.com/mcp"}, "invalid_target"),
            ({"state": "x" * 9000}, "invalid_request"),
        ):
            answer = await server.http.get("/authorize", params=authorization_request(client_id, **wrong))
            assert answer.status_code == 302, answer.text
            params = query_of(answer.headers["location"])
            assert (params["error"], params["iss"]) == (error, issuer)
            assert params["state"] == wrong.get("state", "the-state")

    async def test_a_code_carries_the_issuer(self, server: Server) -> None:
        """So does the answer with a code."""
        client_id = (await server.register())["client_id"]
        answer = await server.http.get("/authorize", params=authorization_request(client_id))
        issuer = (await server.http.get("/.well-known/oauth-authorization-server")).json()["issuer"]
        assert query_of(answer.headers["location"])["iss"] == issuer

    async def test_an_unknown_client_gets_a_page(self, server: Server) -> None:
        """A person whose client is not known here reads what to do; no redirect is followed."""
        answer = await server.http.get(
            "/authorize", params=authorization_request("nobody"), headers={"accept": "text/html"}
        )
        assert answer.status_code == 400
        assert answer.headers["content-type"].startswith("text/html")
        assert "location" not in answer.headers

    async def test_an_unregistered_redirect_uri_is_not_followed(self, server: Server) -> None:
        """Nothing is ever sent to an address that the client did not register."""
        client_id = (await server.register())["client_id"]
        for uri in ("https://evil.example/callback", "http://127.0.0.1:9000/other", "javascript:alert(1)"):
            answer = await server.http.get("/authorize", params=authorization_request(client_id, redirect_uri=uri))
            assert answer.status_code == 400
            assert "location" not in answer.headers

    @pytest.mark.parametrize("uri", ["http://127.0.0.1:9000", "http://LOCALHOST:9000/cb", "https://wiki.example.com"])
    async def test_a_redirect_uri_matches_itself(self, server: Server, uri: str) -> None:
        """However a client spells its redirect URI, the whole flow accepts the same spelling again."""
        client_id = (await server.register(redirect_uris=[uri]))["client_id"]
        code, verifier = await server.code(client_id, redirect_uri=uri)
        form = token_request(code, verifier, client_id=client_id, redirect_uri=uri)
        answer = await server.http.post("/token", data=form)
        assert answer.status_code == 200, answer.text

    async def test_any_port_on_loopback(self, server: Server) -> None:
        """A native client may listen on another port than it registered (RFC 8252, section 7.3)."""
        client_id = (await server.register(redirect_uris=["http://127.0.0.1/callback"]))["client_id"]
        uri = "http://127.0.0.1:54321/callback"
        answer = await server.http.get("/authorize", params=authorization_request(client_id, redirect_uri=uri))
        assert answer.headers["location"].startswith(f"{uri}?code=")

    @pytest.mark.parametrize(
        ("registered", "asked"),
        [
            (["https://claude.ai/api/mcp/auth_callback"], "https://claude.ai/api/mcp/auth_callback"),
            (["http://localhost:3118/callback"], "http://localhost:54545/callback"),  # Claude Code
            (["https://chatgpt.com/connector_platform_oauth_redirect"], "same"),
            (
                [
                    "https://insiders.vscode.dev/redirect",
                    "https://vscode.dev/redirect",
                    "http://127.0.0.1/",
                    "http://127.0.0.1:33418/",
                ],
                "http://127.0.0.1:59656/",
            ),
            (
                ["cursor://anysphere.cursor-mcp/oauth/callback", "https://www.cursor.com/agents/mcp/oauth/callback"],
                "same",
            ),
        ],
        ids=["claude", "claude-code", "chatgpt", "vscode", "cursor"],
    )
    async def test_well_known_clients_get_in(self, server: Server, registered: list[str], asked: str) -> None:
        """Each client of docs/connecting.md registers its redirect URIs, without scopes, and gets a pair."""
        uri = registered[0] if asked == "same" else asked
        client_id = (await server.register(redirect_uris=registered))["client_id"]
        code, verifier = await server.code(client_id, redirect_uri=uri, scope=" offline_access")
        form = token_request(code, verifier, client_id=client_id, redirect_uri=uri)
        answer = await server.http.post("/token", data=form)
        assert "refresh_token" in answer.raise_for_status().json()


class TestTokenErrors:
    """The error codes of /token (RFC 6749, section 5.2)."""

    @pytest.mark.parametrize(
        ("wrong", "status", "error"),
        [
            ({"grant_type": ""}, 400, "invalid_request"),
            ({"grant_type": "password"}, 400, "unsupported_grant_type"),
            ({"grant_type": "refresh_token", "refresh_token": "refresh_nonsense"}, 401, "invalid_grant"),
            ({"code": ""}, 400, "invalid_request"),
            ({"code_verifier": ""}, 400, "invalid_request"),
            ({"code": "code_nonsense"}, 401, "invalid_grant"),
            ({"code_verifier": "wrong"}, 401, "invalid_grant"),
            ({"redirect_uri": "http://127.0.0.1:1/other"}, 401, "invalid_grant"),
            ({"resource": "https://other.example.com/mcp"}, 400, "invalid_target"),
        ],
    )
    async def test_each_mistake_has_its_code(
        self, server: Server, wrong: dict[str, str], status: int, error: str
    ) -> None:
        """What is wrong is said by the code that clients look at."""
        client_id = (await server.register())["client_id"]
        code, verifier = await server.code(client_id)
        form = token_request(code, verifier, client_id=client_id)
        answer = await server.http.post("/token", data=form | wrong)
        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert (await server.http.post("/token", data=form)).status_code == 200

    async def test_a_grant_that_the_client_did_not_register_for(self, server: Server) -> None:
        """A client without the refresh grant that tries it is unauthorized_client."""
        client_id = (await server.register(grant_types=["authorization_code"]))["client_id"]
        form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": "x"}
        answer = await server.http.post("/token", data=form)
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")

    async def test_a_parameter_given_twice(self, server: Server) -> None:
        """A parameter twice is invalid_request (RFC 6749, section 3.2)."""
        client_id = (await server.register())["client_id"]
        body = f"grant_type=authorization_code&grant_type=refresh_token&client_id={client_id}"
        answer = await server.http.post(
            "/token", content=body, headers={"content-type": "application/x-www-form-urlencoded"}
        )
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")

    async def test_a_refresh_for_another_resource(self, server: Server) -> None:
        """A refresh that names another resource is invalid_target, and costs nothing (RFC 8707, section 2.2)."""
        client_id = (await server.register())["client_id"]
        token = await server.tokens(client_id)
        form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": token["refresh_token"]}
        answer = await server.http.post("/token", data=form | {"resource": "https://other.example.com/mcp"})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_target")
        assert (await server.mcp(token["access_token"])).status_code != 401
        assert (await server.http.post("/token", data=form)).status_code == 200

    async def test_the_resource_of_the_grant_may_be_named(self, server: Server) -> None:
        """Naming the grant's own resource at /token changes nothing (RFC 8707, section 2.2)."""
        client_id = (await server.register())["client_id"]
        code, verifier = await server.code(client_id)
        resource = f"{server.provider.issuer.resource}/"
        form = token_request(code, verifier, client_id=client_id, resource=resource)
        answer = await server.http.post("/token", data=form)
        assert answer.status_code == 200, answer.text
        form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": answer.json()["refresh_token"]}
        assert (await server.http.post("/token", data=form | {"resource": resource})).status_code == 200
