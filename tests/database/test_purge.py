"""What expires is deleted without anyone running anything; what may be needed again never is."""

import os
import time
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database.models import UNUSED_CLIENT_SECONDS, Client, Code, Token
from oauth_store.database.purge import BATCH, INTERVAL_SECONDS, _purge, purge
from tests.approvals import Asks
from tests.clocks import stopped, turned
from tests.databases import rows_of, transaction, value_of
from tests.steps import Provider, authorization_params, authorize, new_client, refresh, registered, sign_in
from tests.workers import settle

HOUR, DAY = 3600, 86400


async def counts(provider: SQLAlchemyOAuthProvider) -> dict[str, int]:
    """Rows of each table."""
    return {
        model.__tablename__: await value_of(provider, select(func.count()).select_from(model))
        for model in (Client, Code, Token)
    }


async def purged(provider: SQLAlchemyOAuthProvider, at: float) -> dict[str, int]:
    """Purge one batch, as if it were `at`."""
    async with transaction(provider) as session:
        return await session.run_sync(purge, int(at))


async def test_what_has_expired_is_deleted(provider: SQLAlchemyOAuthProvider) -> None:
    """Codes go after ten minutes, access tokens after an hour, a refresh token that was never used after 37 days."""
    client = await registered(provider)
    with stopped():
        now = int(time.time())
        await sign_in(provider, client)
    assert await purged(provider, now + 599) == {"tokens": 0, "codes": 0, "clients": 0}
    assert await purged(provider, now + 600) == {"tokens": 0, "codes": 1, "clients": 0}
    assert await purged(provider, now + HOUR) == {"tokens": 1, "codes": 0, "clients": 0}
    assert await purged(provider, now + 37 * DAY - 1) == {"tokens": 0, "codes": 0, "clients": 0}
    assert await purged(provider, now + 37 * DAY) == {"tokens": 1, "codes": 0, "clients": 0}


async def test_a_used_refresh_token_goes_as_it_expires(
    provider: SQLAlchemyOAuthProvider, make_provider: Provider
) -> None:
    """No client holds a refresh token that was used: its row goes after 30 days, its successor's after 37."""
    client = await registered(provider)
    with stopped():
        now = int(time.time())
        await refresh(provider, client, await sign_in(provider, client))
    assert (await purged(provider, now + 30 * DAY - 1))["tokens"] == 2
    assert (await purged(provider, now + 30 * DAY))["tokens"] == 1
    assert (await purged(provider, now + 37 * DAY))["tokens"] == 1


async def nudge(provider: SQLAlchemyOAuthProvider, *seconds: float) -> None:
    """Let clients that register so many seconds from now give the purge its turns."""
    for second in seconds:
        with turned(second):
            await provider.register_client(new_client())
            await settle(provider)


@pytest.mark.parametrize("days", [3, 8, 31, 366])
async def test_a_clock_that_is_ahead_for_a_moment_costs_no_grant(
    days: int, provider: SQLAlchemyOAuthProvider, make_provider: Provider
) -> None:
    """Grants outlive a clock that jumps ahead, a sign-in meanwhile, and a restart; then each is refreshed."""
    client = await registered(provider)
    with stopped(-29 * DAY - HOUR):
        held = [await sign_in(provider, client) for _ in range(12)]
    await refresh(provider, client, await sign_in(provider, client))
    for each in (provider, make_provider()):
        await nudge(each, *(days * DAY + second for second in (0, INTERVAL_SECONDS + 1, 20 * INTERVAL_SECONDS)))
        with turned(days * DAY + 21 * INTERVAL_SECONDS):
            await sign_in(each, client)
            await settle(each)
    await nudge(provider, 2 * INTERVAL_SECONDS)
    for token in held:
        assert (await refresh(provider, client, token)).refresh_token


async def test_a_clock_that_wrote_rows_for_an_hour_is_believed(provider: SQLAlchemyOAuthProvider) -> None:
    """After a year without use, the purge waits for an hour of use, and then deletes what has expired."""
    client = await registered(provider)
    await sign_in(provider, client)
    await nudge(provider, 366 * DAY, 366 * DAY + 2 * INTERVAL_SECONDS, 366 * DAY + HOUR - INTERVAL_SECONDS)
    assert (await counts(provider))["oauth_tokens"] == 2
    await nudge(provider, 366 * DAY + HOUR + 2)
    assert await counts(provider) == {"oauth_clients": 5, "oauth_codes": 0, "oauth_tokens": 0}


@pytest.mark.parametrize("witness", ["a client", "a request", "a token"])
async def test_a_flood_of_one_kind_does_not_stop_the_purge(
    witness: str, provider: SQLAlchemyOAuthProvider, make_provider: Provider
) -> None:
    """Rows of any one table, an hour old, are enough: nobody can fill a table by making the purge wait."""
    client = await registered(provider)
    await sign_in(provider, client)
    with turned(60 * DAY):
        if witness == "a client":
            await provider.register_client(new_client())
        elif witness == "a request":
            await make_provider(approval=Asks()).authorize(client, authorization_params())
        else:
            await sign_in(provider, client)
    await nudge(provider, 60 * DAY + 2 * HOUR)
    assert (await counts(provider))["oauth_tokens"] <= 2


