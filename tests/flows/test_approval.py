"""Who may let a client in: fail closed, and the narrow default on loopback."""

import asyncio
import logging
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from fastmcp import FastMCP
from mcp.server.auth.provider import AuthorizeError
from pydantic import AnyUrl

from oauth_store import AutoApproval, ConfigurationError, PasswordApproval, SQLAlchemyOAuthProvider
from oauth_store.pages.passwords import hash_password
from tests.endpoints import running
from tests.steps import authorization_params, authorization_request, new_client, query_of, registered

HASH = hash_password("correct horse")


class TestDefault:
    """What is chosen where approval= is not given."""

    @pytest.mark.parametrize(
        "urls",
        [
            {"base_url": "https://wiki.example.com"},
            {"base_url": "http://127.0.0.1:8000", "issuer_url": "https://wiki.example.com"},
            {"base_url": "http://127.0.0.1:8000", "resource_base_url": "https://wiki.example.com"},
            {"base_url": "https://localhost.example.com"},
        ],
    )
    def test_a_public_url_fails_closed(self, urls: dict[str, str]) -> None:
        """A server with any public URL does not start without an approval, and says which ways out there are."""
        with pytest.raises(ConfigurationError, match=r"MCP_OAUTH_PASSWORD_HASH.*<your own Approval>.*AutoApproval\(\)"):
            SQLAlchemyOAuthProvider(":memory:", **urls)  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.0.0.2"])
    def test_a_loopback_url_warns(self, host: str, caplog: pytest.LogCaptureFixture) -> None:
        """A server on loopback starts, and its log says who is let in."""
        SQLAlchemyOAuthProvider(":memory:", base_url=f"http://{host}")
        assert "no approval is set" in caplog.text

    def test_everyone_is_let_in_only_where_that_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        """An explicit AutoApproval() is taken at its word on a public URL."""
        SQLAlchemyOAuthProvider(":memory:", base_url="https://wiki.example.com", approval=AutoApproval())
        assert caplog.text == ""

    def test_a_password_in_the_environment_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where MCP_OAUTH_PASSWORD_HASH is set, nobody gets in without the password, on loopback neither."""
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", hash_password("correct horse"))
        for base_url in ("http://127.0.0.1:8000", "https://wiki.example.com"):
            provider = SQLAlchemyOAuthProvider(":memory:", base_url=base_url)
            assert isinstance(provider._approval, PasswordApproval)

    def test_a_password_that_would_be_ignored_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """MCP_OAUTH_PASSWORD_HASH never means less than its owner thinks: AutoApproval() beside it is refused."""
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", hash_password("correct horse"))
        with pytest.raises(ConfigurationError, match="MCP_OAUTH_PASSWORD_HASH"):
            AutoApproval()


class TestPassword:
    """What PasswordApproval is told."""

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({}, "has no password; run `oauth-store hash-password`"),
            ({"password_hash": "correct horse"}, "password_hash is not an argon2 hash"),
            ({"password_hash": ""}, "password_hash is not an argon2 hash"),
            ({"password_hash": "$2b$12$abcdefghijklmnopqrstuv"}, "password_hash is not an argon2 hash"),
            ({"users": {"ada": "correct horse"}}, r"users\['ada'\] is not an argon2 hash"),
            ({"users": {}}, "users is empty"),
            ({"users": {" ada": HASH}}, "users has the name ' ada'"),
            ({"users": {"a" * 1001: HASH}}, "longer than 1000 characters"),
            ({"password_hash": HASH, "users": {"ada": HASH}}, "pass only one of them"),
            ({"password_hash": HASH, "accent": "blue"}, "accent is 'blue'"),
            ({"password_hash": HASH, "logo_url": "javascript:alert(1)"}, "logo_url is"),
            ({"password_hash": HASH, "logo_url": "https://a; script-src *"}, "logo_url is"),
            ({"password_hash": HASH, "templates": "/nowhere"}, "templates is '/nowhere'"),
            ({"password_hash": HASH, "apps_path": "apps"}, "apps_path is 'apps'"),
        ],
    )
    def test_a_bad_setting_is_an_error_at_construction(self, settings: dict[str, Any], complaint: str) -> None:
        """A plain password by mistake, or anything else that cannot be used, says so; and never quotes a password."""
        with pytest.raises(ConfigurationError, match=complaint) as caught:
            PasswordApproval(**settings)
        assert "correct horse" not in str(caught.value)


class TestLoopbackOnly:
    """The default on loopback, over HTTP."""

    async def authorize(self, *, redirect_uri: str, headers: dict[str, str] | None = None) -> dict[str, str]:
        """Register a client with a redirect URI, go to /authorize, and return what the redirect says."""
        async with running(approval=None) as server:
            client = await server.register(redirect_uris=[redirect_uri])
            request = authorization_request(client["client_id"], redirect_uri=redirect_uri)
            answer = await server.http.get("/authorize", params=request, headers=headers)
            assert answer.status_code == 302, answer.text
            return query_of(answer.headers["location"])

    @pytest.mark.parametrize(
        "redirect_uri",
        [
            "http://127.0.0.1:9000/callback",
            "http://localhost:9000/callback",
            "cursor://mcp/oauth",
            "com.example.app:/cb",
        ],
    )
    async def test_what_runs_on_this_machine_gets_in(self, redirect_uri: str) -> None:
        """A local client, with a loopback or a private-use redirect URI, is approved."""
        assert "code" in await self.authorize(redirect_uri=redirect_uri)

    @pytest.mark.parametrize("redirect_uri", ["ftp://evil.example/cb", "webcal:evil.example", "cursor://evil:99/cb"])
    async def test_what_is_no_link_of_an_app_is_refused(
        self, redirect_uri: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A client that is stored with such a redirect URI, from before they were refused, is led nowhere."""
        async with running(approval=None) as server:
            client = new_client(redirect_uris=[AnyUrl(redirect_uri)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("oauth_store.flows.registration.check_redirect_uris", lambda _: None)
                await server.provider.register_client(client)
            request = authorization_request(client.client_id, redirect_uri=redirect_uri)
            answer = await server.http.get("/authorize", params=request)
        assert (answer.status_code, "location" in answer.headers) == (400, False)
        assert answer.json()["error"] == "access_denied"
        assert "its redirect URI" in caplog.text

    @pytest.mark.parametrize("host", ["[", "[::1", "a]b"])
    async def test_a_host_that_cannot_be_read(self, host: str) -> None:
        """A broken Host header is not loopback's, and no error of the server."""
        async with running(approval=None) as server:
            client_id = (await server.register())["client_id"]
            answer = await server.http.get(
                "/authorize", params=authorization_request(client_id), headers={"host": host}
            )
        assert query_of(answer.headers["location"])["error"] == "access_denied"

    async def test_ipv4_on_a_dual_stack_listener_is_this_machine(self) -> None:
        """A peer called ::ffff:127.0.0.1 is 127.0.0.1."""
        async with SQLAlchemyOAuthProvider(":memory:", base_url="http://127.0.0.1:8000") as provider:
            client = await registered(provider)
            app = FastMCP("test", auth=provider).http_app()
            for peer, told in (("::ffff:127.0.0.1", "code"), ("::ffff:203.0.113.7", "error")):
                transport = httpx2.ASGITransport(app, client=(peer, 50000))
                async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                    answer = await http.get("/authorize", params=authorization_request(client.client_id))
                    assert told in query_of(answer.headers["location"])

    @pytest.mark.parametrize("redirect_uri", ["https://evil.example/callback", "https://127.0.0.1.evil.example/cb"])
    async def test_a_public_redirect_uri_is_refused(self, redirect_uri: str, caplog: pytest.LogCaptureFixture) -> None:
        """A web page that registers its own address with the owner's local server gets nothing, and no browser."""
        async with running(approval=None) as server:
            client = await server.register(redirect_uris=[redirect_uri])
            request = authorization_request(client["client_id"], redirect_uri=redirect_uri)
            answer = await server.http.get("/authorize", params=request)
        assert (answer.status_code, answer.json()["error"]) == (400, "access_denied")
        assert "pass approval=" in caplog.text

    async def test_what_speaks_http_1_0_is_refused(self) -> None:
        """A plain proxy_pass of nginx with the Host of this machine is one, and no browser."""
        async with running(approval=None) as server:
            client = await server.register()
            target = f"/authorize?{urlencode(authorization_request(client['client_id']))}"
            port = server.http.base_url.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {target} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            answer = (await reader.read()).decode()
            writer.close()
        assert "error=access_denied" in answer
        assert "code=" not in answer

    @pytest.mark.parametrize(
        "header",
        [
            {"Host": "wiki.example.com"},
            {"Host": "abc.tunnel.example"},
            {"X-Forwarded-For": "203.0.113.7"},
            {"X-Forwarded-Host": "wiki.example.com"},
            {"Forwarded": "for=203.0.113.7"},
            {"X-Real-IP": "203.0.113.7"},
            {"Via": "1.1 tunnel"},
            {"X-Forwarded-Port": "443"},
            {"CF-Connecting-IP": "203.0.113.7"},
            {"True-Client-IP": "203.0.113.7"},
            {"X-Original-Forwarded-For": "203.0.113.7"},
            {"Fly-Client-IP": "203.0.113.7"},
            {"X-Client-IP": "203.0.113.7"},
        ],
    )
    async def test_what_came_through_a_tunnel_is_refused(
        self, header: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A request with another Host, or with a forwarding header, gets access_denied."""
        answer = await self.authorize(redirect_uri="http://127.0.0.1:9000/callback", headers=header)
        assert answer["error"] == "access_denied"
        assert "authorization refused" in caplog.text

    async def test_a_call_without_a_request_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        """Where nothing is known of the caller, nothing is approved, and the error says what tests want."""
        caplog.set_level(logging.WARNING)
        async with SQLAlchemyOAuthProvider(":memory:", base_url="http://127.0.0.1:8000") as provider:
            client = await registered(provider)
            with pytest.raises(AuthorizeError) as caught:
                await provider.authorize(client, authorization_params())
            assert caught.value.error == "access_denied"
            assert "approval=AutoApproval()" in str(caught.value.error_description)
