"""Who may let a client in: fail closed, and the narrow default on loopback."""

import logging

import httpx2
import pytest
from fastmcp import FastMCP

from oauth_store import AutoApproval, ConfigurationError, SQLAlchemyOAuthProvider
from tests.flows import pkce, query_of
from tests.serving import free_port, serving


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
        with pytest.raises(ConfigurationError, match=r"approval=<your own Approval>.*AutoApproval\(\).*loopback"):
            SQLAlchemyOAuthProvider(":memory:", **urls)  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.0.0.2"])
    def test_a_loopback_url_warns(self, host: str, caplog: pytest.LogCaptureFixture) -> None:
        """A server on loopback starts, and its log says who is let in."""
        SQLAlchemyOAuthProvider(":memory:", base_url=f"http://{host}")
        assert "no approval= is set" in caplog.text

    def test_everyone_is_let_in_only_where_that_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        """An explicit AutoApproval() is taken at its word on a public URL."""
        SQLAlchemyOAuthProvider(":memory:", base_url="https://wiki.example.com", approval=AutoApproval())
        assert caplog.text == ""

    def test_a_password_that_would_be_ignored_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """MCP_OAUTH_PASSWORD_HASH never means less than its owner thinks: without a sign-in page it is refused."""
        monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", "$argon2id$something")
        with pytest.raises(ConfigurationError, match="MCP_OAUTH_PASSWORD_HASH"):
            SQLAlchemyOAuthProvider(":memory:", base_url="http://127.0.0.1:8000")


class TestLoopbackOnly:
    """The default on loopback, over HTTP."""

    async def authorize(self, *, redirect_uri: str, headers: dict[str, str] | None = None) -> dict[str, str]:
        """Register a client with a redirect URI, go to /authorize, and return what the redirect says."""
        port = free_port()
        async with SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}") as provider:
            mcp: FastMCP[None] = FastMCP("test", auth=provider)
            async with (
                serving(mcp.http_app(stateless_http=True), port) as url,
                httpx2.AsyncClient(base_url=url) as http,
            ):
                client = (await http.post("/register", json={"redirect_uris": [redirect_uri]})).json()
                params = {
                    "response_type": "code",
                    "client_id": client["client_id"],
                    "redirect_uri": redirect_uri,
                    "code_challenge": pkce()[1],
                    "state": "the-state",
                }
                answer = await http.get("/authorize", params=params, headers=headers)
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

    @pytest.mark.parametrize("redirect_uri", ["https://evil.example/callback", "https://127.0.0.1.evil.example/cb"])
    async def test_a_public_redirect_uri_is_refused(self, redirect_uri: str, caplog: pytest.LogCaptureFixture) -> None:
        """A web page that registers its own address with the owner's local server gets access_denied."""
        answer = await self.authorize(redirect_uri=redirect_uri)
        assert (answer["error"], answer["state"]) == ("access_denied", "the-state")
        assert "pass approval=" in caplog.text

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
        """Where nothing is known of the caller, nothing is approved."""
        from mcp.server.auth.provider import AuthorizeError

        from tests.conftest import new_client
        from tests.flows import authorization_params

        caplog.set_level(logging.WARNING)
        async with SQLAlchemyOAuthProvider(":memory:", base_url="http://127.0.0.1:8000") as provider:
            client = new_client()
            await provider.register_client(client)
            with pytest.raises(AuthorizeError) as caught:
                await provider.authorize(client, authorization_params())
            assert caught.value.error == "access_denied"
