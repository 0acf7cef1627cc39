"""Revocation: what it ends, that it wins against whatever runs at the same moment, and codes that are replayed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest
from fastmcp.server.auth import AccessToken
from mcp.server.auth.provider import RefreshToken
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import event, func, select
from sqlalchemy.util import await_only

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import mint
from oauth_store.database.models import Code
from oauth_store.errors import LostRaceError
from oauth_store.flows import code as code_flow
from oauth_store.flows import refresh
from oauth_store.flows.code import PresentedCode
from oauth_store.flows.connected import end_all, revoke_grants
from oauth_store.flows.refresh import PresentedRefreshToken
from oauth_store.flows.tokens import presented, update_one
from tests.clocks import Clock
from tests.databases import engine_of, tokens_of, transaction, value_of
from tests.steps import Provider, authorize, registered, sign_in
from tests.workers import (
    Answer,
    Processes,
    answer,
    present_code,
    present_for_revocation,
    present_refresh_token,
    redeem_one_code,
    refresh_until_refused,
    refresh_with_tasks,
    revoke_after_refreshing,
    settle,
)

GRACE = 120  # the default
ROUNDS = 40


async def nothing_lives(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, *known: str) -> None:
    """Check that every token that is stored is revoked, and that none of the known ones can be used."""
    stored = await tokens_of(provider)
    assert stored
    for row in stored:
        assert row.revoked_at is not None
        assert row.revoked_reason is not None
        assert row.replay is None
    for secret in known:
        assert await provider.verify_token(secret) is None
        assert await provider.load_access_token(secret) is None
        assert await provider.load_refresh_token(client, secret) is None
        assert await answer(present_refresh_token(provider, client, secret)) == "invalid_grant"


def secrets_of(*tokens: Answer) -> list[str]:
    """The tokens in answers; errors hold none."""
    pairs = [token for token in tokens if isinstance(token, OAuthToken)]
    return [secret for pair in pairs for secret in (pair.access_token, pair.refresh_token) if secret is not None]


class TestWhatItEnds:
    """Revoking any token of a grant ends the grant (RFC 7009, section 2.1)."""

    @pytest.mark.parametrize("presented", ["access_token", "refresh_token"])
    async def test_the_pair_and_the_code(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, presented: str
    ) -> None:
        """Either token of a pair ends both, and the code that they came from."""
        code = await authorize(provider, client)
        token = await present_code(provider, client, code)
        assert await present_for_revocation(provider, client, str(getattr(token, presented)))
        await nothing_lives(provider, client, *secrets_of(token))
        assert await answer(present_code(provider, client, code)) == "invalid_grant"
        assert len(await tokens_of(provider)) == 2

    @pytest.mark.parametrize("presented", ["access_token", "refresh_token"])
    async def test_all_that_was_rotated(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, presented: str
    ) -> None:
        """The newest pair ends the whole chain, and no token of it is answered again, inside the grace or not."""
        tokens = [await sign_in(provider, client)]
        for _ in range(3):
            tokens.append(await present_refresh_token(provider, client, tokens[-1].refresh_token))
        assert await present_for_revocation(provider, client, str(getattr(tokens[-1], presented)))
        await nothing_lives(provider, client, *secrets_of(*tokens))
        assert len(await tokens_of(provider)) == 8

    @pytest.mark.parametrize("rotations", [1, 2, 5])
    async def test_a_consumed_refresh_token(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, rotations: int
    ) -> None:
        """A refresh token that was rotated ends the grant too: its holder could still fetch the successor."""
        tokens = [await sign_in(provider, client)]
        for _ in range(rotations):
            tokens.append(await present_refresh_token(provider, client, tokens[-1].refresh_token))
        assert await present_for_revocation(provider, client, str(tokens[0].refresh_token))
        await nothing_lives(provider, client, *secrets_of(*tokens))

    async def test_an_access_token_that_was_loaded_before_it_was_rotated(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A refresh between load and revocation does not save the grant."""
        first = await sign_in(provider, client)
        loaded = await provider.load_access_token(first.access_token)
        assert loaded is not None
        second = await present_refresh_token(provider, client, first.refresh_token)
        await provider.revoke_token(loaded)
        await nothing_lives(provider, client, *secrets_of(first, second))

    async def test_a_client_that_does_not_refresh(self, provider: SQLAlchemyOAuthProvider) -> None:
        """An access token without a refresh token is revoked like any other."""
        client = await registered(provider, grant_types=["authorization_code"])
        token = await sign_in(provider, client)
        assert token.refresh_token is None
        assert await present_for_revocation(provider, client, token.access_token)
        await nothing_lives(provider, client, token.access_token)

    async def test_only_the_grant(self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull) -> None:
        """Another device with the same client_id stays signed in."""
        one, other = await sign_in(provider, client), await sign_in(provider, client)
        assert await present_for_revocation(provider, client, str(one.refresh_token))
        assert await provider.verify_token(one.access_token) is None
        assert await provider.verify_token(other.access_token) is not None
        assert isinstance(await present_refresh_token(provider, client, other.refresh_token), OAuthToken)

    async def test_a_revoked_row_stays_and_says_why(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """`revoked_at` and `revoked_reason` tell what happened; what was sealed for a replay is wiped."""
        first = await sign_in(provider, client)
        await present_refresh_token(provider, client, first.refresh_token)
        clock.shift(7)
        assert await present_for_revocation(provider, client, str(first.refresh_token))
        stored = await tokens_of(provider)
        assert len(stored) == 4
        assert {(row.revoked_at, row.revoked_reason) for row in stored} == {(int(time.time()), "revoked by the client")}
        assert [row.replay for row in stored] == [None] * 4

    async def test_a_code_that_was_not_redeemed(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A grant that ends before its code was redeemed gives no tokens any more."""
        code = await authorize(provider, client)
        async with transaction(provider) as session:
            grant_id = (await session.execute(select(Code.grant_id))).scalar_one()
            await session.run_sync(revoke_grants, [grant_id], "revoked by the owner", int(time.time()))
        assert await answer(present_code(provider, client, code)) == "invalid_grant"
        assert await tokens_of(provider) == []

    async def test_twice(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """The second revocation finds nothing, and changes nothing: the rows keep when and why they were revoked."""
        token = await sign_in(provider, client)
        access, refresh = await loaded_pair(provider, client, token)
        await provider.revoke_token(refresh)
        stored = await tokens_of(provider)
        clock.shift(60)
        for again in (refresh, access):
            await provider.revoke_token(again)
        for secret in secrets_of(token):
            assert not await present_for_revocation(provider, client, secret)
        assert await tokens_of(provider) == stored

    async def test_after_reuse(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A grant that ended because of reuse goes on saying so."""
        first = await sign_in(provider, client)
        _, refresh = await loaded_pair(provider, client, first)
        second = await present_refresh_token(provider, client, first.refresh_token)
        await present_refresh_token(provider, client, second.refresh_token)
        clock.shift(GRACE)
        assert await answer(present_refresh_token(provider, client, first.refresh_token)) == "invalid_grant"
        await provider.revoke_token(refresh)
        assert {row.revoked_reason for row in await tokens_of(provider)} == {"reuse detected"}

    async def test_an_unknown_token(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """What was never issued does nothing, nor does another client's token (RFC 7009, section 2.2)."""
        token = await sign_in(provider, client)
        access, refresh = await loaded_pair(provider, client, token)
        stranger = await registered(provider)
        stored = await tokens_of(provider)
        await provider.revoke_token(access.model_copy(update={"token": mint("access")}))
        await provider.revoke_token(refresh.model_copy(update={"token": mint("refresh")}))
        for secret in (mint("access"), mint("refresh"), ""):
            assert not await present_for_revocation(provider, client, secret)
        for secret in secrets_of(token):
            assert not await present_for_revocation(provider, stranger, secret)
        assert await tokens_of(provider) == stored
        assert await provider.verify_token(token.access_token) is not None


async def loaded_pair(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, token: OAuthToken
) -> tuple[AccessToken, RefreshToken]:
    """A pair as the endpoints load it."""
    access = await provider.load_access_token(token.access_token)
    refresh = await provider.load_refresh_token(client, str(token.refresh_token))
    assert access is not None
    assert refresh is not None
    return access, refresh


@pytest.fixture
async def two(make_provider: Provider) -> AsyncIterator[tuple[SQLAlchemyOAuthProvider, SQLAlchemyOAuthProvider]]:
    """Two providers on one database, as two replicas are: each has connections of its own."""
    one, other = make_provider(), make_provider()
    await one.check_schema()
    await other.check_schema()
    yield one, other
    if kind_of(one) == "postgresql":  # where a deadlock is seen after a second; MariaDB sees it at once
        for provider in (one, other):
            await provider.aclose()  # a connection reports what it counted when it ends
        assert await deadlocks(one) == 0, "two steps took the rows of a grant in different orders"


def kind_of(provider: SQLAlchemyOAuthProvider) -> str:
    """Which database it is: `sqlite`, `postgresql` or `mysql`."""
    return provider._store.url.get_backend_name()


async def deadlocks(provider: SQLAlchemyOAuthProvider) -> int:
    """How many deadlocks PostgreSQL broke in this database."""
    seen = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    return int(await value_of(provider, seen))


Two = tuple[SQLAlchemyOAuthProvider, SQLAlchemyOAuthProvider]


class TestItWins:
    """Once a revocation was acknowledged, no token of the grant lives, whatever ran at the same moment."""

    @pytest.mark.parametrize("presented", ["access_token", "refresh_token"])
    async def test_against_a_refresh(self, two: Two, client: OAuthClientInformationFull, presented: str) -> None:
        """A refresh, its replay and a revocation start within a few milliseconds, in every order."""
        one, other = two
        answered = 0
        for n in range(ROUNDS):
            first = await sign_in(one, client)
            access, refresh = await loaded_pair(one, client, first)
            offset = (n - ROUNDS / 2) / ROUNDS * 0.008  # from 4 ms before to 4 ms after

            async def revoke(after: float = offset, token: AccessToken | RefreshToken = refresh) -> None:
                await asyncio.sleep(max(0, after))
                await other.revoke_token(token)

            async def refresh_it(after: float = -offset, token: OAuthToken = first) -> Answer:
                await asyncio.sleep(max(0, after))
                return await answer(present_refresh_token(one, client, token.refresh_token))

            second, again, _ = await asyncio.gather(
                refresh_it(), refresh_it(), revoke(token=access if presented == "access_token" else refresh)
            )
            answered += isinstance(second, OAuthToken)
            await nothing_lives(other, client, *secrets_of(first, second, again))
        assert 0 < answered < ROUNDS, "the offsets should make now the one and now the other come first"

    async def test_against_a_chain_of_refreshes(self, two: Two, client: OAuthClientInformationFull) -> None:
        """A client that refreshes without a pause is stopped, and what it got last is dead."""
        one, other = two
        for _ in range(ROUNDS // 4):
            first = await sign_in(one, client)
            _, loaded = await loaded_pair(one, client, first)
            enough = asyncio.Event()

            async def refresh_on(token: OAuthToken = first, enough: asyncio.Event = enough) -> list[OAuthToken]:
                got = [token]
                while True:
                    answered = await answer(present_refresh_token(one, client, got[-1].refresh_token))
                    if isinstance(answered, str):
                        return got
                    got.append(answered)
                    if len(got) == 4:
                        enough.set()

            async def revoke(token: RefreshToken = loaded, enough: asyncio.Event = enough) -> None:
                await enough.wait()
                await other.revoke_token(token)

            got, _ = await asyncio.gather(refresh_on(), revoke())
            assert len(got) >= 4
            await nothing_lives(other, client, *secrets_of(*got))

    async def test_against_a_first_use(self, two: Two, client: OAuthClientInformationFull) -> None:
        """Refresh, the stamp of a first use, and revocation touch the same rows, and none gets in another's way."""
        one, other = two
        for _ in range(ROUNDS):
            first = await sign_in(one, client)
            _, loaded = await loaded_pair(one, client, first)
            verified, second, _ = await asyncio.gather(
                other.verify_token(first.access_token),
                answer(present_refresh_token(one, client, first.refresh_token)),
                one.revoke_token(loaded),
            )
            await settle(other)
            assert verified is None or verified.client_id == client.client_id
            await nothing_lives(other, client, *secrets_of(first, second))

    async def test_against_a_refresh_that_has_begun(self, two: Two, client: OAuthClientInformationFull) -> None:
        """A revocation that comes while a refresh is about to commit waits for it, and ends what it inserted."""
        one, other = two
        first = await sign_in(one, client)
        _, loaded = await loaded_pair(one, client, first)
        presented = PresentedRefreshToken(client.client_id, loaded.token, checked=True)
        async with transaction(one) as session:
            second = await session.run_sync(refresh._refresh, one.issuer, presented, int(time.time()))
            assert second is not None
            revocation = asyncio.create_task(other.revoke_token(loaded))
            await someone_waits(other)
        await revocation
        await nothing_lives(other, client, *secrets_of(first, second))

    async def test_against_a_refresh_that_comes_while_it_runs(
        self, two: Two, client: OAuthClientInformationFull
    ) -> None:
        """A refresh that comes while a revocation is about to commit waits for it, and is refused."""
        one, other = two
        first = await sign_in(one, client)
        grant_id = (await tokens_of(one))[0].grant_id
        async with transaction(one) as session:
            await session.run_sync(revoke_grants, [grant_id], "revoked by the client", int(time.time()))
            await session.execute(select(1))  # what waits for the COMMIT is sent
            refresh = asyncio.create_task(answer(present_refresh_token(other, client, first.refresh_token)))
            await someone_waits(other)
        assert await refresh == "invalid_grant"
        await nothing_lives(other, client, *secrets_of(first))

    async def test_against_an_exchange_that_comes_between_its_looks(
        self, two: Two, client: OAuthClientInformationFull
    ) -> None:
        """A code that is exchanged while all grants are looked for is one of them: nothing of it lives."""
        one, other = two
        code = await authorize(one, client)
        await one.check_schema()
        loop, exchanged = asyncio.get_running_loop(), list[OAuthToken]()

        def exchange(*_: object) -> None:
            step = present_code(other, client, code)
            if one._store.sqlite:  # the step runs in a thread of its own
                exchanged.append(asyncio.run_coroutine_threadsafe(step, loop).result(30))
            else:
                exchanged.append(await_only(step))

        event.listen(engine_of(one._store.writer), "after_cursor_execute", exchange, once=True)
        ended = await one._store.write(end_all, None, None, by="owner", now=int(time.time()))
        assert len(ended) == 1
        await nothing_lives(other, client, *secrets_of(*exchanged))

    async def test_against_another_revocation(self, two: Two, client: OAuthClientInformationFull) -> None:
        """Both tokens revoked on both replicas, while two tasks refresh: all return, and nothing lives."""
        one, other = two
        for _ in range(ROUNDS // 4):
            first = await sign_in(one, client)
            second = await present_refresh_token(one, client, first.refresh_token)
            access, refresh = await loaded_pair(one, client, second)
            answers = await asyncio.gather(
                answer(present_refresh_token(one, client, second.refresh_token)),
                one.revoke_token(access),
                other.revoke_token(refresh),
                answer(present_refresh_token(other, client, second.refresh_token)),
                other.revoke_token(access),
                one.revoke_token(refresh),
            )
            got = [token for token in answers if token is not None]
            await nothing_lives(other, client, *secrets_of(first, second, *got))

    async def test_against_other_processes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, database_url: str
    ) -> None:
        """Three processes refresh and replay what they get, a fourth revokes: all are stopped, and nothing lives."""
        async with Processes(4) as processes:
            for refreshes in range(6):
                first = await sign_in(provider, client)
                job = (refresh_until_refused, client, str(first.refresh_token))
                revoker = (revoke_after_refreshing, client, str(first.refresh_token), refreshes)
                *answers, revoked = await processes.run(database_url, job, job, job, revoker)
                assert revoked[-1] == "revoked"
                got = [token for each in [*answers, revoked] for token in each]
                await nothing_lives(provider, client, *secrets_of(first, *got))


_WAITING = {
    "postgresql": "pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
    # any UPDATE that has not ended: it takes a privilege to see which of them wait
    "mysql": "information_schema.processlist WHERE db = database() AND info LIKE 'UPDATE%'",
}


async def someone_waits(provider: SQLAlchemyOAuthProvider) -> None:
    """Wait until a statement waits for another transaction. SQLite cannot tell: there, until a read has come back."""
    waiting = f"SELECT count(*) FROM {_WAITING.get(kind_of(provider), '(SELECT 1)')}"
    while True:
        if await value_of(provider, waiting):
            return


class TestCodeReplay:
    """A code that is redeemed twice ends its grant (RFC 6749, section 4.1.2)."""

    async def test_in_turn(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The second time is refused, ends all that came from the first, and is logged without the code."""
        caplog.set_level(logging.DEBUG, "oauth_store")
        code = await authorize(provider, client)
        first = await present_code(provider, client, code)
        second = await present_refresh_token(provider, client, first.refresh_token)
        assert await answer(present_code(provider, client, code)) == "invalid_grant"
        await nothing_lives(provider, client, *secrets_of(first, second))
        assert {row.revoked_reason for row in await tokens_of(provider)} == {"code replayed"}
        grant_id = (await tokens_of(provider))[0].grant_id
        assert (
            f"authorization code replayed, grant revoked: grant_id={grant_id.hex()} client_id={client.client_id}"
            in caplog.messages
        )
        assert code not in caplog.text

    async def test_by_another_client(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Another client can neither redeem a code, nor use it up, nor end the grant with it."""
        thief = await registered(provider)
        code = await authorize(provider, client)
        loaded = await provider.load_authorization_code(client, code)
        assert loaded is not None
        assert await answer(present_code(provider, thief, code)) == "invalid_grant"
        assert await answer(provider.exchange_authorization_code(thief, loaded)) == "invalid_grant"
        token = await present_code(provider, client, code)
        assert await answer(present_code(provider, thief, code)) == "invalid_grant"
        assert await answer(provider.exchange_authorization_code(thief, loaded)) == "invalid_grant"
        assert await provider.verify_token(token.access_token) is not None

    async def test_after_the_code_has_expired(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A replay is refused for ever, and ends the grant to the last second of the code's life."""
        codes = [await authorize(provider, client) for _ in range(2)]
        tokens = [await present_code(provider, client, code) for code in codes]
        loaded = await provider.load_authorization_code(client, codes[1])
        assert loaded is not None
        clock.shift(599)
        assert await answer(present_code(provider, client, codes[0])) == "invalid_grant"
        await settle(provider)
        clock.shift(1)
        assert await provider.load_authorization_code(client, codes[1]) is None
        assert await answer(provider.exchange_authorization_code(client, loaded)) == "invalid_grant"
        assert await provider.verify_token(tokens[0].access_token) is None
        assert await provider.verify_token(tokens[1].access_token) is not None

    async def test_an_expired_code_is_not_redeemed(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, clock: Clock
    ) -> None:
        """A code works in its last second and not one later, also if it was loaded in time."""
        codes = [await authorize(provider, client) for _ in range(2)]
        loaded = await provider.load_authorization_code(client, codes[1])
        assert loaded is not None
        clock.shift(599)
        assert isinstance(await answer(present_code(provider, client, codes[0])), OAuthToken)
        await settle(provider)
        clock.shift(1)
        assert await answer(provider.exchange_authorization_code(client, loaded)) == "invalid_grant"
        assert len(await tokens_of(provider)) == 2
        assert await value_of(provider, select(func.count(Code.consumed_at))) == 1

    async def test_fifty_tasks(self, two: Two, client: OAuthClientInformationFull) -> None:
        """One of fifty gets a pair, on two replicas; the other forty-nine are replays, so the grant is ended."""
        one, other = two
        code = await authorize(one, client)
        answers = await asyncio.gather(
            *(answer(present_code(provider, client, code)) for provider in (one, other) for _ in range(25))
        )
        assert answers.count("invalid_grant") == 49
        assert len(await tokens_of(one)) == 2
        await nothing_lives(one, client, *secrets_of(*answers))

    async def test_fifty_tasks_and_a_client_that_goes_on(self, two: Two, client: OAuthClientInformationFull) -> None:
        """What the one refreshes to while the replays come in is ended with the rest."""
        one, other = two

        async def redeem_and_refresh(provider: SQLAlchemyOAuthProvider, code: str) -> list[Answer]:
            got = [await answer(present_code(provider, client, code))]
            while isinstance(got[-1], OAuthToken):
                got.append(await answer(present_refresh_token(provider, client, got[-1].refresh_token)))
            return got

        code = await authorize(one, client)
        answers = await asyncio.gather(*(redeem_and_refresh(provider, code) for provider in two for _ in range(25)))
        assert sum(isinstance(got[0], OAuthToken) for got in answers) == 1
        await nothing_lives(other, client, *secrets_of(*(token for got in answers for token in got)))

    async def test_who_was_overtaken_gets_nothing(self, two: Two, client: OAuthClientInformationFull) -> None:
        """An exchange that another one overtakes, after it looked the code up, loses the race and leaves no row."""
        one, other = two
        code = await authorize(one, client)
        now = int(time.time())
        async with transaction(one, locks=False) as session:
            query = code_flow._client_and_code
            _, row = await session.run_sync(presented, query, one.issuer, client.client_id, code, now)
            assert row is not None
            first = await present_code(other, client, code)
            with pytest.raises(LostRaceError):
                await session.run_sync(update_one, code_flow._consume, b_hash=row.code_hash, b_now=now)
        assert len(await tokens_of(one)) == 2
        assert await one.verify_token(first.access_token) is not None

    async def test_while_the_first_exchange_runs(self, two: Two, client: OAuthClientInformationFull) -> None:
        """A replay that comes while the first exchange is about to commit waits for it, and ends what it inserted."""
        one, other = two
        code = await authorize(one, client)
        exchanged = PresentedCode(client.client_id, code, checked=True)
        async with transaction(one) as session:
            first = await session.run_sync(
                code_flow._exchange_authorization_code, one.issuer, exchanged, int(time.time())
            )
            assert first is not None
            replay = asyncio.create_task(answer(present_code(other, client, code)))
            await someone_waits(other)
        assert await replay == "invalid_grant"
        await nothing_lives(one, client, *secrets_of(first))

    async def test_eight_processes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, database_url: str
    ) -> None:
        """One of eight processes gets a pair, and its grant is ended by the other seven; round after round."""
        async with Processes(8) as processes:
            for _ in range(5):
                code = await authorize(provider, client)
                answers = [got for [got] in await processes.run(database_url, *[(redeem_one_code, client, code)] * 8)]
                assert answers.count("invalid_grant") == 7
                await nothing_lives(provider, client, *secrets_of(*answers))
        assert await value_of(provider, select(func.count(Code.consumed_at))) == 5


async def test_eight_processes_and_a_revocation(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, database_url: str
) -> None:
    """8 processes of 20 tasks present one token, one of them revokes it: whoever got a pair, got a dead one."""
    first = await sign_in(provider, client)
    async with Processes(8) as processes:
        job = (refresh_with_tasks, client, str(first.refresh_token), 20)
        revoker = (revoke_after_refreshing, client, str(first.refresh_token), 0)
        answers = [each for got in await processes.run(database_url, *[job] * 7, revoker) for each in got]
    assert answers.count("revoked") == 1
    assert len({token.access_token for token in answers if isinstance(token, OAuthToken)}) <= 1
    await nothing_lives(provider, client, *secrets_of(first, *answers))
