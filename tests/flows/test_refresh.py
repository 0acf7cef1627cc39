"""The refresh state machine, row by row: which answer a presented refresh token gets."""

import asyncio
import itertools
import logging
import sqlite3
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from mcp.server.auth.provider import AuthorizeError, TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import Row, delete, func, select, update

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret, mint
from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS
from oauth_store.database.models import Client, Token
from oauth_store.database.purge import purge
from oauth_store.errors import LostRaceError
from oauth_store.flows import refresh as refresh_flow
from oauth_store.flows.tokens import presented, update_one
from oauth_store.sealing import seal, unseal
from tests.approvals import Owner
from tests.clocks import Clock
from tests.databases import rows_of, tokens_of, transaction, value_of
from tests.steps import BASE_URL, RESOURCE, Provider, authorize, new_client, provider_on, registered, sign_in
from tests.workers import Processes, answer, present_code, present_refresh_token, refresh_with_tasks, settle

ACCESS_EXPIRY, REFRESH_EXPIRY, GRACE = 3600, 30 * 24 * 3600, 120  # the defaults


async def refused(step: Awaitable[OAuthToken]) -> None:
    """Take a step that must end in `invalid_grant`."""
    with pytest.raises(TokenError) as caught:
        await step
    assert caught.value.error == "invalid_grant"


