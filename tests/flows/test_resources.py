"""Several servers with one login: each token is good at one of them (RFC 8707)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mcp.server.auth.provider import AuthorizeError, TokenError
from pydantic import AnyHttpUrl
from sqlalchemy import update

from oauth_store import AutoApproval, ConfigurationError, SchemaError, SQLAlchemyOAuthProvider, StoreResource
from oauth_store.database.models import ACCESS, Token
from oauth_store.flows import machine
from oauth_store.flows import refresh as refreshes
from oauth_store.flows.connected import live_grants
from oauth_store.flows.machine import PresentedSecret
from oauth_store.flows.refresh import PresentedRefreshToken
from tests.databases import tokens_of, transaction
from tests.families import AUTH, FILES, WIKI, family_of, resource_on, token_for
from tests.steps import Provider, authorization_params, new_client, query_of, redeem, refresh
from tests.workers import settle

OWN = f"{AUTH}/mcp"
FamilyOnOneDatabase = tuple[SQLAlchemyOAuthProvider, dict[str, StoreResource]]
SPELLED = ["https://wiki.example.com/mcp/", "HTTPS://WIKI.example.com/mcp", WIKI]


@pytest.fixture
async def family(make_provider: Provider, database_url: str) -> AsyncIterator[FamilyOnOneDatabase]:
    """A provider on each kind of database, and the two other servers for which it issues tokens."""
    provider, resources = family_of(make_provider, database_url)
    yield provider, resources
    await settle(provider)
    await asyncio.gather(*(resource.aclose() for resource in resources.values()))


async def a_machine(provider: SQLAlchemyOAuthProvider) -> Callable[[str | None], Awaitable[str]]:
    """Register a machine, and return what gets it an access token for a resource."""
    await provider.register_client(
        new_client(
            client_id="nightly",
            client_secret="the secret of the machine",
            token_endpoint_auth_method="client_secret_post",
            grant_types=["client_credentials"],
            redirect_uris=None,
            scope="",
        )
    )

    async def granted(resource: str | None) -> str:
        asked = PresentedSecret("nightly", "the secret of the machine", "", resource)
        return (await machine.grant(provider.issuer, asked)).access_token

    return granted


class TestTarget:
    """For which server a request is."""

    @pytest.mark.parametrize("asked", SPELLED)
    async def test_named(self, family: FamilyOnOneDatabase, asked: str) -> None:
        """The one that the request names, however it is spelled; the rows have it as the owner spelled it."""
        provider, _ = family
        await token_for(provider, asked)
        assert {row.resource for row in await tokens_of(provider)} == {WIKI}

    async def test_none(self, family: FamilyOnOneDatabase) -> None:
        """Without one, it is the authorization server's own endpoint, as without other servers."""
        provider, _ = family
        await token_for(provider, None)
        assert {row.resource for row in await tokens_of(provider)} == {OWN}

    async def test_unknown(self, family: FamilyOnOneDatabase) -> None:
        """Any other is refused, wherever it is named, and nothing is stored."""
        provider, _ = family
        client = new_client()
        await provider.register_client(client)
        for asked in ("https://evil.example/mcp", "https://wiki.example.com/mcp/more", "https://wiki.example.com", "x"):
            with pytest.raises(AuthorizeError, match="does not name this server"):
                await provider.authorize(client, authorization_params(resource=asked))
        assert not await tokens_of(provider)

    async def test_a_code_stays_with_its_resource(self, family: FamilyOnOneDatabase) -> None:
        """Neither a code nor a refresh token can be turned to another server of the family."""
        provider, resources = family
        client = new_client()
        await provider.register_client(client)
        url = await provider.authorize(client, authorization_params(resource=WIKI))
        token = await redeem(provider, client, query_of(url)["code"])
        turned = PresentedRefreshToken(client.client_id, str(token.refresh_token), None, "", FILES)
        with pytest.raises(TokenError, match="resource is not the one"):
            await refreshes.refresh(provider.issuer, turned)
        token = await refresh(provider, client, token)
        assert await resources[WIKI].verify_token(token.access_token)
        assert await resources[FILES].verify_token(token.access_token) is None

    async def test_machines(self, family: FamilyOnOneDatabase) -> None:
        """A machine has one grant for each server, and none for others."""
        provider, resources = family
        granted = await a_machine(provider)
        wiki, files, again = await granted(WIKI), await granted(FILES), await granted(WIKI)
        for token, url in ((wiki, WIKI), (files, FILES), (again, WIKI)):
            assert await resources[url].verify_token(token)
        rows = {row.grant_id: row.resource for row in await tokens_of(provider)}
        assert sorted(rows.values()) == [FILES, WIKI]
        with pytest.raises(TokenError, match="does not name this server"):
            await granted("https://evil.example/mcp")

    async def test_spelled_by_the_owner(self, make_provider: Provider) -> None:
        """However the owner spells a server, its grants are found; this server's own, listed too, counts once."""
        spelled = ["HTTPS://Wiki.Example.com:443/mcp/", AnyHttpUrl(FILES), OWN]
        provider = make_provider(base_url=AUTH, resources=spelled)
        assert provider.issuer.known == (OWN, f"{WIKI}/", FILES)
        for resource in (WIKI, FILES, OWN):
            await token_for(provider, resource)
        _, total = await provider.issuer.store.read(live_grants, resources=provider.issuer.known)
        assert total == 3

    async def test_a_machine_with_a_grant_of_no_resource(self, family: FamilyOnOneDatabase) -> None:
        """A grant that began before the endpoint was known is for this server's own, and for no other."""
        provider, resources = family
        granted = await a_machine(provider)
        await granted(None)
        async with transaction(provider) as session:
            await session.execute(update(Token).values(resource=None))
        token = await granted(FILES)
        assert await resources[FILES].verify_token(token)
        assert await provider.verify_token(token) is None