async def test_a_revoked_token_stays_until_it_would_have_expired(provider: SQLAlchemyOAuthProvider) -> None:
    """Why a token is dead can be told as long as its holder may ask."""
    client = await registered(provider)
    token = await sign_in(provider, client)
    loaded = await provider.load_refresh_token(client, str(token.refresh_token))
    assert loaded is not None
    await provider.revoke_token(loaded)
    await purged(provider, time.time() + 30 * DAY - 5)
    assert (await counts(provider))["oauth_tokens"] == 1
    await purged(provider, time.time() + 30 * DAY + 5)
    assert (await counts(provider))["oauth_tokens"] == 0


async def test_a_registration_that_nobody_approved_goes_after_thirty_days(
    provider: SQLAlchemyOAuthProvider, make_provider: Provider
) -> None:
    """A client that only registered, or only asked, is deleted; one that was ever approved is not."""
    registered, asked, approved = new_client(), new_client(), new_client()
    for client in (registered, asked, approved):
        await provider.register_client(client)
    await make_provider(approval=Asks()).authorize(asked, authorization_params())
    await sign_in(provider, approved)
    assert (await purged(provider, time.time() + UNUSED_CLIENT_SECONDS - 5))["clients"] == 0
    assert (await purged(provider, time.time() + UNUSED_CLIENT_SECONDS + 5))["clients"] == 2
    assert await provider.get_client(registered.client_id) is None
    assert await provider.get_client(asked.client_id) is None
    assert await provider.get_client(approved.client_id) is not None


async def test_a_client_that_was_ever_approved_is_never_deleted(provider: SQLAlchemyOAuthProvider) -> None:
    """Ten years later its registration is still there, although nothing else of it is."""
    client = await registered(provider)
    await sign_in(provider, client)
    for _ in range(3):
        await purged(provider, time.time() + 3650 * DAY)
    assert await counts(provider) == {"oauth_clients": 1, "oauth_codes": 0, "oauth_tokens": 0}
    found = await provider.get_client(client.client_id)
    assert found is not None
    assert await sign_in(provider, found)


async def test_a_batch_is_bounded_and_the_next_step_goes_on(provider: SQLAlchemyOAuthProvider) -> None:
    """However much has expired, one purge deletes a batch; steps after it continue until nothing is left."""
    client = await registered(provider)
    now = int(time.time())
    rows = [
        {
            "handle_hash": hash_secret(f"request_{number}"),
            "client_id": client.client_id,
            "grant_id": bytes(16),
            "redirect_uri": "http://127.0.0.1/",
            "redirect_uri_provided_explicitly": True,
            "code_challenge": "x",
            "scopes": "",
            "created_at": now - 2 * HOUR,
            "expires_at": now - HOUR,
        }
        for number in range(3 * BATCH)
    ]
    async with transaction(provider) as session:
        await session.execute(insert(Code), rows)
    with stopped(2 * INTERVAL_SECONDS):
        left = []
        for _ in range(5):
            await provider.register_client(new_client())
            await settle(provider)
            left.append((await counts(provider))["oauth_codes"])
    assert left == [2 * BATCH, BATCH, 0, 0, 0]


