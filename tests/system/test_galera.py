"""MariaDB Galera: three nodes that all take writes, and a provider on each."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import pytest
from mcp.server.auth.provider import TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from oauth_store import AutoApproval, ConfigurationError, SQLAlchemyOAuthProvider
from oauth_store.database import engines
from oauth_store.database.schema import upgrade
from oauth_store.database.url import database_url
from tests.chaos import new_provider
from tests.galera import galera
from tests.steps import BASE_URL, authorize, new_client, redeem, sign_in
from tests.workers import present_code, present_refresh_token

TIMES = 60


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """The URLs of three nodes, with the schema."""
    with galera() as urls:
        upgrade(urls[0])
        yield urls


@pytest.fixture
async def providers(nodes: list[str]) -> AsyncIterator[list[SQLAlchemyOAuthProvider]]:
    """A provider on each node."""
    async with AsyncExitStack() as stack:
        providers = [await stack.enter_async_context(new_provider(url)) for url in nodes]
        for provider in providers:
            await provider.check_schema()
        yield providers


Present = Callable[[SQLAlchemyOAuthProvider, OAuthClientInformationFull, str], Awaitable[OAuthToken]]


async def presented(
    providers: list[SQLAlchemyOAuthProvider], present: Present, client: OAuthClientInformationFull, secret: str
) -> list[OAuthToken | None]:
    """What all nodes give at once for a secret; None for a refusal."""

    async def attempt(provider: SQLAlchemyOAuthProvider) -> OAuthToken | None:
        try:
            return await present(provider, client, secret)
        except TokenError:
            return None

    return await asyncio.gather(*map(attempt, providers))


async def test_one_code_gives_one_pair(providers: list[SQLAlchemyOAuthProvider]) -> None:
    """A code that is presented to all three nodes at once is exchanged once at most, and then the grant is over."""
    for _ in range(TIMES):
        client = new_client()
        await random.choice(providers).register_client(client)
        code = await authorize(random.choice(providers), client)
        given = [pair for pair in await presented(providers, present_code, client, code) if pair is not None]
        assert len(given) == 1
        assert [await one.verify_token(given[0].access_token) for one in providers] == [None] * 3


async def test_one_refresh_token_gives_one_pair(providers: list[SQLAlchemyOAuthProvider]) -> None:
    """A refresh token that is presented to all three nodes at once gets the same pair from all."""
    for _ in range(TIMES):
        client = new_client()
        await random.choice(providers).register_client(client)
        token = await redeem(random.choice(providers), client, await authorize(random.choice(providers), client))
        answers = await presented(providers, present_refresh_token, client, str(token.refresh_token))
        pairs = [pair for pair in answers if pair is not None]
        assert len(pairs) == len(providers)
        assert len({pair.refresh_token for pair in pairs}) == 1
        for one in providers:
            assert await one.verify_token(pairs[0].access_token) is not None
            assert await one.verify_token(token.access_token) is None


async def test_a_revocation_is_seen_at_once(providers: list[SQLAlchemyOAuthProvider]) -> None:
    """Once a node has acknowledged a revocation, every other node refuses the token, whatever else it has to write."""
    over = asyncio.Event()

    async def busy(provider: SQLAlchemyOAuthProvider) -> None:
        client = new_client()
        await provider.register_client(client)
        while not over.is_set():
            await sign_in(provider, client)

    async with asyncio.TaskGroup() as group:
        for provider in providers:
            group.create_task(busy(provider))
        try:
            for number in range(TIMES):
                here, *others = random.sample(providers, 3)
                client = new_client(client_id=f"client {number} {time.time_ns()}")
                await here.register_client(client)
                token = await sign_in(here, client)
                access = await random.choice(others).load_access_token(token.access_token)
                assert access is not None
                await here.revoke_token(access)
                assert [await other.verify_token(token.access_token) for other in others] == [None, None]
        finally:
            over.set()


async def test_a_node_that_is_behind(nodes: list[str], providers: list[SQLAlchemyOAuthProvider]) -> None:
    """A node that has not written yet what another one acknowledged makes a reader wait, and then tells the truth."""
    client = new_client()
    await providers[0].register_client(client)
    token = await sign_in(providers[0], client)
    access = await providers[1].load_access_token(token.access_token)
    assert access is not None
    engine = create_async_engine(database_url(nodes[1]), poolclass=NullPool)
    async with engine.connect() as behind:
        await behind.execute(text("FLUSH TABLES WITH READ LOCK"))  # the node writes nothing of others
        await providers[0].revoke_token(access)
        asked = asyncio.create_task(providers[1].verify_token(token.access_token))
        await asyncio.wait([asked], timeout=1)
        assert not asked.done()
        await behind.execute(text("UNLOCK TABLES"))
        assert await asked is None
    await engine.dispose()


async def test_an_engine_that_was_passed_in(nodes: list[str]) -> None:
    """An engine whose sessions do not wait is refused, and says which setting is missing."""
    engine = create_async_engine(database_url(nodes[2]), isolation_level="READ COMMITTED")
    provider = SQLAlchemyOAuthProvider(engine, base_url=BASE_URL, approval=AutoApproval())
    with pytest.raises(ConfigurationError, match="wsrep_sync_wait = 0"):
        await provider.register_client(new_client())
    await provider.aclose()
    await engine.dispose()


async def test_the_cost(
    nodes: list[str],
    providers: list[SQLAlchemyOAuthProvider],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the wait adds to a verification, measured in turns with sessions that do not wait."""
    client = new_client()
    await providers[0].register_client(client)
    token = await sign_in(providers[0], client)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "SYNC_READS", 0)
        hasty = new_provider(nodes[0])
        await hasty.verify_token(token.access_token)
    taken: dict[SQLAlchemyOAuthProvider, list[float]] = {providers[0]: [], hasty: []}
    for _ in range(7):
        for provider, times in taken.items():
            began = time.perf_counter()
            for _ in range(50):
                assert await provider.verify_token(token.access_token) is not None
            times.append((time.perf_counter() - began) / 50)
    waits, hastes = (statistics.median(times) * 1e6 for times in taken.values())
    await hasty.aclose()
    with capsys.disabled():
        print(f"\nGalera: a verification takes {waits:.0f} us, {waits / hastes:.2f} times as long as without the wait")
    assert waits < 50 * hastes