class TestVerify:
    """Where a token is good."""

    async def test_all_nine_pairs(self, family: FamilyOnOneDatabase) -> None:
        """On every database, each of three tokens is good at its server alone; the subject is the same."""
        provider, resources = family
        verifiers: dict[str, Any] = {OWN: provider, **resources}
        for resource in verifiers:
            token = (await token_for(provider, resource)).access_token
            good = [url for url, verifier in verifiers.items() if await verifier.verify_token(token) is not None]
            assert good == [resource]
            again = [url for url, verifier in verifiers.items() if await verifier.verify_token(token) is not None]
            assert again == [resource]  # also when it is remembered

    async def test_a_revocation_ends_one(self, family: FamilyOnOneDatabase) -> None:
        """A revoked token is refused at the very next call of its server, and no other."""
        provider, resources = family
        tokens = {url: (await token_for(provider, url, client_id=f"client of {url}")) for url in resources}
        for url, verifier in resources.items():
            assert await verifier.verify_token(tokens[url].access_token)
        access = await provider.load_access_token(tokens[WIKI].access_token)
        assert access is not None
        await provider.revoke_token(access)
        assert await resources[WIKI].verify_token(tokens[WIKI].access_token) is None
        assert await resources[FILES].verify_token(tokens[FILES].access_token)

    async def test_a_use_elsewhere_is_a_use(self, family: FamilyOnOneDatabase) -> None:
        """The use of a token at another server is recorded, so that its predecessor no longer gets the pair."""
        provider, resources = family
        token = (await token_for(provider, WIKI)).access_token
        assert await resources[WIKI].verify_token(token)
        await settle(resources[WIKI])
        used = [row.first_used_at for row in await tokens_of(provider) if row.kind == ACCESS]
        assert None not in used

    async def test_a_token_of_no_resource(self, family: FamilyOnOneDatabase) -> None:
        """A token that came from VS-2 is good where it was, and at no other server."""
        provider, resources = family
        token = (await token_for(provider, None)).access_token
        async with transaction(provider) as session:
            await session.execute(update(Token).values(resource=None))
        assert await provider.verify_token(token)
        assert [await verifier.verify_token(token) for verifier in resources.values()] == [None, None]

    async def test_before_the_path_is_known(self, family: FamilyOnOneDatabase, database_url: str) -> None:
        """A server that does not know its endpoint yet takes no token at all."""
        provider, _ = family
        token = (await token_for(provider, WIKI)).access_token
        async with StoreResource(database_url, authorization_server=AUTH, base_url="https://wiki.example.com") as early:
            assert await early.verify_token(token) is None
            early.set_mcp_path("/mcp")
            early.set_mcp_path(None)
            assert await early.verify_token(token)

    async def test_a_stranger_on_the_database(self, family: FamilyOnOneDatabase, database_url: str) -> None:
        """A server that the provider does not name gets no tokens, and takes none."""
        provider, _ = family
        stranger = resource_on(database_url, "https://evil.example/mcp")
        for url in (None, WIKI, FILES):
            assert await stranger.verify_token((await token_for(provider, url)).access_token) is None
        await stranger.aclose()


