"""The OAuth flow, step by step, on every database; and next to InMemoryOAuthProvider, where both should agree."""

import asyncio
import logging
import time
from typing import Any

import pytest
from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from mcp.server.auth.provider import AuthorizeError, RegistrationError, TokenError
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.shared.auth import InvalidScopeError, OAuthClientInformationFull
from pydantic import AnyUrl
from sqlalchemy import func, select, update

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import matches
from oauth_store.database.models import Client, Code, Token
from oauth_store.flows.clients import OwnersClient
from oauth_store.flows.redirect_uris import check_redirect_uris
from oauth_store.flows.registration import add_client
from tests.approvals import Asks
from tests.clocks import stopped, stopped_at
from tests.databases import rows_of, transaction, value_of
from tests.steps import (
    BASE_URL,
    REDIRECT_URI,
    RESOURCE,
    Provider,
    authorization_params,
    authorize,
    new_client,
    query_of,
    redeem,
    refresh,
    registered,
    registration_options,
    sign_in,
)


class SameAsInMemory:
    """What InMemoryOAuthProvider does, ours does too: the swap changes nothing else."""

    async def test_a_registered_client_is_returned_as_it_was_registered(self, either: OAuthProvider) -> None:
        """All that a client registered comes back, but for its secret."""
        client = new_client(client_name="Näme", contacts=["a@example.com"], client_uri="https://example.com/")
        await either.register_client(client)
        found = await either.get_client(client.client_id)
        assert found is not None
        assert found.model_dump(exclude={"client_secret"}) == client.model_dump(exclude={"client_secret"})

    async def test_an_unknown_client_is_none(self, either: OAuthProvider) -> None:
        """A client_id that nobody registered gives None."""
        assert await either.get_client("nobody") is None

    async def test_registering_again_replaces(self, either: OAuthProvider) -> None:
        """A second registration of a client_id replaces the first."""
        client = new_client()
        await either.register_client(client)
        await either.register_client(client.model_copy(update={"client_name": "New name"}))
        found = await either.get_client(client.client_id)
        assert found is not None
        assert found.client_name == "New name"

    async def test_authorize_redirects_with_code_and_state(self, either: OAuthProvider) -> None:
        """The redirect goes to the client's URI, with a code and its state."""
        client = await registered(either)
        url = await either.authorize(client, authorization_params(state="a b&c"))
        assert url.startswith(f"{REDIRECT_URI}?")
        assert query_of(url)["state"] == "a b&c"
        assert query_of(url)["code"]

    async def test_authorize_refuses_an_unregistered_client(self, either: OAuthProvider) -> None:
        """An unknown client gets unauthorized_client."""
        with pytest.raises(AuthorizeError) as caught:
            await either.authorize(new_client(), authorization_params())
        assert caught.value.error == "unauthorized_client"

    async def test_scopes_are_those_that_the_client_registered(self, either: OAuthProvider) -> None:
        """A scope that the client did not register is not granted."""
        client = await registered(either, scope="read")
        token = await sign_in(either, client, scopes=["read", "admin"])
        assert token.scope == "read"

    async def test_a_code_keeps_what_was_asked_for(self, either: OAuthProvider) -> None:
        """A loaded code tells the challenge, the redirect URI and the scopes of its request."""
        client = await registered(either)
        params = authorization_params(redirect_uri_provided_explicitly=False)
        code = query_of(await either.authorize(client, params))["code"]
        loaded = await either.load_authorization_code(client, code)
        assert loaded is not None
        assert loaded.code_challenge == params.code_challenge
        assert str(loaded.redirect_uri) == REDIRECT_URI
        assert loaded.redirect_uri_provided_explicitly is False
        assert loaded.scopes == ["read", "write"]
        assert loaded.client_id == client.client_id

    async def test_another_clients_code_is_none(self, either: OAuthProvider) -> None:
        """A code is no other client's."""
        client, other = await registered(either), await registered(either)
        assert await either.load_authorization_code(other, await authorize(either, client)) is None

    async def test_an_unknown_code_is_none(self, either: OAuthProvider) -> None:
        """A code that was never issued is None."""
        assert await either.load_authorization_code(await registered(either), "code_nonsense") is None

    async def test_a_code_gives_a_pair_that_works(self, either: OAuthProvider) -> None:
        """The exchange gives an access token of one hour, a refresh token, and the granted scopes."""
        client = await registered(either)
        token = await sign_in(either, client)
        assert (token.token_type, token.expires_in, token.scope) == ("Bearer", 3600, "read write")
        found = await either.verify_token(token.access_token)
        assert found is not None
        assert (found.client_id, found.scopes) == (client.client_id, ["read", "write"])
        assert found.expires_at == pytest.approx(time.time() + 3600, abs=5)

    async def test_a_code_works_once(self, either: OAuthProvider) -> None:
        """A second exchange of a code is invalid_grant."""
        client = await registered(either)
        loaded = await either.load_authorization_code(client, await authorize(either, client))
        assert loaded is not None
        await either.exchange_authorization_code(client, loaded)
        with pytest.raises(TokenError) as caught:
            await either.exchange_authorization_code(client, loaded)
        assert caught.value.error == "invalid_grant"

    async def test_a_refresh_rotates_both_tokens(self, either: OAuthProvider) -> None:
        """A refresh gives a new pair, and the old access token is dead."""
        client = await registered(either)
        first = await sign_in(either, client)
        second = await refresh(either, client, first)
        assert second.access_token != first.access_token
        assert second.refresh_token != first.refresh_token
        assert await either.verify_token(first.access_token) is None
        assert await either.verify_token(second.access_token) is not None

    async def test_a_refresh_narrows_scopes_and_never_widens_them(self, either: OAuthProvider) -> None:
        """Fewer scopes are granted; more than were authorized are invalid_scope."""
        client = await registered(either)
        token = await sign_in(either, client)
        with pytest.raises(TokenError) as caught:
            await refresh(either, client, token, ["read", "admin"])
        assert caught.value.error == "invalid_scope"
        assert (await refresh(either, client, token, ["read"])).scope == "read"

    async def test_another_clients_refresh_token_is_none(self, either: OAuthProvider) -> None:
        """A refresh token is no other client's."""
        client, other = await registered(either), await registered(either)
        token = await sign_in(either, client)
        assert await either.load_refresh_token(other, str(token.refresh_token)) is None

    async def test_unknown_tokens_are_none(self, either: OAuthProvider) -> None:
        """Tokens that were never issued are None."""
        assert await either.load_access_token("access_nonsense") is None
        assert await either.verify_token("") is None
        assert await either.load_refresh_token(await registered(either), "refresh_nonsense") is None

    @pytest.mark.parametrize("kind", ["access", "refresh"])
    async def test_revoking_either_token_ends_both(self, either: OAuthProvider, kind: str) -> None:
        """Whichever of a pair is revoked, both are dead."""
        client = await registered(either)
        token = await sign_in(either, client)
        if kind == "access":
            access = await either.load_access_token(token.access_token)
            assert access is not None
            await either.revoke_token(access)
        else:
            loaded = await either.load_refresh_token(client, str(token.refresh_token))
            assert loaded is not None
            await either.revoke_token(loaded)
        assert await either.verify_token(token.access_token) is None
        assert await either.load_refresh_token(client, str(token.refresh_token)) is None

    async def test_an_expired_access_token_is_none(self, either: OAuthProvider) -> None:
        """An access token is dead after its hour."""
        token = await sign_in(either, await registered(either))
        with stopped(3601):
            assert await either.verify_token(token.access_token) is None


