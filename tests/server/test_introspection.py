"""/introspect: another server asks whether a token is good there (RFC 7662)."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from fastmcp.server.auth.providers.introspection import IntrospectionTokenVerifier

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from oauth_store.database.models import ACCESS
from oauth_store.flows.registration import add_client
from tests.commands import run, run_json
from tests.databases import tokens_of
from tests.deployments import wiki
from tests.endpoints import basic
from tests.families import FILES, SECRET, WIKI, asking, token_for
from tests.serving import free_port, serving
from tests.steps import new_client
from tests.workers import settle

NOTES = "https://notes.example.com/mcp"


class Served:
    """A server that issues tokens for three others, of which notes asks about its own."""

    def __init__(self, url: str, provider: SQLAlchemyOAuthProvider, http: httpx2.AsyncClient) -> None:
        self.url = url
        self.provider = provider
        self.http = http

    async def asked(self, token: str | None, client_id: str = "notes", secret: str = SECRET) -> httpx2.Response:
        """What it answers."""
        form = {} if token is None else {"token": token}
        return await self.http.post("/introspect", data=form, headers=basic(client_id, secret))


@pytest.fixture
async def served(database_url: str) -> AsyncIterator[Served]:
    """Such a server on each kind of database."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    others = [WIKI, FILES, NOTES]
    async with SQLAlchemyOAuthProvider(
        database_url, base_url=url, approval=AutoApproval(), resources=others
    ) as provider:
        await provider.issuer.store.write(add_client, asking(NOTES))
        async with (
            serving(wiki(provider).http_app(stateless_http=True), port),
            httpx2.AsyncClient(base_url=url, timeout=60) as http,
        ):
            yield Served(url, provider, http)


class TestAnswer:
    """What the server learns."""

    async def test_active(self, served: Served) -> None:
        """Of a token for itself: everything that it needs; and the question counts as a use."""
        token = (await token_for(served.provider, NOTES, client_id="someone")).access_token
        answer = await served.asked(token)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        told = answer.json()
        [row] = [row for row in await tokens_of(served.provider) if row.kind == ACCESS]
        assert told == {
            "active": True,
            "scope": "read write",
            "client_id": "someone",
            "token_type": "Bearer",
            "exp": row.expires_at,
            "aud": NOTES,
            "iss": f"{served.url}/",
        }
        await settle(served.provider)
        [row] = [row for row in await tokens_of(served.provider) if row.kind == ACCESS]
        assert row.first_used_at is not None

    async def test_of_another_resource(self, served: Served) -> None:
        """Of a token for another server, a refresh token, a revoked one or none that exists: that it is not active."""
        pair = await token_for(served.provider, NOTES, client_id="someone")
        for resource in (WIKI, FILES, None):
            token = (await token_for(served.provider, resource)).access_token
            assert (await served.asked(token)).json() == {"active": False}
        for token in (str(pair.refresh_token), "unknown", "\0", "a" * 10_000, SECRET):
            assert (await served.asked(token)).json() == {"active": False}
        assert (await served.asked(pair.access_token)).json()["active"] is True
        access = await served.provider.load_access_token(pair.access_token)
        assert access is not None
        await served.provider.revoke_token(access)
        assert (await served.asked(pair.access_token)).json() == {"active": False}

    async def test_fastmcps_verifier(self, served: Served) -> None:
        """FastMCP's own verifier takes what this server answers, by either method of authentication."""
        token = (await token_for(served.provider, NOTES, client_id="someone")).access_token
        for method in ("client_secret_basic", "client_secret_post"):
            verifier = IntrospectionTokenVerifier(
                introspection_url=f"{served.url}/introspect",
                client_id="notes",
                client_secret=SECRET,
                client_auth_method=method,
                audience=NOTES,
            )
            access = await verifier.verify_token(token)
            assert access is not None
            assert (access.client_id, access.scopes) == ("someone", ["read", "write"])
            assert await verifier.verify_token((await token_for(served.provider, WIKI)).access_token) is None