class TestDatabase:
    """The database of another server."""

    async def test_no_file(self, tmp_path: Path) -> None:
        """A wrong path is an error that names it, and no file is made."""
        path = tmp_path / "elsewhere.db"
        async with StoreResource(path, authorization_server=AUTH, base_url="https://wiki.example.com") as resource:
            with pytest.raises(SchemaError, match=r"elsewhere\.db does not exist; start the authorization server"):
                await resource.check_schema()
        assert not path.exists()

    async def test_an_empty_database(self, empty_database_url: str) -> None:
        """On every database, an empty one is left empty, until the authorization server has created its tables."""
        if "://" not in empty_database_url:
            Path(empty_database_url).touch()
        resource = StoreResource(empty_database_url, authorization_server=AUTH, base_url="https://wiki.example.com")
        async with resource:
            with pytest.raises(SchemaError, match="is empty; start the authorization server"):
                await resource.check_schema()
        provider = SQLAlchemyOAuthProvider(empty_database_url, base_url=AUTH, approval=AutoApproval())
        async with provider, resource:
            await provider.check_schema()
            await resource.check_schema()

    def test_in_memory(self) -> None:
        """A database in memory cannot be shared."""
        with pytest.raises(ConfigurationError, match="in memory"):
            StoreResource(":memory:", authorization_server=AUTH, base_url="https://wiki.example.com")


class TestSettings:
    """What may be set."""

    @pytest.mark.parametrize(
        ("resources", "complaint"),
        [
            ("https://wiki.example.com/mcp", "expected a list"),
            (["http://wiki.example.com/mcp"], r"resources\[0\] is .*expected https"),
            ([WIKI, "wiki"], r"resources\[1\] is 'wiki'"),
            ([WIKI, f"{WIKI}/"], "twice"),
            ([f"{WIKI}?a=b"], "without a user, query or fragment"),
        ],
        ids=str,
    )
    def test_bad(self, make_provider: Provider, resources: Any, complaint: str) -> None:
        """What is no endpoint of an MCP server is an error at construction."""
        with pytest.raises(ConfigurationError, match=complaint):
            make_provider(base_url=AUTH, resources=resources)

    def test_bad_urls_of_a_resource(self, tmp_path: Path) -> None:
        """So are URLs that cannot be those of a server."""
        for settings in (
            {"authorization_server": "auth"},
            {"base_url": "http://wiki.example.com"},
            {"required_scopes": "read"},
            {"scopes_supported": "read"},
        ):
            values: dict[str, Any] = {"authorization_server": AUTH, "base_url": "https://wiki.example.com", **settings}
            with pytest.raises(ConfigurationError):
                StoreResource(tmp_path / "oauth.db", **values)