class TestInMemory(SameAsInMemory):
    """The scenarios on the provider that ours takes the place of."""

    @pytest.fixture
    def either(self) -> OAuthProvider:
        return InMemoryOAuthProvider(base_url=BASE_URL)


class TestOurs(SameAsInMemory):
    """The same scenarios on ours."""

    @pytest.fixture
    def either(self, provider: SQLAlchemyOAuthProvider) -> OAuthProvider:
        return provider


async def test_an_expired_access_token_leaves_its_refresh_token_alone(provider: SQLAlchemyOAuthProvider) -> None:
    """Presenting an expired access token, as every client does just before it refreshes, does not sign it out."""
    client = await registered(provider)
    token = await sign_in(provider, client)
    with stopped(3601):
        assert await provider.load_access_token(token.access_token) is None
        assert await provider.verify_token(token.access_token) is None
        assert (await refresh(provider, client, token)).refresh_token


async def test_lifetimes_are_those_of_vs2(provider: SQLAlchemyOAuthProvider) -> None:
    """A code lives for ten minutes, an access token for an hour, a refresh token for thirty days."""
    client = await registered(provider)
    with stopped() as clock:
        start = time.time()
        code = await authorize(provider, client)
        clock.move_to(start + 599)
        assert await provider.load_authorization_code(client, code) is not None
        token = await redeem(provider, client, code)
        other = await authorize(provider, client)
        clock.move_to(start + 599 + 600)
        assert await provider.load_authorization_code(client, other) is None
        clock.move_to(start + 599 + 3599)
        assert await provider.verify_token(token.access_token) is not None
        clock.move_to(start + 599 + 3600)
        assert await provider.verify_token(token.access_token) is None
        clock.move_to(start + 599 + 30 * 86400 - 1)
        assert await provider.load_refresh_token(client, str(token.refresh_token)) is not None
        clock.move_to(start + 599 + 30 * 86400)
        assert await provider.load_refresh_token(client, str(token.refresh_token)) is None


