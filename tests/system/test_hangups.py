"""A server hangs up on connections that it thinks idle, or is restarted: no client learns of it."""

import asyncio
from contextlib import suppress

import asyncmy
import asyncpg
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from oauth_store import DatabaseUnavailable, SQLAlchemyOAuthProvider
from oauth_store.database.engines import POOL_SIZE
from tests.steps import new_client, refresh, sign_in
from tests.workers import settle


async def hang_up(database_url: str) -> None:
    """Close every connection to a database, from the server's side."""
    url = make_url(database_url)
    if url.get_backend_name() == "postgresql":
        connection = await asyncpg.connect(database_url)
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.close()
        return
    killer = await asyncmy.connect(host=url.host, port=url.port or 3306, user=url.username, password=url.password or "")
    async with killer.cursor() as cursor:
        await cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", (url.database,))
        for (number,) in await cursor.fetchall():
            with suppress(asyncmy.errors.OperationalError):  # it has gone by itself
                await cursor.execute(f"KILL {number}")
    await killer.ensure_closed()


@pytest.fixture
def server_url(database_url: str) -> str:
    """A database on a server: a file cannot hang up."""
    if "://" not in database_url:
        pytest.skip("SQLite has no server")
    return database_url


async def fill_pool(provider: SQLAlchemyOAuthProvider, client_id: str) -> None:
    """Open as many connections as there may be."""
    await asyncio.gather(*(provider.get_client(client_id) for _ in range(POOL_SIZE)))


async def test_between_two_requests(provider: SQLAlchemyOAuthProvider, server_url: str) -> None:
    """A lookup and a refresh work at once after the server hung up on every connection."""
    client = new_client()
    await provider.register_client(client)
    token = await sign_in(provider, client)
    for _ in range(3):
        await fill_pool(provider, client.client_id)
        await hang_up(server_url)
        assert await provider.verify_token(token.access_token) is not None
        await settle(provider)
        await fill_pool(provider, client.client_id)
        await hang_up(server_url)
        token = await refresh(provider, client, token)


async def test_in_the_middle_of_lookups(provider: SQLAlchemyOAuthProvider, server_url: str) -> None:
    """What was looked up while the server hung up is looked up again, and no connection is lost."""
    client = new_client()
    await provider.register_client(client)
    for _ in range(2 * POOL_SIZE):
        lookups = [provider.get_client(client.client_id) for _ in range(POOL_SIZE)]
        *found, _ = await asyncio.gather(*lookups, hang_up(server_url))
        assert all(one is not None for one in found)


async def test_before_a_commit(provider: SQLAlchemyOAuthProvider, server_url: str) -> None:
    """Where the server hangs up inside a transaction, the step is taken again, and only once takes effect."""
    client = new_client()
    await provider.register_client(client)
    token = await sign_in(provider, client)
    store = provider._store
    attempts = 0

    def step(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        connection = session.connection()
        connection.exec_driver_sql("UPDATE oauth_clients SET created_at = created_at + 1")
        if attempts == 1:
            await_only(hang_up(server_url))
            connection.exec_driver_sql("UPDATE oauth_clients SET created_at = created_at + 1")

    def created_at(session: Session) -> int:
        return int(session.connection().exec_driver_sql("SELECT created_at FROM oauth_clients").scalar_one())

    before = await store.read(created_at)
    await store.write(step)
    assert attempts == 2
    assert await store.read(created_at) == before + 1
    assert await provider.verify_token(token.access_token) is not None


async def test_at_the_commit(provider: SQLAlchemyOAuthProvider, server_url: str) -> None:
    """A COMMIT that got no answer is an outage, and the step is not taken again: nobody knows whether it counts."""
    attempts = 0

    def step(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        session.connection().exec_driver_sql("UPDATE oauth_clients SET created_at = 0")
        await_only(hang_up(server_url))

    with pytest.raises(DatabaseUnavailable):
        await provider._store.write(step)
    assert attempts == 1
    await fill_pool(provider, "unknown")
