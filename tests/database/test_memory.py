"""Verified tokens are remembered exactly: what any process has revoked or rotated is refused by the next verification.

OAUTH_STORE_TEST_FULL=1 makes 10,000 rounds of the proof instead of 400.
"""

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from oauth_store import DatabaseUnavailable, SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database import remembered as memory_module
from oauth_store.database.remembered import LOOK_SECONDS, Remembered
from tests.chaos import Child, new_provider
from tests.clocks import stopped_at
from tests.databases import engine_of
from tests.steps import Provider, new_client, refresh, sign_in
from tests.workers import present_for_revocation, present_refresh_token, settle

ROUNDS = 10_000 if os.environ.get("OAUTH_STORE_TEST_FULL") else 400


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file that does not exist yet."""
    return str(tmp_path / "oauth.db")


@pytest.fixture
async def client() -> OAuthClientInformationFull:
    """A public client."""
    return new_client()


@pytest.fixture
async def provider(path: str, client: OAuthClientInformationFull) -> AsyncIterator[SQLAlchemyOAuthProvider]:
    """A provider on a file, with a client."""
    async with new_provider(path) as provider:
        await provider.register_client(client)
        yield provider


def memory_of(provider: SQLAlchemyOAuthProvider) -> Remembered:
    """What a provider remembers."""
    assert provider._store.remembered is not None
    return provider._store.remembered


def is_remembered(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> bool:
    """Whether the next verification will ask nobody."""
    return memory_of(provider).recall(hash_secret(token.access_token)) is not None


async def verify_until_remembered(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> None:
    """Verify a live token: first its use is stamped, then it is looked up once more, then it is remembered."""
    for _ in range(2):
        assert await provider.verify_token(token.access_token) is not None
        await settle(provider)
    assert is_remembered(provider, token)
    assert await provider.verify_token(token.access_token) is not None


# The other process


def serve_orders(pipe: Connection, path: str) -> None:
    """Do what the pipe says, and acknowledge it."""
    asyncio.run(_serve_orders(pipe, path))


async def _serve_orders(pipe: Connection, path: str) -> None:
    async with new_provider(path) as provider:
        await provider.check_schema()
        pipe.send("ready")
        while True:
            order, *arguments = pipe.recv()
            answer = await ORDERS[order](provider, path, *arguments)
            await settle(provider)  # a purge would hold its lock while this process waits for orders
            pipe.send(answer)


async def _rotate(
    provider: SQLAlchemyOAuthProvider, _: str, client: OAuthClientInformationFull, token: OAuthToken
) -> OAuthToken:
    return await present_refresh_token(provider, client, token.refresh_token)


async def _revoke(
    provider: SQLAlchemyOAuthProvider, _: str, client: OAuthClientInformationFull, token: OAuthToken
) -> None:
    assert await present_for_revocation(provider, client, random.choice([token.access_token, str(token.refresh_token)]))


async def _disturb(provider: SQLAlchemyOAuthProvider, path: str, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            with suppress(sqlite3.OperationalError):  # "database is locked": by those who use it
                connection.execute(statement).fetchall()


async def _back_up(provider: SQLAlchemyOAuthProvider, path: str, source: str, target: str) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


ORDERS: dict[str, Callable[..., Any]] = {
    "rotate": _rotate,
    "revoke": _revoke,
    "disturb": _disturb,
    "back up": _back_up,
}


class Other:
    """The process that serves orders."""

    def __init__(self, path: str) -> None:
        self._child = Child(serve_orders, path)
        assert self._child.receive() == "ready"

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()

    async def __call__(self, order: str, *arguments: Any) -> Any:
        """Give an order, and wait until it is acknowledged."""
        self._child.pipe.send((order, *arguments))
        return await asyncio.to_thread(self._child.receive)


DISTURBANCES = [
    ["VACUUM"],
    ["PRAGMA wal_checkpoint(PASSIVE)"],
    ["PRAGMA wal_checkpoint(RESTART)"],
    ["PRAGMA wal_checkpoint(TRUNCATE)"],
    ["PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = WAL"],
    ["PRAGMA incremental_vacuum", "PRAGMA optimize", "ANALYZE"],
    ["BEGIN IMMEDIATE", "UPDATE oauth_tokens SET scopes = ''", "ROLLBACK"],
    ["BEGIN EXCLUSIVE", "COMMIT"],
]


class TestProof:
    """Two processes on one file."""

    @pytest.mark.timeout(1800)
    async def test_what_another_process_ended_is_refused(
        self, provider: SQLAlchemyOAuthProvider, path: str, client: OAuthClientInformationFull
    ) -> None:
        """B revokes or rotates and acknowledges, A verifies: refused, every time, and remembered right before."""
        with Other(path) as other:
            token = await sign_in(provider, client)
            for _ in range(ROUNDS):
                await verify_until_remembered(provider, token)
                if random.random() < 0.5:
                    successor = await other("rotate", client, token)
                    assert await provider.verify_token(token.access_token) is None
                    token = successor
                else:
                    await other("revoke", client, token)
                    assert await provider.verify_token(token.access_token) is None
                    token = await sign_in(provider, client)

    @pytest.mark.timeout(3600)
    async def test_whatever_happens_to_the_file_in_between(
        self, provider: SQLAlchemyOAuthProvider, path: str, client: OAuthClientInformationFull, tmp_path: Path
    ) -> None:
        """The same with VACUUM, checkpoints, backups, switches of the journal mode and a second provider in between."""
        copy = str(tmp_path / "copy.db")
        with Other(path) as other:
            async with new_provider(path) as second:
                token = await sign_in(provider, client)
                for _ in range(ROUNDS // 2):
                    await verify_until_remembered(provider, token)
                    for _ in range(random.randint(0, 2)):
                        await self.disturb(other, second, client, path, copy)
                        if random.random() < 0.3:
                            await verify_until_remembered(provider, token)
                    ended = token
                    match random.randrange(4):
                        case 0:
                            token = await other("rotate", client, ended)
                        case 1:
                            token = await refresh(second, client, ended)
                        case 2:
                            await other("revoke", client, ended)
                        case 3:
                            await second.revoke_token(await self.loaded(second, client, ended))
                    if random.random() < 0.5:
                        await self.disturb(other, second, client, path, copy)
                    assert await provider.verify_token(ended.access_token) is None
                    if token is ended:
                        token = await sign_in(provider, client)

    async def disturb(
        self,
        other: Other,
        second: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        path: str,
        copy: str,
    ) -> None:
        """Do something to the file that ends no token."""
        choice = random.randrange(len(DISTURBANCES) + 2)
        if choice < len(DISTURBANCES):
            await other("disturb", *DISTURBANCES[choice])
        elif choice == len(DISTURBANCES):
            await other("back up", path, copy)
        else:
            await verify_until_remembered(second, await sign_in(second, client))

    @staticmethod
    async def loaded(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, token: OAuthToken) -> Any:
        """A refresh token as the revocation endpoint hands it over."""
        return await provider.load_refresh_token(client, str(token.refresh_token))

    async def test_a_backup_that_is_restored_into_the_file(
        self, provider: SQLAlchemyOAuthProvider, path: str, client: OAuthClientInformationFull, tmp_path: Path
    ) -> None:
        """SQLite's backup API may put an older state back, or a newer one: the next verification follows it."""
        alive, dead = str(tmp_path / "alive.db"), str(tmp_path / "dead.db")
        with Other(path) as other:
            token = await sign_in(provider, client)
            await verify_until_remembered(provider, token)
            await other("back up", path, alive)
            await other("revoke", client, token)
            await other("back up", path, dead)
            for _ in range(5):
                assert await provider.verify_token(token.access_token) is None
                await other("back up", alive, path)
                await verify_until_remembered(provider, token)
                await other("back up", dead, path)

    async def test_the_own_commits_are_seen(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A commit by this provider's own writer changes the counter, and ends what is remembered."""
        for _ in range(50):
            token = await sign_in(provider, client)
            await verify_until_remembered(provider, token)
            before = memory_of(provider).version()
            await refresh(provider, client, token)
            assert memory_of(provider).version() != before
            assert await provider.verify_token(token.access_token) is None

    async def test_a_commit_between_the_counter_and_the_row(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """64 tasks that verify while the grant is revoked: once that was acknowledged, nobody is let in."""
        for _ in range(20):
            token = await sign_in(provider, client)
            await verify_until_remembered(provider, token)
            revoked = asyncio.Event()

            async def verify(token: OAuthToken, revoked: asyncio.Event) -> None:
                for _ in range(20):
                    was_revoked = revoked.is_set()
                    answer = await provider.verify_token(token.access_token)
                    assert answer is None or not was_revoked
                    await asyncio.sleep(0)

            async def revoke(token: OAuthToken, revoked: asyncio.Event) -> None:
                await provider.register_client(new_client())  # so that all of them look it up
                assert await present_for_revocation(provider, client, token.access_token)
                revoked.set()

            await asyncio.gather(revoke(token, revoked), *(verify(token, revoked) for _ in range(64)))
            assert await provider.verify_token(token.access_token) is None

    async def test_a_commit_right_after_the_row(
        self, provider: SQLAlchemyOAuthProvider, path: str, client: OAuthClientInformationFull
    ) -> None:
        """A token that is revoked once its row was read, and before it is remembered, is refused by the next call."""
        with Other(path) as other:
            token = await sign_in(provider, client)
            assert await provider.verify_token(token.access_token) is not None
            await settle(provider)
            loop = asyncio.get_running_loop()
            event.listen(
                engine_of(provider._store.reader),
                "after_cursor_execute",
                lambda *_: asyncio.run_coroutine_threadsafe(other("revoke", client, token), loop).result(),
                once=True,
            )
            assert await provider.verify_token(token.access_token) is not None
            assert await provider.verify_token(token.access_token) is None


class TestCounter:
    """`PRAGMA data_version`, as we use it."""

    def test_the_journal_mode_may_change(self, path: str) -> None:
        """In the rollback journal's modes, in WAL mode, and across the change, each commit changes the counter."""
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("CREATE TABLE numbers (number INTEGER)")
            with closing(Remembered(path, os.stat(path).st_ino)) as memory:
                seen = {memory.version()}
                for mode in ("DELETE", "TRUNCATE", "PERSIST", "WAL"):
                    writer.execute(f"PRAGMA journal_mode = {mode}")
                    for _ in range(100):
                        before = memory.version()
                        writer.execute("INSERT INTO numbers VALUES (1)")
                        assert memory.version() not in seen | {before}
                        seen.add(memory.version())

    def test_it_never_waits(self, path: str) -> None:
        """While another process holds the file exclusively, the counter is not known, at once."""
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE numbers (number INTEGER)")
        program = (
            "import sqlite3, sys\n"
            "connection = sqlite3.connect(sys.argv[1], isolation_level=None); connection.execute('BEGIN EXCLUSIVE')\n"
            "print('held', flush=True); sys.stdin.read()"
        )
        with (
            closing(Remembered(path, os.stat(path).st_ino)) as memory,
            subprocess.Popen(
                [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as holder,
        ):
            assert holder.stdout is not None
            assert memory.version() is not None
            holder.stdout.readline()
            started = time.perf_counter()
            assert memory.version() is None
            assert time.perf_counter() - started < 3  # SQLite's own would wait for five seconds
            holder.communicate()
            assert memory.version() is not None

    def test_another_file_is_of_no_use(self, path: str) -> None:
        """Where the file was replaced before it was opened, nothing is ever remembered."""
        Path(path).touch()
        with closing(Remembered(path, os.stat(path).st_ino + 1)) as memory:
            assert memory.version() is None


class TestWhatIsRemembered:
    """Rows, by the hash of their tokens."""

    async def test_a_first_use_is_stamped_before(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A token whose first use is not in the file yet is looked up: else the stamp would be lost."""
        token = await sign_in(provider, client)
        assert await provider.verify_token(token.access_token) is not None
        assert not is_remembered(provider, token)
        await settle(provider)
        assert await provider.verify_token(token.access_token) is not None
        assert is_remembered(provider, token)

    async def test_no_token_is_kept(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Who reads the process's memory of tokens finds none."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        assert token.access_token not in repr(memory_of(provider)._verified)
        assert hash_secret(token.access_token) in memory_of(provider)._verified

    async def test_an_expired_token_is_refused(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """The clock alone ends a token too."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        found = await provider.load_access_token(token.access_token)
        assert found is not None
        assert found.expires_at is not None
        with stopped_at(found.expires_at - 1):
            assert await provider.verify_token(token.access_token) is not None
        with stopped_at(found.expires_at):
            assert is_remembered(provider, token)
            assert await provider.verify_token(token.access_token) is None

    async def test_a_token_of_another_resource_is_refused(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """What a token is for is compared with every call."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        provider.set_mcp_path("/other")
        assert is_remembered(provider, token)
        assert await provider.verify_token(token.access_token) is None

    async def test_there_is_a_limit(
        self,
        provider: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Beyond it, the oldest makes room."""
        monkeypatch.setattr(memory_module, "LIMIT", 3)
        tokens = [await sign_in(provider, client) for _ in range(5)]
        for token in tokens * 2:
            await provider.verify_token(token.access_token)
            await settle(provider)
        assert [is_remembered(provider, token) for token in tokens] == [False, False, True, True, True]

    async def test_the_same_answer(self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull) -> None:
        """What is remembered and what is looked up make the same answer."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        assert await provider.verify_token(token.access_token) == await provider.load_access_token(token.access_token)


class TestWhereItIsNot:
    """Where exactness cannot be had, nothing is remembered."""

    async def test_on_servers_and_in_engines_of_others(self, make_provider: Provider, database_url: str) -> None:
        """On PostgreSQL and MariaDB, in `:memory:`, and in an engine that was passed in, each call is looked up."""
        provider = make_provider()
        await provider.check_schema()
        if "://" in database_url:
            assert provider._store.remembered is None
            return
        assert provider._store.remembered is not None
        engine = create_async_engine(f"sqlite+aiosqlite:///{database_url}")
        for other in (make_provider(engine), make_provider(":memory:")):
            client = new_client()
            await other.register_client(client)
            token = await sign_in(other, client)
            assert await other.verify_token(token.access_token) is not None
            assert other._store.remembered is None
            await other.aclose()
        await engine.dispose()

    async def test_a_file_that_is_gone_or_was_replaced(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, path: str, tmp_path: Path
    ) -> None:
        """What is remembered of a file is no answer once another, or none, is in its place."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        aside = tmp_path / "aside.db"
        Path(path).rename(aside)
        await asyncio.sleep(LOOK_SECONDS)
        with pytest.raises(DatabaseUnavailable, match="is gone"):
            await provider.verify_token(token.access_token)
        Path(path).touch()
        with pytest.raises(DatabaseUnavailable, match="was replaced"):
            await provider.verify_token(token.access_token)
        aside.rename(path)
        assert await provider.verify_token(token.access_token) is not None

    async def test_after_the_provider_was_closed(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, path: str
    ) -> None:
        """A provider that was closed remembers nothing, and holds no connection; used again, it remembers again."""
        token = await sign_in(provider, client)
        await verify_until_remembered(provider, token)
        await provider.aclose()
        assert provider._store.remembered is None
        with Other(path) as other:
            await other("revoke", client, token)
        assert await provider.verify_token(token.access_token) is None
        await verify_until_remembered(provider, await sign_in(provider, client))

    def test_in_a_second_loop(self, path: str) -> None:
        """A provider that is used in a second event loop is as exact there."""
        provider = new_provider(path)
        client = new_client()

        async def first() -> OAuthToken:
            await provider.register_client(client)
            token = await sign_in(provider, client)
            await verify_until_remembered(provider, token)
            return token

        async def second(token: OAuthToken) -> None:
            await verify_until_remembered(provider, token)
            assert await present_for_revocation(provider, client, token.access_token)
            assert await provider.verify_token(token.access_token) is None

        token = asyncio.run(first())
        asyncio.run(second(token))
        asyncio.run(provider.aclose())