async def test_lifetimes_are_settings(make_provider: Provider) -> None:
    """Each lifetime can be set, and a refresh starts that of the refresh token anew."""
    provider = make_provider(
        authorization_code_expiry_seconds=5, access_token_expiry_seconds=10, refresh_token_expiry_seconds=100
    )
    client = await registered(provider)
    with stopped() as clock:
        start = time.time()
        code = await authorize(provider, client)
        token = await sign_in(provider, client)
        assert token.expires_in == 10
        clock.move_to(start + 5)
        assert await provider.load_authorization_code(client, code) is None
        clock.move_to(start + 99)
        token = await refresh(provider, client, token)
        clock.move_to(start + 198)
        assert await provider.load_refresh_token(client, str(token.refresh_token)) is not None
        clock.move_to(start + 199)
        assert await provider.load_refresh_token(client, str(token.refresh_token)) is None


async def test_everything_outlives_the_provider(make_provider: Provider) -> None:
    """Clients, codes and tokens of one provider are known to the next one on the same database."""
    before = make_provider()
    client = await registered(before)
    token = await sign_in(before, client)
    code = await authorize(before, client)
    await before.aclose()

    after = make_provider()
    found = await after.get_client(client.client_id)
    assert found is not None
    assert await after.verify_token(token.access_token) is not None
    assert await after.verify_token((await redeem(after, found, code)).access_token) is not None
    assert await after.verify_token((await refresh(after, found, token)).access_token) is not None


async def test_a_replayed_code_ends_its_grant_and_no_other(provider: SQLAlchemyOAuthProvider) -> None:
    """The second exchange of a code kills the tokens of the first; another grant of the same client goes on."""
    client = await registered(provider)
    other = await sign_in(provider, client)
    loaded = await provider.load_authorization_code(client, await authorize(provider, client))
    assert loaded is not None
    token = await provider.exchange_authorization_code(client, loaded)
    with pytest.raises(TokenError):
        await provider.exchange_authorization_code(client, loaded)
    assert await provider.verify_token(token.access_token) is None
    assert await provider.load_refresh_token(client, str(token.refresh_token)) is None
    assert await provider.verify_token(other.access_token) is not None


async def test_loading_a_consumed_code_has_no_side_effects(provider: SQLAlchemyOAuthProvider) -> None:
    """A consumed code can still be loaded, so that PKCE is checked before its replay ends anything."""
    client = await registered(provider)
    code = await authorize(provider, client)
    token = await redeem(provider, client, code)
    assert await provider.load_authorization_code(client, code) is not None
    assert await provider.verify_token(token.access_token) is not None


async def test_the_handle_of_a_request_is_not_its_code(make_provider: Provider) -> None:
    """The handle that the browser carries can neither be loaded nor exchanged as a code."""
    asks = Asks("https://example.com/approve")
    provider = make_provider(approval=asks)
    client = await registered(provider)
    assert await provider.authorize(client, authorization_params()) == "https://example.com/approve"
    assert await provider.load_authorization_code(client, asks.handle) is None
    code = query_of(await provider.approve(asks.handle))["code"]
    assert code != asks.handle
    assert await provider.load_authorization_code(client, asks.handle) is None
    assert await provider.load_authorization_code(client, code) is not None


async def test_a_client_without_the_refresh_grant_gets_no_refresh_token(provider: SQLAlchemyOAuthProvider) -> None:
    """A refresh token is for clients that registered for it."""
    client = await registered(provider, grant_types=["authorization_code"])
    token = await sign_in(provider, client)
    assert token.refresh_token is None
    assert await provider.verify_token(token.access_token) is not None