async def use(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> None:
    """Present an access token, and wait until that is stored."""
    assert await provider.verify_token(token.access_token) is not None
    await settle(provider)


async def row_of(provider: SQLAlchemyOAuthProvider, secret: str | None) -> Row[Any]:
    """The row of a token."""
    (row,) = await rows_of(provider, select(Token.__table__).where(Token.token_hash == hash_secret(str(secret))))
    return row


async def purged(provider: SQLAlchemyOAuthProvider, access_token: str) -> None:
    """Purge, now that an access token has expired, and make sure that it is gone."""
    await settle(provider)
    async with transaction(provider) as session:
        await session.run_sync(purge, int(time.time()))
    gone = select(Token.token_hash).where(Token.token_hash == hash_secret(access_token))
    assert await rows_of(provider, gone) == []


async def is_live(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, token: OAuthToken) -> bool:
    """Whether a pair can be used: the access token verifies, and the refresh token refreshes. This uses it up."""
    verified = await provider.verify_token(token.access_token) is not None
    refreshed = isinstance(await answer(present_refresh_token(provider, client, token.refresh_token)), OAuthToken)
    assert verified == refreshed
    return verified


class TestLive:
    """A live refresh token is rotated."""

    async def test_a_new_pair_takes_the_place_of_the_old_one(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """The old access token is refused at once; both tokens of the new pair are new, and work."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert await provider.verify_token(first.access_token) is None
        assert await provider.load_access_token(first.access_token) is None
        assert not {first.access_token, first.refresh_token} & {second.access_token, second.refresh_token}
        assert second.expires_in == ACCESS_EXPIRY
        assert second.scope == "read write"
        assert second.token_type == "Bearer"
        assert await is_live(provider, client, second)

    async def test_it_stays_in_its_grant(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Tokens of one grant carry one grant_id through all rotations, and the two of a pair name each other."""
        token = await sign_in(provider, client)
        grant_id = (await row_of(provider, token.access_token)).grant_id
        for _ in range(3):
            token = await present_refresh_token(provider, client, token.refresh_token)
            access, refresh = await row_of(provider, token.access_token), await row_of(provider, token.refresh_token)
            assert access.grant_id == refresh.grant_id == grant_id
            assert access.paired_hash == refresh.token_hash
            assert refresh.paired_hash == access.token_hash

    async def test_the_refresh_token_keeps_the_original_scopes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A refresh narrows the access token alone, so that the next one may ask for all again (RFC 6749, 6)."""
        first = await sign_in(provider, client)
        narrowed = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        assert narrowed.scope == "read"
        access = await provider.verify_token(narrowed.access_token)
        assert access is not None
        assert access.scopes == ["read"]
        refresh = await provider.load_refresh_token(client, str(narrowed.refresh_token))
        assert refresh is not None
        assert refresh.scopes == ["read", "write"]
        other = await present_refresh_token(provider, client, narrowed.refresh_token, ["write"])
        assert other.scope == "write"
        whole = await present_refresh_token(provider, client, other.refresh_token)
        assert whole.scope == "read write"

    async def test_more_scopes_than_were_granted(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Asking for more is `invalid_scope`, also after a refresh, and costs nothing: the pair stays live."""
        first = await sign_in(provider, client, scopes=["read"])
        second = await present_refresh_token(provider, client, first.refresh_token)
        stored = await tokens_of(provider)
        with pytest.raises(TokenError) as caught:
            await present_refresh_token(provider, client, second.refresh_token, ["read", "write"])
        assert caught.value.error == "invalid_scope"
        assert await tokens_of(provider) == stored
        assert await is_live(provider, client, second)

    async def test_resource_and_subject_are_carried(self, make_provider: Provider) -> None:
        """Whom and what the owner approved stays with every token of the grant."""
        provider = make_provider(approval=Owner(itertools.repeat("the owner")))
        client = await registered(provider)
        token = await sign_in(provider, client)
        for _ in range(3):
            token = await present_refresh_token(provider, client, token.refresh_token)
            access = await provider.verify_token(token.access_token)
            refresh = await provider.load_refresh_token(client, str(token.refresh_token))
            assert access is not None
            assert refresh is not None
            assert access.subject == refresh.subject == "the owner"
            assert access.resource == refresh.resource == RESOURCE

    async def test_a_token_without_resource_is_bound_to_this_server(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Tokens that came from VS-2 name no resource: the next refresh makes it this server's."""
        first = await sign_in(provider, client)
        async with transaction(provider) as session:
            await session.execute(update(Token).values(resource=None))
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert (await row_of(provider, second.access_token)).resource == RESOURCE
        assert (await row_of(provider, second.refresh_token)).resource == RESOURCE

    async def test_a_resource_stays_as_it_was_written(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A resource that names this server in another spelling is carried to the letter."""
        first = await sign_in(provider, client)
        async with transaction(provider) as session:
            await session.execute(update(Token).values(resource=f"{RESOURCE}/"))
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert (await row_of(provider, second.access_token)).resource == f"{RESOURCE}/"
        assert (await row_of(provider, second.refresh_token)).resource == f"{RESOURCE}/"

    async def test_lifetimes_count_from_the_last_refresh(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A client that refreshes before each refresh token's last second stays authorized for ever."""
        token = await sign_in(provider, client)
        for _ in range(5):
            clock.shift(REFRESH_EXPIRY - 1)
            assert await provider.verify_token(token.access_token) is None
            token = await present_refresh_token(provider, client, token.refresh_token)
        clock.shift(ACCESS_EXPIRY - 1)
        assert await provider.verify_token(token.access_token) is not None
        clock.shift(1)
        assert await provider.verify_token(token.access_token) is None

    async def test_an_expired_access_token_does_not_matter(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Presenting an expired access token leaves its refresh token alone; so does purging it."""
        first = await sign_in(provider, client)
        clock.shift(ACCESS_EXPIRY)
        assert await provider.verify_token(first.access_token) is None
        await purged(provider, first.access_token)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert await is_live(provider, client, second)

    async def test_who_was_overtaken_gets_nothing_new(
        self, make_provider: Provider, client: OAuthClientInformationFull
    ) -> None:
        """A refresh that another one overtakes, after it looked the token up, loses the race and leaves no row."""
        one, other = make_provider(), make_provider()
        first = await sign_in(one, client)
        secret, now = str(first.refresh_token), int(time.time())
        async with transaction(one, locks=False) as session:
            query = refresh_flow._client_and_token
            _, row = await session.run_sync(presented, query, one.issuer, client.client_id, secret, now)
            assert row is not None
            second = await present_refresh_token(other, client, secret)
            values = {"b_hash": row.token_hash, "b_granted": row.scopes, "b_replay": None, "b_now": now}
            with pytest.raises(LostRaceError):
                await session.run_sync(update_one, refresh_flow._consume, **values)
        assert len(await tokens_of(one)) == 4
        assert await is_live(other, client, second)

    async def test_it_concerns_no_other_grant(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A refresh, and the first use of its pair, change no row of another device, of this client or another."""
        other = await registered(provider)
        untouched = [await sign_in(provider, client), await sign_in(provider, other)]
        secrets = [secret for pair in untouched for secret in (pair.access_token, pair.refresh_token)]
        stored = [await row_of(provider, secret) for secret in secrets]
        token = await present_refresh_token(provider, client, (await sign_in(provider, client)).refresh_token)
        await use(provider, token)
        assert [await row_of(provider, secret) for secret in secrets] == stored
        for pair in untouched:
            assert await provider.verify_token(pair.access_token) is not None

    async def test_its_first_use_is_stored(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """`first_used_at` says when either of a pair was first presented: to a server, or to be refreshed."""
        first = await sign_in(provider, client)
        clock.shift(10)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert (await row_of(provider, first.refresh_token)).first_used_at == int(time.time())
        used_at = int(time.time())
        await use(provider, second)
        clock.shift(10)
        await use(provider, second)
        await present_refresh_token(provider, client, second.refresh_token)
        assert (await row_of(provider, second.access_token)).first_used_at == used_at
        assert (await row_of(provider, second.refresh_token)).first_used_at == used_at

    async def test_only_the_presented_token_opens_what_is_sealed(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """The new pair stands in the row of the presented token alone, and opens with that token alone."""
        first = await sign_in(provider, client)
        assert (await row_of(provider, first.refresh_token)).replay is None
        second = await present_refresh_token(provider, client, first.refresh_token)
        sealed = (await row_of(provider, first.refresh_token)).replay
        assert unseal(str(first.refresh_token), sealed) == (second.access_token, second.refresh_token)
        for secret in (first.access_token, second.access_token, str(second.refresh_token)):
            assert (await row_of(provider, secret)).replay is None
            with pytest.raises(InvalidTag):
                unseal(secret, sealed)

    async def test_refreshes_in_quick_succession(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """However fast the refreshes come, the last refresh token that was consumed is answered again."""
        tokens = [await sign_in(provider, client)]
        for n in range(6):
            clock.shift(n % 2)
            tokens.append(await present_refresh_token(provider, client, tokens[-1].refresh_token))
            await use(provider, tokens[-1])
            again = await present_refresh_token(provider, client, tokens[-2].refresh_token)
            assert again.access_token == tokens[-1].access_token

    async def test_a_client_that_does_not_refresh(self, provider: SQLAlchemyOAuthProvider) -> None:
        """A client that registered without `refresh_token` gets no refresh token, and its access token works."""
        client = await registered(provider, grant_types=["authorization_code"])
        token = await sign_in(provider, client)
        assert token.refresh_token is None
        await use(provider, token)
        assert (await row_of(provider, token.access_token)).paired_hash is None

    @pytest.mark.parametrize("other", ["access_token", "code"])
    async def test_only_a_refresh_token_refreshes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, other: str
    ) -> None:
        """Another kind of secret is not taken for a refresh token, nor a refresh token for an access token."""
        code = await authorize(provider, client)
        token = await present_code(provider, client, code)
        loaded = await provider.load_refresh_token(client, str(token.refresh_token))
        assert loaded is not None
        secret = token.access_token if other == "access_token" else code
        await refused(present_refresh_token(provider, client, secret))
        await refused(provider.exchange_refresh_token(client, loaded.model_copy(update={"token": secret}), ["read"]))
        assert await provider.verify_token(str(token.refresh_token)) is None
        assert await is_live(provider, client, token)


class TestWithinGrace:
    """A refresh token that was consumed less than the grace ago is answered with the same pair again."""

    async def test_the_same_pair_with_what_is_left_of_its_time(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """The tokens and the scope are those of the first answer, `expires_in` is recomputed, nothing is stored."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        stored = await tokens_of(provider)
        for _ in range(3):
            clock.shift(30)
            again = await present_refresh_token(provider, client, first.refresh_token)
            assert again.model_dump(exclude={"expires_in"}) == second.model_dump(exclude={"expires_in"})
            assert again.expires_in == await time_left(provider, second)
        assert again.expires_in == ACCESS_EXPIRY - 90
        assert await tokens_of(provider) == stored
        assert await is_live(provider, client, second)

    async def test_its_successor_may_be_in_use(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Whoever comes second, while the first already works with the new access token, gets the same pair."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(GRACE - 1)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again.access_token == second.access_token
        assert again.refresh_token == second.refresh_token

    async def test_a_narrowed_pair(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """`scope` is as it was granted, in whatever order and however often the scopes are asked for again."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        clock.shift(1)
        again = await present_refresh_token(provider, client, first.refresh_token, ["read", "read"])
        assert again.access_token == second.access_token
        assert again.scope == "read"
        third = await present_refresh_token(provider, client, second.refresh_token, ["read", "write"])
        again = await present_refresh_token(provider, client, second.refresh_token, ["write", "read"])
        assert again.access_token == third.access_token
        assert again.scope == "read write"

    @pytest.mark.parametrize("providers", [1, 2])
    async def test_fifty_at_once(
        self, make_provider: Provider, client: OAuthClientInformationFull, providers: int
    ) -> None:
        """Fifty tasks, on one provider or on two, present one refresh token: one rotation, one pair for all."""
        several = [make_provider() for _ in range(providers)]
        first = await sign_in(several[0], client)
        answers = await asyncio.gather(
            *(present_refresh_token(several[n % providers], client, first.refresh_token) for n in range(50))
        )
        assert len({(token.access_token, token.refresh_token, token.scope) for token in answers}) == 1
        assert len(await tokens_of(several[0])) == 4
        assert await is_live(several[-1], client, answers[0])

    async def test_other_scopes_than_the_pair_has(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A second request that asks for other scopes is refused, whether more or fewer, and nothing is revoked."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        stored = await tokens_of(provider)
        for scopes in (["write"], ["read", "write"], []):
            await refused(present_refresh_token(provider, client, first.refresh_token, scopes))
        assert await tokens_of(provider) == stored
        again = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        assert again.access_token == second.access_token
        assert await is_live(provider, client, second)

    async def test_fifty_at_once_that_want_different_scopes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Those who ask like the first get its pair, the others are refused, and nobody is signed out."""
        first = await sign_in(provider, client)
        wanted = [["read"], ["read", "write"]] * 25
        answers = await asyncio.gather(
            *(answer(present_refresh_token(provider, client, first.refresh_token, scopes)) for scopes in wanted)
        )
        pairs = {token.access_token: token for token in answers if isinstance(token, OAuthToken)}
        assert len(pairs) == 1
        assert answers.count("invalid_grant") == 25
        assert await is_live(provider, client, *pairs.values())

    async def test_its_successor_is_consumed(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Once the successor was refreshed too, its predecessor gets the pair that is live now; nothing is stored."""
        first = await sign_in(provider, client)
        newest = await present_refresh_token(provider, client, first.refresh_token)
        for _ in range(3):
            newest = await present_refresh_token(provider, client, newest.refresh_token)
        clock.shift(GRACE - 1)
        stored = await tokens_of(provider)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert (again.access_token, again.refresh_token) == (newest.access_token, newest.refresh_token)
        assert await tokens_of(provider) == stored
        clock.shift(1)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert not await is_live(provider, client, newest)

    async def test_it_is_many_generations_behind(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A chain is followed so far and no further: the answer is an error then, and the grant lives."""
        first = newest = await sign_in(provider, client)
        for _ in range(refresh_flow.GENERATIONS + 2):
            newest = await present_refresh_token(provider, client, newest.refresh_token)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert await is_live(provider, client, newest)

    async def test_a_pair_in_use_is_told_with_a_warning(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A second holder of the token gets the pair that the first one uses: the log says so, as a warning."""
        caplog.set_level(logging.INFO, "oauth_store")
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await present_refresh_token(provider, client, first.refresh_token)
        assert caplog.records[-1].levelno == logging.INFO
        assert await provider.verify_token(second.access_token)
        await settle(provider)
        await present_refresh_token(provider, client, first.refresh_token)
        assert caplog.records[-1].levelno == logging.WARNING
        assert caplog.records[-1].event == "used_pair_replayed"  # type: ignore[attr-defined]  # a field of ours

    async def test_its_successor_is_revoked(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A successor whose row says that it is revoked is never handed out; nothing more is revoked."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        successor = Token.token_hash.in_([hash_secret(second.access_token), hash_secret(str(second.refresh_token))])
        async with transaction(provider) as session:
            await session.execute(update(Token).where(successor).values(revoked_at=1))
        stored = await tokens_of(provider)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert await tokens_of(provider) == stored

    async def test_a_clock_that_was_set_back(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Tokens from the future, after the clock was set back, are answered again and refreshed as ever."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(-24 * 3600)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again.access_token == second.access_token
        third = await present_refresh_token(provider, client, second.refresh_token)
        assert third.expires_in == ACCESS_EXPIRY
        assert await is_live(provider, client, third)

    async def test_the_access_token_s_lifetime_caps_the_grace(self, make_provider: Provider, clock: Clock) -> None:
        """With access tokens that are shorter than the grace, a replay is reuse as soon as they have expired."""
        provider = make_provider(access_token_expiry_seconds=60)
        client = await registered(provider)
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(59)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again.access_token == second.access_token
        assert again.expires_in == 1
        clock.shift(1)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert (await row_of(provider, second.refresh_token)).revoked_reason == "reuse detected"


async def time_left(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> int:
    """Seconds until an access token expires."""
    return int((await row_of(provider, token.access_token)).expires_at - time.time())


class TestLostAnswer:
    """A refresh token that was consumed long ago, whose successor was never used, is answered again all the same."""

    async def test_the_same_pair(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Half an access token's lifetime later, the pair comes with what is left of its time."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        clock.shift(ACCESS_EXPIRY // 2)
        stored = await tokens_of(provider)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again == second.model_copy(update={"expires_in": ACCESS_EXPIRY // 2})
        assert await tokens_of(provider) == stored
        assert await is_live(provider, client, again)

    @pytest.mark.parametrize("is_purged", [False, True])
    async def test_its_access_token_has_expired(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock, is_purged: bool
    ) -> None:
        """Weeks later, `expires_in` is 0, purged or not, and the client refreshes with the refresh token it now has."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        clock.shift(REFRESH_EXPIRY - 1)
        if is_purged:
            await purged(provider, second.access_token)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again == second.model_copy(update={"expires_in": 0})
        assert await provider.verify_token(again.access_token) is None
        third = await present_refresh_token(provider, client, again.refresh_token)
        assert await is_live(provider, client, third)

    async def test_its_narrowed_access_token_is_purged(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """What a purged access token was good for is forgotten: the refresh token is what counts."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        clock.shift(ACCESS_EXPIRY)
        await refused(present_refresh_token(provider, client, first.refresh_token, ["write"]))
        await purged(provider, second.access_token)
        for scopes in (["read"], ["write"], None):
            again = await present_refresh_token(provider, client, first.refresh_token, scopes)
            assert (again.access_token, again.refresh_token) == (second.access_token, second.refresh_token)
            assert again.expires_in == 0
        third = await present_refresh_token(provider, client, second.refresh_token)
        assert third.scope == "read write"

    async def test_other_scopes_than_the_pair_has(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Asking for other scopes than those of the lost answer is refused, and is no reuse."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        clock.shift(GRACE)
        stored = await tokens_of(provider)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert await tokens_of(provider) == stored
        again = await present_refresh_token(provider, client, first.refresh_token, ["read"])
        assert again.refresh_token == second.refresh_token

    async def test_its_refresh_token_has_expired(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A pair that is dead, after its lifetime was shortened, is not handed out any more."""
        before, after = make_provider(), make_provider(refresh_token_expiry_seconds=ACCESS_EXPIRY)
        first = await sign_in(before, client)
        second = await present_refresh_token(after, client, first.refresh_token)
        clock.shift(ACCESS_EXPIRY - 1)
        again = await present_refresh_token(after, client, first.refresh_token)
        assert again == second.model_copy(update={"expires_in": 1})
        clock.shift(1)
        await refused(present_refresh_token(after, client, first.refresh_token))

    async def test_answers_are_lost_again_and_again(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A client that hears nothing for two weeks, and then does, is still authorized; so it is the next time."""
        token = await sign_in(provider, client)
        for _ in range(4):
            lost = await present_refresh_token(provider, client, token.refresh_token)
            for _ in range(14):
                clock.shift(24 * 3600)
                again = await present_refresh_token(provider, client, token.refresh_token)
                assert (again.access_token, again.refresh_token) == (lost.access_token, lost.refresh_token)
            token = lost
        assert isinstance(await present_refresh_token(provider, client, token.refresh_token), OAuthToken)

    async def test_looking_is_not_using(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """`load_access_token` and `load_refresh_token` have no side effects: the pair counts as never used."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        stored = await tokens_of(provider)
        assert await provider.load_access_token(second.access_token) is not None
        assert await provider.load_refresh_token(client, str(second.refresh_token)) is not None
        await provider.aclose()  # if they had queued anything, it would be done now
        assert await tokens_of(provider) == stored
        clock.shift(GRACE)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again.access_token == second.access_token


class TestReuse:
    """A refresh token that was consumed long ago, and whose successor was used, is reused: a sign of theft."""

    @pytest.mark.parametrize("used_by", ["verification", "refresh", "both"])
    async def test_the_grant_ends(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock, used_by: str
    ) -> None:
        """Every token of the grant is revoked, and says why, however the successor was used."""
        tokens = [await sign_in(provider, client)]
        tokens.append(await present_refresh_token(provider, client, tokens[0].refresh_token))
        if used_by != "refresh":
            await use(provider, tokens[1])
        if used_by != "verification":
            tokens.append(await present_refresh_token(provider, client, tokens[1].refresh_token))
        clock.shift(GRACE)
        now = int(time.time())
        await refused(present_refresh_token(provider, client, tokens[0].refresh_token))
        for token in tokens:
            assert await provider.verify_token(token.access_token) is None
            assert await provider.load_refresh_token(client, str(token.refresh_token)) is None
            await refused(present_refresh_token(provider, client, token.refresh_token))
            for secret in (token.access_token, token.refresh_token):
                row = await row_of(provider, secret)
                assert (row.revoked_at, row.revoked_reason, row.replay) == (now, "reuse detected", None)

    async def test_just_within_and_just_after_the_grace(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """The grace lasts to its last second, and not one longer."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(GRACE - 1)
        again = await present_refresh_token(provider, client, first.refresh_token)
        assert again.access_token == second.access_token
        clock.shift(1)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert not await is_live(provider, client, second)

    async def test_a_clock_that_was_ahead_does_not_stretch_the_grace(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Tokens that a clock stamped a year ahead are refreshed once it is back, and one that was used is reuse."""
        clock.shift(366 * 86400)
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        clock.shift(-366 * 86400)
        lost = await present_refresh_token(provider, client, first.refresh_token)
        assert lost.refresh_token == second.refresh_token
        third = await present_refresh_token(provider, client, second.refresh_token)
        clock.shift(GRACE)
        assert await is_live(provider, client, third)
        await refused(present_refresh_token(provider, client, first.refresh_token))

    async def test_the_use_is_remembered_longer_than_the_access_token(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """An access token that was used, expired and purged has left its mark on the refresh token's row."""
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(ACCESS_EXPIRY)
        await purged(provider, second.access_token)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert (await row_of(provider, second.refresh_token)).revoked_reason == "reuse detected"

    async def test_closing_the_provider_stores_the_use(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A server that is stopped right after a request still stores that its token was used."""
        provider = make_provider()
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert await provider.verify_token(second.access_token) is not None
        await provider.aclose()
        clock.shift(GRACE)
        await refused(present_refresh_token(make_provider(), client, first.refresh_token))
        assert not await is_live(provider, client, second)

    async def test_an_older_one_of_a_long_chain(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Any refresh token of the past will do, however many rotations ago it was."""
        tokens = [await sign_in(provider, client)]
        for _ in range(10):
            clock.shift(GRACE)
            tokens.append(await present_refresh_token(provider, client, tokens[-1].refresh_token))
        await refused(present_refresh_token(provider, client, tokens[3].refresh_token))
        assert not await is_live(provider, client, tokens[-1])

    async def test_the_grant_and_only_the_grant(self, provider: SQLAlchemyOAuthProvider, clock: Clock) -> None:
        """Another device with the same client_id stays signed in, and so does another client."""
        shared, other = await registered(provider), await registered(provider)
        stolen, second_device, other_client = [await sign_in(provider, client) for client in (shared, shared, other)]
        second = await present_refresh_token(provider, shared, stolen.refresh_token)
        await use(provider, second)
        clock.shift(GRACE)
        await refused(present_refresh_token(provider, shared, stolen.refresh_token))
        assert not await is_live(provider, shared, second)
        assert await is_live(provider, shared, second_device)
        assert await is_live(provider, other, other_client)

    async def test_the_log_names_the_grant_and_no_secret(
        self,
        provider: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """One warning says that the grant was revoked; nothing that was logged on the way holds a token or a code."""
        caplog.set_level(logging.DEBUG)
        code = await authorize(provider, client)
        first = await present_code(provider, client, code)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await present_refresh_token(provider, client, first.refresh_token)
        await use(provider, second)
        clock.shift(GRACE)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        grant_id = (await row_of(provider, first.refresh_token)).grant_id
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == [
            f"refresh token reused, grant revoked: grant_id={grant_id.hex()} client_id={client.client_id}"
        ]
        secrets = [code, first.access_token, first.refresh_token, second.access_token, second.refresh_token]
        assert [secret for secret in secrets if str(secret) in caplog.text] == []

    async def test_fifty_reuses_at_once(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Fifty reuses at once, on two providers, while the live token is refreshed too, leave nothing alive."""
        one, two = make_provider(), make_provider()
        first = await sign_in(one, client)
        second = await present_refresh_token(one, client, first.refresh_token)
        await use(one, second)
        clock.shift(GRACE)
        steps = [present_refresh_token(one if n % 2 else two, client, first.refresh_token) for n in range(50)]
        steps.insert(10, present_refresh_token(one, client, second.refresh_token))
        answers = await asyncio.gather(*map(answer, steps))
        assert answers.count("invalid_grant") >= 50
        alive = select(func.count()).select_from(Token).where(Token.revoked_at.is_(None))
        assert await value_of(one, alive) == 0


class TestNoGrace:
    """`refresh_grace_seconds=0`: a refresh token is answered once."""

    async def test_nothing_is_sealed(self, make_provider: Provider, clock: Clock) -> None:
        """No row holds a pair, and a second presentation is reuse at once, whether the successor was used or not."""
        provider = make_provider(refresh_grace_seconds=0)
        client = await registered(provider)
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert (await row_of(provider, first.refresh_token)).replay is None
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert not await is_live(provider, client, second)

    async def test_fifty_at_once(self, make_provider: Provider) -> None:
        """One gets a pair, and the others end its grant."""
        provider = make_provider(refresh_grace_seconds=0)
        client = await registered(provider)
        first = await sign_in(provider, client)
        answers = await asyncio.gather(
            *(answer(present_refresh_token(provider, client, first.refresh_token)) for _ in range(50))
        )
        pairs = [token for token in answers if isinstance(token, OAuthToken)]
        assert len(pairs) == 1
        assert answers.count("invalid_grant") == 49
        assert not await is_live(provider, client, pairs[0])

    async def test_a_clock_that_was_set_back(self, make_provider: Provider, clock: Clock) -> None:
        """A second presentation is reuse, though the clock says that the first is yet to come."""
        provider = make_provider(refresh_grace_seconds=0)
        client = await registered(provider)
        first = await sign_in(provider, client)
        second = await present_refresh_token(provider, client, first.refresh_token)
        clock.shift(-60)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert not await is_live(provider, client, second)

    async def test_what_was_sealed_before(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A server that is restarted with no grace does not answer again what it sealed when it had one."""
        before, after = make_provider(), make_provider(refresh_grace_seconds=0)
        first = await sign_in(before, client)
        second = await present_refresh_token(before, client, first.refresh_token)
        await refused(present_refresh_token(after, client, first.refresh_token))
        assert not await is_live(after, client, second)

    async def test_what_was_not_sealed_before(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A server that is restarted with a grace has nothing to answer with, and inside the grace revokes nothing."""
        before, after = make_provider(refresh_grace_seconds=0), make_provider()
        first = await sign_in(before, client)
        second = await present_refresh_token(before, client, first.refresh_token)
        await refused(present_refresh_token(after, client, first.refresh_token))
        assert await is_live(after, client, second)


class TestDead:
    """What is unknown, expired, revoked, of another client or of another resource: `invalid_grant`, and no change."""

    async def test_unknown(self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull) -> None:
        """A refresh token that was never issued, or is none."""
        await sign_in(provider, client)
        stored = await tokens_of(provider)
        for secret in (mint("refresh"), "", "refresh_\N{GRINNING FACE}", "x" * 100_000):
            await refused(present_refresh_token(provider, client, secret))
        assert await tokens_of(provider) == stored

    @pytest.mark.parametrize("consumed", [False, True])
    async def test_expired(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock, consumed: bool
    ) -> None:
        """From its expiry on a refresh token is dead, consumed or not, and its reuse is no longer told apart."""
        first = await sign_in(provider, client)
        if consumed:
            clock.shift(REFRESH_EXPIRY - 1)
            second = await present_refresh_token(provider, client, first.refresh_token)
            await use(provider, second)
            clock.shift(1)
        else:
            clock.shift(REFRESH_EXPIRY)
        stored = await tokens_of(provider)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        assert await tokens_of(provider) == stored
        if consumed:
            assert await is_live(provider, client, second)

    async def test_it_expires_between_load_and_exchange(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """The exchange looks at the clock again."""
        first = await sign_in(provider, client)
        clock.shift(REFRESH_EXPIRY - 1)
        loaded = await provider.load_refresh_token(client, str(first.refresh_token))
        assert loaded is not None
        clock.shift(1)
        stored = await tokens_of(provider)
        await refused(provider.exchange_refresh_token(client, loaded, loaded.scopes))
        assert await tokens_of(provider) == stored

    @pytest.mark.parametrize("consumed", [False, True])
    async def test_revoked(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock, consumed: bool
    ) -> None:
        """A revoked refresh token is dead, also if it was loaded before."""
        first = await sign_in(provider, client)
        loaded = await provider.load_refresh_token(client, str(first.refresh_token))
        assert loaded is not None
        if consumed:
            await present_refresh_token(provider, client, first.refresh_token)
        await provider.revoke_token(loaded)
        stored = await tokens_of(provider)
        await refused(present_refresh_token(provider, client, first.refresh_token))
        await refused(provider.exchange_refresh_token(client, loaded, loaded.scopes))
        assert await tokens_of(provider) == stored

    @pytest.mark.parametrize("state", ["live", "consumed", "reused"])
    async def test_another_client(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock, state: str
    ) -> None:
        """Another client gets nothing for a token that it found, and cannot sign its owner out with it."""
        thief = await registered(provider)
        first = last = await sign_in(provider, client)
        loaded = await provider.load_refresh_token(client, str(first.refresh_token))
        assert loaded is not None
        if state != "live":
            last = await present_refresh_token(provider, client, first.refresh_token)
        if state == "reused":
            await use(provider, last)
            clock.shift(GRACE)
        stored = await tokens_of(provider)
        assert await provider.load_refresh_token(thief, str(first.refresh_token)) is None
        await refused(present_refresh_token(provider, thief, first.refresh_token))
        await refused(provider.exchange_refresh_token(thief, loaded, loaded.scopes))
        assert await tokens_of(provider) == stored
        assert await is_live(provider, client, last)

    @pytest.mark.parametrize("state", ["live", "consumed", "reused"])
    async def test_another_resource(
        self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock, state: str
    ) -> None:
        """A grant of another resource is not refreshed here, nor answered again, nor ended."""
        here, elsewhere = make_provider(), make_provider(mcp_path="/elsewhere")
        first = last = await sign_in(elsewhere, client)
        assert (await row_of(here, first.refresh_token)).resource == f"{BASE_URL}/elsewhere"
        if state != "live":
            last = await present_refresh_token(elsewhere, client, first.refresh_token)
        if state == "reused":
            await use(elsewhere, last)
            clock.shift(GRACE)
        stored = await tokens_of(here)
        assert await here.verify_token(last.access_token) is None
        await refused(present_refresh_token(here, client, first.refresh_token))
        assert await tokens_of(here) == stored
        assert await is_live(elsewhere, client, last)

    async def test_the_client_is_gone(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """The tokens of a client that was deleted are gone with it."""
        first = await sign_in(provider, client)
        loaded = await provider.load_refresh_token(client, str(first.refresh_token))
        assert loaded is not None
        async with transaction(provider) as session:
            await session.execute(delete(Client).where(Client.client_id == client.client_id))
        await refused(provider.exchange_refresh_token(client, loaded, loaded.scopes))
        assert await tokens_of(provider) == []


class TestWithoutALock:
    """On SQLite one process writes at a time. Who gets nothing new does not wait for it, nor makes others wait."""

    async def test_while_another_process_writes(self, tmp_path: Path) -> None:
        """Unknown tokens, codes and clients are refused, and a replay is answered, at once."""
        path = tmp_path / "oauth.db"
        async with provider_on(path) as provider:
            client = await registered(provider)
            code = await authorize(provider, client)
            first = await sign_in(provider, client)
            second = await present_refresh_token(provider, client, first.refresh_token)
            loaded = await provider.load_refresh_token(client, str(first.refresh_token))
            assert loaded is not None
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            try:
                async with asyncio.timeout(BUSY_TIMEOUT_SECONDS / 2):
                    unknown = loaded.model_copy(update={"token": mint("refresh")})
                    await refused(provider.exchange_refresh_token(client, unknown, []))
                    await refused(provider.exchange_refresh_token(new_client(), loaded, []))
                    again = await provider.exchange_refresh_token(client, loaded, loaded.scopes)
                    assert again.refresh_token == second.refresh_token
                    approved = await provider.load_authorization_code(client, code)
                    assert approved is not None
                    guessed = approved.model_copy(update={"code": mint("code")})
                    await refused(provider.exchange_authorization_code(client, guessed))
                    with pytest.raises(AuthorizeError):
                        await provider.approve(mint("request"))
                exchange = asyncio.create_task(provider.exchange_authorization_code(client, approved))
                done, _ = await asyncio.wait([exchange], timeout=0.5)
                assert not done  # what is new waits
            finally:
                other.execute("ROLLBACK")
                other.close()
            assert (await exchange).refresh_token is not None


class TestRestart:
    """All of it is in the database: a server that was restarted in between answers the same."""

    async def test_every_state(self, make_provider: Provider, client: OAuthClientInformationFull, clock: Clock) -> None:
        """Rotation, replay inside the grace, lost answer and reuse, each on a provider of its own."""
        first = await sign_in(make_provider(), client)
        second = await present_refresh_token(make_provider(), client, first.refresh_token)
        clock.shift(1)
        again = await present_refresh_token(make_provider(), client, first.refresh_token)
        assert again == second.model_copy(update={"expires_in": ACCESS_EXPIRY - 1})
        clock.shift(GRACE)
        again = await present_refresh_token(make_provider(), client, first.refresh_token)
        assert again == second.model_copy(update={"expires_in": ACCESS_EXPIRY - 1 - GRACE})
        await use(make_provider(), second)
        await refused(present_refresh_token(make_provider(), client, first.refresh_token))
        assert not await is_live(make_provider(), client, second)

    async def test_eight_processes(
        self, make_provider: Provider, client: OAuthClientInformationFull, database_url: str
    ) -> None:
        """8 processes of 20 tasks present one refresh token: one rotation, and the same pair for all 160."""
        provider = make_provider()
        first = await sign_in(provider, client)
        async with Processes(8) as processes:
            job = (refresh_with_tasks, client, str(first.refresh_token), 20)
            answers = [token for each in await processes.run(database_url, *[job] * 8) for token in each]
        assert len(answers) == 160
        pairs = {(token.access_token, token.refresh_token): token for token in answers if isinstance(token, OAuthToken)}
        assert "invalid_grant" not in answers
        assert len(pairs) == 1
        assert len(await tokens_of(provider)) == 4
        assert await is_live(provider, client, *pairs.values())


class TestSeal:
    """What `seal` closes, `unseal` opens for the same refresh token, and for nothing else."""

    def test_it_opens(self) -> None:
        """The pair comes back as it was."""
        presented, access, refresh = mint("refresh"), mint("access"), mint("refresh")
        assert unseal(presented, seal(presented, access, refresh)) == (access, refresh)

    def test_it_shows_nothing(self) -> None:
        """No token stands in it, and sealing the same twice gives two different texts: the nonce is fresh."""
        presented, access, refresh = mint("refresh"), mint("access"), mint("refresh")
        sealed, sealed_again = (seal(presented, access, refresh) for _ in range(2))
        assert sealed[:12] != sealed_again[:12]
        assert sealed[12:] != sealed_again[12:]
        for secret in (presented, access, refresh):
            assert secret.encode() not in sealed
            assert hash_secret(secret) not in sealed

    def test_another_token_does_not_open_it(self) -> None:
        """Neither another refresh token does, nor the tokens that are in it, nor their hashes."""
        presented, access, refresh = mint("refresh"), mint("access"), mint("refresh")
        sealed = seal(presented, access, refresh)
        for other in (mint("refresh"), access, refresh, hash_secret(presented).hex(), presented[:-1], ""):
            with pytest.raises(InvalidTag):
                unseal(other, sealed)

    def test_its_key_is_made_of_the_presented_token(self) -> None:
        """Who has the row, and with it the hash of the token, still lacks the key: it is made of the token itself."""
        presented, access, refresh = mint("refresh"), mint("access"), mint("refresh")
        sealed = seal(presented, access, refresh)
        key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"oauth_store replay").derive(presented.encode())
        opened = AESGCM(key).decrypt(sealed[:12], sealed[12:], hash_secret(presented))
        assert opened.decode().split() == [access, refresh]

    def test_tampering_is_seen(self) -> None:
        """Not one bit of it can be changed, and nothing added or taken away."""
        presented = mint("refresh")
        sealed = seal(presented, mint("access"), mint("refresh"))
        for bit in range(len(sealed) * 8):
            changed = bytearray(sealed)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(InvalidTag):
                unseal(presented, bytes(changed))
        for length in range(12, len(sealed)):
            with pytest.raises(InvalidTag):
                unseal(presented, sealed[:length])
        with pytest.raises(InvalidTag):
            unseal(presented, sealed + b"\0")

    async def test_it_cannot_be_moved_to_another_row(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """Who can write to the database cannot make one refresh token answer with another one's pair."""
        victim, attacker = [await sign_in(provider, client) for _ in range(2)]
        await present_refresh_token(provider, client, victim.refresh_token)
        await present_refresh_token(provider, client, attacker.refresh_token)
        sealed = (await row_of(provider, victim.refresh_token)).replay
        attackers = Token.token_hash == hash_secret(str(attacker.refresh_token))
        async with transaction(provider) as session:
            await session.execute(update(Token).where(attackers).values(replay=sealed))
        await refused(present_refresh_token(provider, client, attacker.refresh_token))