async def test_a_purge_runs_at_most_once_a_minute(
    provider: SQLAlchemyOAuthProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server does not purge with every request."""
    client = await registered(provider)
    purges = 0
    write = provider._store.write

    async def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal purges
        purges += step is _purge
        return await write(step, *args, **kwargs)

    monkeypatch.setattr(provider._store, "write", counted)  # watches, and does the same
    with stopped(1) as clock:
        start = time.time()
        for second in range(0, 10 * INTERVAL_SECONDS, 5):
            clock.move_to(start + second)
            await authorize(provider, client)
            await settle(provider)
    assert purges == 9


async def test_sealed_pairs_are_wiped_once_nobody_can_need_them(provider: SQLAlchemyOAuthProvider) -> None:
    """Of a grant that is refreshed every hour, at most the last few rows hold a sealed pair."""
    client = await registered(provider)
    with stopped() as clock:
        start = time.time()
        token = await sign_in(provider, client)
        for hour in range(1, 25):
            clock.move_to(start + hour * HOUR)
            token = await refresh(provider, client, token)
            await settle(provider)
        sealed = await value_of(provider, select(func.count()).where(Token.replay.is_not(None)))
        consumed = await value_of(provider, select(func.count()).where(Token.consumed_at.is_not(None)))
        assert sealed <= 3
        assert consumed >= 23


async def test_a_lost_answer_is_found_again_after_purges(provider: SQLAlchemyOAuthProvider) -> None:
    """A pair that was never used stays fetchable, however often its grant's expired tokens were purged."""
    client = await registered(provider)
    with stopped() as clock:
        start = time.time()
        token = await sign_in(provider, client)
        for hour in range(1, 6):
            clock.move_to(start + hour * HOUR)
            token = await refresh(provider, client, token)
        clock.move_to(start + 6 * HOUR)
        lost = await refresh(provider, client, token)
        for day in range(1, 20):
            await purged(provider, start + day * DAY)
        clock.move_to(start + 20 * DAY)
        again = await refresh(provider, client, token)
        assert again.refresh_token == lost.refresh_token
        assert await provider.verify_token((await refresh(provider, client, again)).access_token) is not None


async def test_the_purge_finds_its_rows_by_index(provider: SQLAlchemyOAuthProvider) -> None:
    """No table is scanned, however large it has grown."""
    if not provider._store.sqlite:
        pytest.skip("PostgreSQL scans small tables whatever their indexes")
    await provider.check_schema()
    statements = {
        "SELECT token_hash FROM oauth_tokens WHERE expires_at <= 1 AND (kind != 'refresh_token' OR consumed_at IS NOT "
        "NULL OR revoked_at IS NOT NULL OR expires_at <= 0) ORDER BY expires_at LIMIT 100",
        "SELECT 1 FROM oauth_tokens WHERE expires_at > 1 AND created_at BETWEEN 1 AND 2",
        "SELECT 1 FROM oauth_codes WHERE expires_at > 1 AND created_at BETWEEN 1 AND 2",
        "SELECT 1 FROM oauth_clients WHERE last_used_at IS NULL AND created_at BETWEEN 1 AND 2",
        "SELECT handle_hash FROM oauth_codes WHERE expires_at <= 1 ORDER BY expires_at LIMIT 100",
        "SELECT client_id FROM oauth_clients WHERE last_used_at IS NULL AND created_at <= 1 ORDER BY created_at",
        "UPDATE oauth_tokens SET replay = NULL WHERE grant_id = x'00' AND consumed_at < 1 AND replay IS NOT NULL",
        "DELETE FROM oauth_clients WHERE client_id = 'x'",
        "SELECT 1 FROM oauth_tokens WHERE client_id = 'x'",
    }
    for statement in statements:
        plan = await rows_of(provider, f"EXPLAIN QUERY PLAN {statement}")
        assert all("SEARCH" in row.detail for row in plan), (statement, plan)


async def test_two_years_leave_a_handful_of_rows(make_provider: Provider, database_url: str) -> None:
    """A client that refreshes every hour, and a registration every day that nobody approves: the tables stay flat."""
    if not database_url.endswith(".db"):
        pytest.skip("the same statements; two years take a while on a server")
    provider = make_provider()
    client = await registered(provider)
    seen: dict[int, dict[str, int]] = {}
    with stopped() as clock:
        start = time.time()
        token = await sign_in(provider, client)
        # OAUTH_STORE_TEST_FULL refreshes every hour, which takes minutes; else it is every thirteenth.
        step = 1 if os.environ.get("OAUTH_STORE_TEST_FULL") else 13
        for hour in range(step, 2 * 365 * 24, step):
            clock.move_to(start + hour * HOUR)
            token = await refresh(provider, client, token)
            if hour % 24 < step:
                await provider.register_client(new_client())
            await settle(provider)
            if hour % (90 * 24) < step:
                seen[hour // 24] = await counts(provider)
    print(seen)
    later = [rows for day, rows in seen.items() if day > 60]
    assert len(later) >= 7
    for table, bound in (("oauth_clients", 40), ("oauth_codes", 2), ("oauth_tokens", 30 * 24 // step + 5)):
        amounts = [rows[table] for rows in later]
        assert max(amounts) <= bound, (table, amounts)
        assert max(amounts) - min(amounts) <= 5, (table, amounts)
    assert await provider.get_client(client.client_id) is not None
    with stopped(2 * 365 * DAY):
        assert await provider.verify_token((await refresh(provider, client, token)).access_token) is not None


async def test_a_purge_waits_for_nobody(make_provider: Provider) -> None:
    """A row that another transaction holds is passed over, and goes with a later purge."""
    provider = make_provider()
    if provider._store.url.get_backend_name() != "postgresql":
        pytest.skip("SQLite has one writer, and MariaDB locks all rows of a table as small as this one")
    client = await registered(provider)
    for _ in range(2):
        await sign_in(provider, client)
    other = make_provider()
    async with transaction(other) as session:
        first = (await session.execute(select(Token.token_hash).limit(1))).scalar_one()
        await session.execute(update(Token).where(Token.token_hash == first).values(first_used_at=1))
        assert (await purged(provider, time.time() + 38 * DAY))["tokens"] == 3
    assert (await purged(provider, time.time() + 38 * DAY))["tokens"] == 1