async def test_a_request_without_scopes_gets_the_clients(make_provider: Provider) -> None:
    """No scope asked for means what the client registered, or else what the server requires."""
    provider = make_provider(required_scopes=["read"])
    assert (await sign_in(provider, await registered(provider), scopes=None)).scope == "read write"
    assert (await sign_in(provider, await registered(provider, scope=None), scopes=None)).scope == "read"


class TestAudience:
    """A token is good for the server that it was issued for (RFC 8707)."""

    async def test_tokens_carry_this_servers_resource(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A request without a resource is bound to this server, and so is every token that follows."""
        client = await registered(provider)
        token = await refresh(provider, client, await sign_in(provider, client))
        found = await provider.verify_token(token.access_token)
        assert found is not None
        assert found.resource == RESOURCE

    async def test_another_servers_resource_is_refused(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A request for another resource gets invalid_target."""
        client = await registered(provider)
        with pytest.raises(AuthorizeError) as caught:
            await provider.authorize(client, authorization_params(resource="https://other.example.com/mcp"))
        assert caught.value.error == "invalid_target"

    @pytest.mark.parametrize("resource", [RESOURCE, f"{RESOURCE}/", "HTTP://127.0.0.1:8000/mcp"])
    async def test_spellings_of_this_resource_are_accepted(
        self, provider: SQLAlchemyOAuthProvider, resource: str
    ) -> None:
        """The case of scheme and host, and a trailing slash, do not matter."""
        token = await sign_in(provider, await registered(provider), resource=resource)
        assert await provider.verify_token(token.access_token) is not None

    async def test_a_token_for_another_path_is_refused(self, make_provider: Provider) -> None:
        """A token that was issued for one MCP path is none at another, and its refresh is invalid_grant."""
        provider = make_provider()
        client = await registered(provider)
        token = await sign_in(provider, client)
        moved = make_provider(mcp_path="/elsewhere")
        assert await moved.verify_token(token.access_token) is None
        with pytest.raises(TokenError) as caught:
            await refresh(moved, client, token)
        assert caught.value.error == "invalid_grant"
        assert await provider.verify_token(token.access_token) is not None

    async def test_a_code_for_another_path_is_refused(self, make_provider: Provider) -> None:
        """A code that was asked for at one MCP path is invalid_grant at another, and is not used up there."""
        provider, moved = make_provider(), make_provider(mcp_path="/elsewhere")
        client = await registered(provider)
        code = await authorize(provider, client)
        with pytest.raises(TokenError) as caught:
            await redeem(moved, client, code)
        assert caught.value.error == "invalid_grant"
        token = await redeem(provider, client, code)
        assert await provider.verify_token(token.access_token) is not None

    async def test_a_null_resource_means_this_server_and_is_bound_at_the_next_refresh(
        self, provider: SQLAlchemyOAuthProvider
    ) -> None:
        """A token without a resource, as VS-2 left them, works; the next pair names this server."""
        client = await registered(provider)
        token = await sign_in(provider, client)
        async with transaction(provider) as session:
            await session.execute(update(Token).values(resource=None))
        assert await provider.verify_token(token.access_token) is not None
        found = await provider.verify_token((await refresh(provider, client, token)).access_token)
        assert found is not None
        assert found.resource == RESOURCE

    async def test_asking_for_well_known_routes_does_not_forget_the_resource(
        self, provider: SQLAlchemyOAuthProvider
    ) -> None:
        """get_well_known_routes() without a path leaves the audience check in force."""
        provider.get_well_known_routes()
        assert provider.issuer.resource == RESOURCE


class TestApprove:
    """approve() and deny(), as an approval of one's own calls them."""

    @pytest.fixture
    async def pending(self, make_provider: Provider) -> tuple[SQLAlchemyOAuthProvider, Any, str]:
        asks = Asks()
        provider = make_provider(approval=asks)
        client = await registered(provider)
        await provider.authorize(client, authorization_params())
        return provider, client, asks.handle

    async def test_the_subject_is_on_every_token(self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]) -> None:
        """Who approved is on the code, the tokens, and the tokens after a refresh."""
        provider, client, handle = pending
        code = query_of(await provider.approve(handle, subject="ada"))["code"]
        token = await refresh(provider, client, await redeem(provider, client, code))
        access = await provider.verify_token(token.access_token)
        loaded = await provider.load_refresh_token(client, str(token.refresh_token))
        assert access is not None
        assert loaded is not None
        assert (access.subject, loaded.subject) == ("ada", "ada")

    async def test_the_redirect_names_the_issuer(self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]) -> None:
        """The answer carries code, state and iss (RFC 9207), byte for byte the issuer of the metadata."""
        provider, _, handle = pending
        answer = query_of(await provider.approve(handle))
        assert set(answer) == {"code", "state", "iss"}
        assert answer["iss"] == str(provider.issuer_url)

    async def test_deny_tells_the_client(self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]) -> None:
        """Denying sends access_denied with the state, and the request cannot be approved any more."""
        provider, _, handle = pending
        answer = query_of(await provider.deny(handle))
        assert (answer["error"], answer["state"]) == ("access_denied", "the-state")
        with pytest.raises(AuthorizeError):
            await provider.approve(handle)

    async def test_allowing_again_replaces_the_unused_code(
        self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]
    ) -> None:
        """Of two approvals of one request the last code works, the first does not."""
        provider, client, handle = pending
        first = query_of(await provider.approve(handle))["code"]
        second = query_of(await provider.approve(handle))["code"]
        assert await provider.load_authorization_code(client, first) is None
        await redeem(provider, client, second)
        with pytest.raises(AuthorizeError):
            await provider.approve(handle)

    async def test_a_request_expires(self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]) -> None:
        """After ten minutes a request cannot be approved or denied."""
        provider, _, handle = pending
        with stopped(601):
            for answer in (provider.approve, provider.deny):
                with pytest.raises(AuthorizeError, match="expired"):
                    await answer(handle)

    async def test_a_request_waits_to_its_last_second(self, pending: tuple[SQLAlchemyOAuthProvider, Any, str]) -> None:
        """A request can be answered until the second in which it expires."""
        provider, _, handle = pending
        async with transaction(provider) as session:
            expires_at = (await session.execute(select(Code.expires_at))).scalar_one()
        with stopped_at(expires_at):
            for answer in (provider.approve, provider.deny):
                with pytest.raises(AuthorizeError, match="expired"):
                    await answer(handle)
        with stopped_at(expires_at - 1):
            assert "code" in query_of(await provider.approve(handle))

    async def test_a_request_survives_a_restart(
        self, pending: tuple[SQLAlchemyOAuthProvider, Any, str], make_provider: Provider
    ) -> None:
        """Another provider on the same database can approve it."""
        _, client, handle = pending
        other = make_provider()
        assert await redeem(other, client, query_of(await other.approve(handle))["code"])

    async def test_an_unknown_handle_is_refused(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A handle that names nothing approves nothing."""
        with pytest.raises(AuthorizeError):
            await provider.approve("request_nonsense")


class TestRegistration:
    """What a registration stores, and what it refuses."""

    async def test_the_secret_is_a_hash(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A client's secret is in the database, and in what is loaded, as a hash alone."""
        client = await registered(
            provider, client_secret="s3cret-of-client", token_endpoint_auth_method="client_secret_post"
        )
        assert client.client_secret is None
        assert matches("s3cret-of-client", client.secret_hash)
        (row,) = await rows_of(provider, select(Client.__table__))
        assert "s3cret-of-client" not in str(row)

    async def test_registering_again_changes_no_other_client(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A client that registers again leaves all others as they are."""
        one, other = await registered(provider), await registered(provider, client_name="Another")
        await provider.register_client(one.model_copy(update={"client_name": "New name"}))
        found = await provider.get_client(other.client_id)
        assert found is not None
        assert found.model_dump() == other.model_dump()

    async def test_scopes_that_the_server_does_not_have_are_refused(self, make_provider: Provider) -> None:
        """A registration for unknown scopes is invalid_client_metadata; offline_access is always known."""
        provider = make_provider(client_registration_options=registration_options("read"))
        await provider.register_client(new_client(scope="read offline_access"))
        with pytest.raises(RegistrationError) as caught:
            await provider.register_client(new_client(scope="read admin"))
        assert caught.value.error == "invalid_client_metadata"

    async def test_a_client_id_that_is_too_long_is_refused(self, provider: SQLAlchemyOAuthProvider) -> None:
        """512 characters are stored, 513 are invalid_client_metadata, and are not looked up either."""
        await provider.register_client(new_client(client_id="x" * 512))
        assert await provider.get_client("x" * 512) is not None
        with pytest.raises(RegistrationError):
            await provider.register_client(new_client(client_id="x" * 513))
        assert await provider.get_client("x" * 513) is None

    async def test_many_processes_may_register_one_client_at_once(self, make_provider: Provider) -> None:
        """A client that several workers register at start is registered once, without an error."""
        client = new_client()
        providers = [make_provider() for _ in range(4)]
        await asyncio.gather(*(provider.register_client(client) for provider in providers for _ in range(5)))
        assert await value_of(providers[0], select(func.count()).select_from(Client)) == 1

    async def test_client_ids_are_compared_exactly(self, provider: SQLAlchemyOAuthProvider) -> None:
        """Neither case nor trailing space may be wrong."""
        await provider.register_client(new_client(client_id="Abc"))
        for near in ("abc", "Abc ", " Abc", "ABC"):
            assert await provider.get_client(near) is None


class TestStoredClient:
    """What a registered client may ask for."""

    @pytest.mark.parametrize(
        ("asked", "granted"),
        [
            ("read", ["read"]),
            ("read write", ["read", "write"]),
            (" offline_access", ["read", "write", "offline_access"]),
            ("read  unknown\toffline_access", ["read", "offline_access"]),
            (None, ["read", "write"]),
            ("", ["read", "write"]),
        ],
    )
    async def test_scopes(self, provider: SQLAlchemyOAuthProvider, asked: str | None, granted: list[str]) -> None:
        """White space is any, what cannot be granted is dropped, and nothing asked means what the client registered."""
        client = await registered(provider)
        assert client.validate_scope(asked) == granted

    async def test_scopes_that_do_not_exist_are_refused(self, provider: SQLAlchemyOAuthProvider) -> None:
        """Where something was asked for, and nothing of it exists, nothing is granted in its place."""
        client = await registered(provider)
        with pytest.raises(InvalidScopeError, match="this server has no scope unknown"):
            client.validate_scope("unknown offline_access")

    async def test_a_registration_is_no_ceiling(self, make_provider: Provider) -> None:
        """A client that registered for less may ask for whatever the server has; one that the owner added may not."""
        options = registration_options("read", "write")
        provider = make_provider(client_registration_options=options, required_scopes=["read"])
        client = await registered(provider, scope="read")
        assert client.validate_scope("read write") == ["read", "write"]
        assert client.validate_scope("write unknown") == ["write", "read"]
        assert client.validate_scope(None) == ["read"]

    @pytest.mark.parametrize("kind", [OwnersClient, OAuthClientInformationFull], ids=["marked", "not yet marked"])
    async def test_the_owners_list_is_one(
        self, make_provider: Provider, kind: type[OAuthClientInformationFull]
    ) -> None:
        """A client that the owner added has the scopes that the owner named, before and after its first approval."""
        options = registration_options("read", "write")
        provider = make_provider(client_registration_options=options, required_scopes=["read"])
        added = kind.model_validate(new_client(scope="read").model_dump())
        await provider._store.write(add_client, added)
        for _ in range(2):
            client = await provider.get_client(added.client_id)
            assert client is not None
            assert client.validate_scope("read write") == ["read"]
            await authorize(provider, client)

    async def test_the_owner_cannot_name_what_does_not_exist(self, make_provider: Provider) -> None:
        """Of the owner's list, a client has those scopes that the server has, and no others in their place."""
        options = registration_options("read", "write")
        provider = make_provider(client_registration_options=options, required_scopes=["read"])
        clients = []
        for scope in ("write admin", "admin"):
            added = OwnersClient.model_validate(new_client(scope=scope).model_dump())
            await provider._store.write(add_client, added)
            clients.append(await provider.get_client(added.client_id))
        some, none = clients
        assert some is not None
        assert none is not None
        assert some.validate_scope(None) == ["write", "read"]
        with pytest.raises(InvalidScopeError, match="no scope admin"):
            some.validate_scope("admin")
        for asked in (None, "admin", "read"):
            with pytest.raises(InvalidScopeError, match="none of the scopes that its owner set"):
                none.validate_scope(asked)

    @pytest.mark.parametrize("scope", ["a\0b", 'a"b', "a\\b", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
    async def test_what_cannot_be_a_scope(self, provider: SQLAlchemyOAuthProvider, scope: str) -> None:
        """RFC 6749, section 3.3: it is not registered. PostgreSQL could not even store a NUL."""
        with pytest.raises(RegistrationError, match="invalid_client_metadata"):
            await registered(provider, scope=f"read {scope}")

    @pytest.mark.parametrize(
        ("registered_uri", "asked", "accepted"),
        [
            ("http://127.0.0.1:9000/callback", "http://127.0.0.1:9000/callback", True),
            ("http://127.0.0.1/callback", "http://127.0.0.1:54321/callback", True),
            ("http://localhost:1/callback", "http://localhost:2/callback", True),
            ("http://[::1]/callback", "http://[::1]:2/callback", True),
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000/", True),
            ("cursor://anysphere.cursor-mcp/oauth", "cursor://anysphere.cursor-mcp/oauth", True),
            ("https://claude.ai/api/mcp/auth_callback", "https://claude.ai/api/mcp/auth_callback", True),
            ("https://claude.ai/api/mcp/auth_callback", "https://claude.ai:8443/api/mcp/auth_callback", False),
            ("https://claude.ai/api/mcp/auth_callback", "https://claude.ai/api/mcp/auth_callback2", False),
            ("http://localhost:1/callback", "http://127.0.0.1:1/callback", False),
            ("http://localhost:1/callback", "http://user@localhost:2/callback", False),
            ("http://localhost:1/callback", "http://localhost:2/other", False),
            ("http://localhost:1/callback", "http://localhost:2/callback?x=1", False),
            ("http://localhost:1/callback", "https://localhost:2/callback", False),
            ("http://localhost:1/callback", "http://localhost.evil.example:1/callback", False),
        ],
    )
    async def test_redirect_uris(
        self, provider: SQLAlchemyOAuthProvider, registered_uri: str, asked: str, accepted: bool
    ) -> None:
        """A redirect URI is one that was registered; on loopback with any port (RFC 8252, section 7.3)."""
        client = await registered(provider, redirect_uris=[AnyUrl(registered_uri)])
        if accepted:
            assert str(client.validate_redirect_uri(AnyUrl(asked))) == str(AnyUrl(asked))
        else:
            with pytest.raises(Exception, match="not registered"):
                client.validate_redirect_uri(AnyUrl(asked))


class TestRedirectUris:
    """Where a registration may have codes sent."""

    @pytest.mark.parametrize(
        "uri",
        [
            "https://claude.ai/api/mcp/auth_callback",
            "https://wiki.example.com:8443/callback",
            "http://localhost:3118/callback",
            "http://[::1]/callback",
            "cursor://anysphere.cursor-mcp/oauth/callback",
            "vscode://vscode.github-authentication/did-authenticate",
            "vscode-insiders://vscode.github-authentication/did-authenticate",
            "com.example.app:/callback",
            "com.example.app://oauth",
            "claude://oauth/callback",
            "claude.ai:/callback",
            "zed://oauth",
            "windsurf://oauth",
            "raycast://oauth?package_name=wiki",
            "goose://oauth",
            "my-app+beta:/callback",
        ],
    )
    def test_what_is_let_in(self, uri: str) -> None:
        """https, http on loopback, and a scheme of an application's own (RFC 8252, section 7)."""
        check_redirect_uris([AnyUrl(uri)])

    @pytest.mark.parametrize(
        "uri",
        [
            *("http://wiki.example.com/cb", "ftp://evil.example/cb", "sftp://evil.example/cb", "smb://evil.example/cb"),
            *("webcal:evil.example", "webcal://evil.example/cb", "feed:evil.example", "ws://evil.example/cb"),
            *("ldap://evil.example/cb", "rtsp://evil.example/cb", "gopher://evil.example/cb", "ssh://evil.example/cb"),
            *("web+x:cb", "web+mastodon://evil.example", "svn+ssh://evil.example/cb", "git+https://evil.example/cb"),
            *("ms-msdt:/id", "ms-settings:cb", "ms-word:ofe|u|cb", "search-ms:query=x", "microsoft-edge:cb"),
            *("javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "vbscript:x", "blob:https://x/y"),
            *("about:blank", "view-source:https://evil.example/", "chrome://settings", "jar:https://evil.example!/x"),
            *("chrome-extension://abc/cb", "intent://evil.example#Intent", "android-app://evil.example/cb"),
            *("mailto:ada@evil.example", "tel:+1", "sms:+1", "sip:evil.example", "magnet:?xt=x", "itms-services://x"),
            *("WEBCAL:evil.example", "Ms-Msdt:/id"),
            *("cursor://evil.example:8080/cb", "cursor://ada@evil.example/cb", "cursor:////evil.example/cb"),
            *("cursor:\\\\evil.example\\cb", "cursor:/\\evil.example/cb"),
            *("googlechrome://evil.example/cb", "googlechromes://evil.example/cb", "x-safari-https://evil.example/cb"),
            *("touch-https://evil.example", "opera-https://evil.example", "firefox://open-url?x", "firefox-focus://x"),
            *("googlechrome-x-callback://x-callback-url/open/", "steam://openurl/x", "jnlp:x", "jnlps:x", "onenote:x"),
            *("ssh2://evil.example", "nfs4://evil.example", "cifs2://evil.example", "afpovertcp://evil.example"),
            *(
                "matrix:x",
                "openpgp4fpr:x",
                "urn:ietf:wg:oauth:2.0:oob",
                "did:x",
                "ext+x:cb",
                "s3://evil.example/cb",
                "eppc://evil.example/",
                "ftpes://evil.example/",
                "macappstores://x",
                "puffin://evil.example/x",
                "vlc://x",
                "zed:open?url=//evil.example",
                "zed:open?url=https:%5C%5Cevil.example",
                "zed:/x/%2Fevil.example",
                "zed://open?url=https://evil.example",
                "zed://open/https:%2F%2Fevil.example",
                "zed:open?url=http%3a%2f/x",
            ),
        ],
    )
    def test_what_is_not(self, uri: str) -> None:
        """A scheme of the web's, of another protocol or of the system's leads away from the app, as a port does."""
        with pytest.raises(RegistrationError, match="invalid_redirect_uri"):
            check_redirect_uris([AnyUrl(uri)])


async def test_no_secret_is_logged(provider: SQLAlchemyOAuthProvider, caplog: pytest.LogCaptureFixture) -> None:
    """No log line of a flow has a token, a code, a state or a client secret: at no level, and of no library."""
    caplog.set_level(logging.DEBUG)
    secret = "the-secret-of-this-client"
    client = await registered(provider, client_secret=secret, token_endpoint_auth_method="client_secret_post")
    url = await provider.authorize(client, authorization_params(state="a-very-private-state"))
    code = query_of(url)["code"]
    first = await redeem(provider, client, code)
    second = await refresh(provider, client, first)
    await refresh(provider, client, first)
    loaded = await provider.load_refresh_token(client, str(second.refresh_token))
    assert loaded is not None
    await provider.revoke_token(loaded)
    await provider.aclose()
    assert "revoked" in caplog.text
    secrets = [secret, "a-very-private-state", code, first.access_token, first.refresh_token, second.access_token]
    for value in [*secrets, second.refresh_token]:
        assert str(value) not in caplog.text


async def test_a_code_is_dead_once_its_client_is_gone(provider: SQLAlchemyOAuthProvider) -> None:
    """A client that was deleted between approval and exchange gets invalid_client, and no token."""
    client = await registered(provider)
    loaded = await provider.load_authorization_code(client, await authorize(provider, client))
    assert loaded is not None
    async with transaction(provider) as session:
        await session.execute(Client.__table__.delete())  # type: ignore[attr-defined]
    with pytest.raises(TokenError) as caught:
        await provider.exchange_authorization_code(client, loaded)
    assert caught.value.error == "invalid_client"
    assert await value_of(provider, select(func.count()).select_from(Token)) == 0
    assert await value_of(provider, select(Code.consumed_at)) is None


async def test_registration_and_revocation_are_on_by_default() -> None:
    """Without options clients can register and revoke: Claude could not connect otherwise."""
    provider = SQLAlchemyOAuthProvider(":memory:", base_url=BASE_URL)
    paths = {route.path for route in provider.get_routes("/mcp")}
    assert {"/register", "/revoke", "/token", "/authorize"} <= paths
    closed = SQLAlchemyOAuthProvider(
        ":memory:", base_url=BASE_URL, client_registration_options=ClientRegistrationOptions(enabled=False)
    )
    assert "/register" not in {route.path for route in closed.get_routes("/mcp")}
