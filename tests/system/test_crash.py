"""A process that is killed at any moment has lost nothing that it acknowledged."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos import Child, create_schema, flow_until_killed, new_provider
from tests.databases import check_integrity
from tests.ledgers import Ledger

KILLS = 20
TASKS = 5
LONGEST_LIFE_SECONDS = 0.3


@pytest.fixture
async def checked_database(database_url: str) -> AsyncIterator[str]:
    """A database that must be whole afterwards."""
    yield database_url
    if "://" not in database_url:
        check_integrity(database_url)


async def test_nothing_acknowledged_is_lost(
    checked_database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at random moments: tokens go on, codes are redeemable or redeemed, a revocation stays, half is nothing.

    Beside the processes that are killed, another one works on the same database all the time, undisturbed.
    """
    ledger = Ledger()
    companion_journal = tmp_path / "companion"
    with Child(flow_until_killed, checked_database, companion_journal, 1) as companion:
        companion.receive()
        for kill in range(KILLS):
            journal = tmp_path / f"journal-{kill}"
            with Child(flow_until_killed, checked_database, journal, TASKS) as child:
                child.receive()
                await asyncio.sleep(random.uniform(0, LONGEST_LIFE_SECONDS))  # for nothing: it is the random moment
                assert child.process.is_alive()
            async with new_provider(checked_database) as provider:
                await ledger.check(provider, journal)
        assert companion.process.is_alive(), "a process was disturbed by those that were killed"
    async with new_provider(checked_database) as provider:
        await ledger.check(provider, companion_journal)
        await ledger.check_all_again(provider)
    with capsys.disabled():
        print(f"\n{checked_database.partition('://')[0] if '://' in checked_database else 'sqlite'}:", end=" ")
        print(", ".join(f"{count} {what}" for what, count in sorted(ledger.counts.items())))


async def test_a_schema_that_was_half_created_is_created(empty_database_url: str) -> None:
    """SIGKILL during the first use of an empty database: the next process creates the schema all the same."""
    if empty_database_url.startswith(("mysql", "mariadb")):
        pytest.skip("MariaDB commits each CREATE TABLE by itself: see docs/reliability.md")
    for seconds in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        with Child(create_schema, empty_database_url) as child:
            assert child.receive() == "begins"
            child.pipe.poll(seconds)  # it may be done before
    async with new_provider(empty_database_url) as provider:
        await provider.check_schema()
    if "://" not in empty_database_url:
        check_integrity(empty_database_url)
        assert sqlite3.connect(empty_database_url).execute("SELECT count(*) FROM oauth_tokens").fetchone() == (0,)