class TestWho:
    """Who may ask."""

    async def test_others(self, served: Served) -> None:
        """Neither an app, a machine, a server with a wrong secret, nor one for a resource that is not named here."""
        token = (await token_for(served.provider, NOTES)).access_token
        provider = served.provider
        await provider.register_client(
            new_client(client_id="app", client_secret="s" * 20, token_endpoint_auth_method="client_secret_post")
        )
        await provider.register_client(
            new_client(
                client_id="machine",
                client_secret="s" * 20,
                token_endpoint_auth_method="client_secret_post",
                grant_types=["client_credentials"],
                redirect_uris=None,
            )
        )
        await provider.register_client(new_client(client_id="public"))
        await provider.issuer.store.write(add_client, asking("https://evil.example/mcp", client_id="stranger"))
        for client_id, secret, status in (
            ("app", "s" * 20, 403),
            ("machine", "s" * 20, 403),
            ("public", "", 403),
            ("stranger", SECRET, 403),
            ("notes", "wrong", 401),
            ("notes", "", 401),
            ("nobody", SECRET, 401),
        ):
            answer = await served.asked(token, client_id, secret)
            assert answer.status_code == status, client_id
            assert "active" not in answer.json()
        assert (await served.http.post("/introspect", data={"token": token})).status_code == 401
        assert (await served.asked(None)).status_code == 400

    async def test_registration_does_not_help(self, served: Served) -> None:
        """A registration that claims to be such a server is none."""
        metadata = {
            "client_name": "Notes",
            "grant_types": ["introspection"],
            "introspects": NOTES,
            "added_by_owner": True,
            "redirect_uris": ["http://127.0.0.1:9/callback"],
            "token_endpoint_auth_method": "client_secret_post",
        }
        token = (await token_for(served.provider, NOTES)).access_token
        refused = await served.http.post("/register", json=metadata)
        assert refused.status_code == 400
        for grants in (["introspection", "authorization_code", "refresh_token"], None):
            answer = await served.http.post("/register", json={**metadata, "grant_types": grants})
            if answer.status_code == 201:
                client = answer.json()
                asked = await served.asked(token, client["client_id"], client["client_secret"])
                assert asked.status_code == 403

    async def test_it_gets_no_tokens(self, served: Served) -> None:
        """A server that asks gets no token by any grant."""
        for form in (
            {"grant_type": "client_credentials"},
            {"grant_type": "introspection"},
            {"grant_type": "refresh_token", "refresh_token": "x"},
            {"grant_type": "authorization_code", "code": "x", "code_verifier": "x" * 43},
        ):
            answer = await served.http.post("/token", data=form, headers=basic("notes", SECRET))
            assert answer.status_code in (400, 401), form
            assert "access_token" not in answer.json()

    async def test_metadata(self, served: Served, database_url: str) -> None:
        """The metadata name the endpoint where there are other servers; elsewhere there is none."""
        metadata = (await served.http.get("/.well-known/oauth-authorization-server")).json()
        assert metadata["introspection_endpoint"] == f"{served.url}/introspect"
        port = free_port()
        async with (
            SQLAlchemyOAuthProvider(":memory:", base_url=f"http://127.0.0.1:{port}", approval=AutoApproval()) as alone,
            serving(wiki(alone).http_app(stateless_http=True), port) as url,
            httpx2.AsyncClient(base_url=url) as http,
        ):
            assert (await http.post("/introspect", data={"token": "x"})).status_code == 404
            assert "introspection_endpoint" not in (await http.get("/.well-known/oauth-authorization-server")).json()


class TestCommand:
    """How the owner adds such a server."""

    async def test_added(self, served: Served, database_url: str) -> None:
        """`clients add --introspects` prints its secret, and it may ask at once."""
        await served.provider.check_schema()
        added = run_json("clients", "add", "Wiki", "--introspects", WIKI, database=database_url)
        token = (await token_for(served.provider, WIKI)).access_token
        answer = await served.asked(token, added["client_id"], added["client_secret"])
        assert answer.json()["active"] is True
        removed = run("clients", "remove", added["client_id"], "--yes", database=database_url)
        assert removed.returncode == 0
        assert (await served.asked(token, added["client_id"], added["client_secret"])).status_code == 401

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--machine"], "Give --introspects alone"),
            (["--redirect-uri", "https://a.example/cb"], "Give --introspects alone"),
            (["--auth-method", "none"], "Give --introspects alone"),
        ],
        ids=str,
    )
    def test_bad_options(self, database_url: str, options: list[str], complaint: str) -> None:
        """It is no app and no machine."""
        refused = run("clients", "add", "Wiki", "--introspects", WIKI, *options, database=database_url)
        assert refused.returncode == 2
        assert complaint in refused.stderr

    @pytest.mark.parametrize("url", ["wiki", "http://wiki.example.com/mcp", ""])
    def test_bad_urls(self, database_url: str, url: str) -> None:
        """Its endpoint is a URL."""
        assert run("clients", "add", "Wiki", "--introspects", url, database=database_url).returncode in (1, 2)
