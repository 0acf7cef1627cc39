"""A primary is killed under load and its synchronous standby is promoted: the server goes on without a restart."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from oauth_store.database.engines import CONNECT_TIMEOUT_SECONDS, create_engine
from oauth_store.database.schema import upgrade
from oauth_store.database.url import database_url
from tests.databases import administer
from tests.outages import ALL, Stock, finished_grants, load, says, serving
from tests.standbys import Cluster, cluster

CLIENTS = 16


@pytest.fixture
def servers() -> Iterator[Cluster]:
    """A primary and its standby, with the schema."""
    with cluster() as servers:
        asyncio.run(administer(servers.url_of("first"), "CREATE DATABASE wiki"))
        upgrade(servers.url("wiki"))
        yield servers


def test_a_fail_over(servers: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing acknowledged is lost, nobody is refused, and no process is restarted: for a moment there are 503s."""
    asyncio.run(_fail_over(servers, capsys))


async def _fail_over(servers: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(servers.url("wiki")) as wiki, load(wiki, CLIENTS) as counts:
        stock = Stock(wiki)
        await stock.fill()
        await stock._revoke()  # acknowledged before: it must hold after
        await finished_grants(counts, CLIENTS)
        killed_at = time.monotonic()
        await asyncio.to_thread(servers.kill, "first")
        assert await stock.away() == ALL
        await asyncio.to_thread(servers.promote, "second")
        promoted_at = time.monotonic()
        await stock.until_back()
        back_at = time.monotonic()
        await finished_grants(counts, CLIENTS)
        assert counts["503"] > 0
        says(wiki.causes(), r"postgresql\+asyncpg://postgres@.* cannot be used")
    with capsys.disabled():
        print(
            f"\nfail-over: promoted after {promoted_at - killed_at:.1f} s, back {back_at - promoted_at:.1f} s later; "
            f"{counts['answered']} answers, {counts['503']} times 503, {counts['codes in doubt']} codes in doubt"
        )


def test_the_standby_is_never_used_before(servers: Cluster) -> None:
    """While both are up, all connections are the primary's, in whichever order the URL names them."""

    async def connected() -> None:
        async with serving(servers.url("wiki")) as wiki:
            stock = Stock(wiki)
            await stock.fill()
            assert await stock.away() == set()

    servers.ports = dict(reversed(servers.ports.items()))
    asyncio.run(connected())


def test_a_machine_that_is_silent(servers: Cluster) -> None:
    """A host that never answers, as one without power on a far network, holds nobody up for long."""

    async def connected() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with serving(servers.url_after(silent.getsockname()[1], "wiki")) as wiki:
                stock = Stock(wiki)
                began = time.monotonic()
                await stock.fill()
                assert time.monotonic() - began < CONNECT_TIMEOUT_SECONDS
                assert await stock.away() == set()

    asyncio.run(connected())


def test_a_machine_that_is_silent_is_tried_once(servers: Cluster) -> None:
    """The first connection, and the look for a pooler before it, wait for such a host together, and not each."""

    async def connected(url: str) -> None:
        engine = create_engine(database_url(url))
        async with engine.connect():
            pass
        await engine.dispose()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(connected(servers.url_after(silent.getsockname()[1], "wiki")))
        silent.setblocking(False)
        tried = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tried += 1
        assert tried == 1
