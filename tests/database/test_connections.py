"""Connections that a fork inherited, that another event loop owns, or that the network forgot."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy.ext.asyncio import AsyncEngine

from oauth_store import ConfigurationError, SQLAlchemyOAuthProvider
from oauth_store.database import engines, store
from oauth_store.database.url import database_url as as_url
from tests.chaos import Child, fork_after_use, fork_amid_writes, fork_with_an_engine
from tests.databases import is_server
from tests.steps import new_client, provider_on, sign_in
from tests.tunnels import Tunnel, tunnel_to


class TestForks:
    """A provider that was used before a fork, as `gunicorn --preload` does."""

    def test_a_fork_begins_anew(self, database_url: str) -> None:
        """Both processes go on: the child with connections of its own, the parent with those that it had."""
        with Child(fork_after_use, database_url) as child:
            assert child.receive(30) == (0, True, True, True)

    def test_a_fork_has_a_memory_of_its_own(self) -> None:
        """`:memory:` is empty in a forked process, and does not hang."""
        with Child(fork_after_use, ":memory:") as child:
            assert child.receive(30) == (0, False, False, True)

    def test_a_fork_of_an_engine_that_was_passed_in(self, database_url: str) -> None:
        """Its child opens connections of its own too, and leaves the parent's transactions alone."""
        with Child(fork_with_an_engine, as_url(database_url)) as child:
            assert child.receive(30) == (0, "read write")

    def test_a_fork_in_the_middle_of_writes(self, database_url: str) -> None:
        """The child finds no lock that a step of its parent held, and neither loses what it writes."""
        with Child(fork_amid_writes, database_url) as child:
            tokens, flows = child.receive(120)
        assert None not in tokens
        assert len(tokens) == 10
        assert flows > 10


class TestSeveralLoops:
    """One provider in two event loops at the same time."""

    @pytest.fixture
    def other_loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        """An event loop that runs in another thread."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        yield loop
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def test_a_file_serves_both(self, tmp_path: object, other_loop: asyncio.AbstractEventLoop) -> None:
        """The connection of an SQLite file has a thread of its own, so every loop may use it."""
        for database in (f"{tmp_path}/oauth.db", ":memory:"):
            provider, client = provider_on(database), new_client()
            await provider.register_client(client)

            async def crowd(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull) -> list[OAuthToken]:
                return await asyncio.gather(*(sign_in(provider, client) for _ in range(20)))

            theirs = asyncio.run_coroutine_threadsafe(crowd(provider, client), other_loop)
            ours = await crowd(provider, client)
            pairs = [*ours, *await asyncio.wrap_future(theirs)]
            for pair in pairs:
                assert await provider.verify_token(pair.access_token) is not None
            await provider.aclose()

    async def test_a_server_refuses_the_second(self, database_url: str, other_loop: asyncio.AbstractEventLoop) -> None:
        """A server's connections belong to the loop that opened them: another one is told so, and the first goes on."""
        if not is_server(database_url):
            pytest.skip("a file serves both")
        provider, client = provider_on(database_url), new_client()
        await provider.register_client(client)
        with pytest.raises(ConfigurationError, match="build a provider for each event loop"):
            await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(provider.get_client(client.client_id), other_loop)
            )
        assert await provider.get_client(client.client_id) is not None
        await provider.aclose()
        found = asyncio.run_coroutine_threadsafe(provider.get_client(client.client_id), other_loop)
        assert await asyncio.wrap_future(found) is not None  # the first has let go of it
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(provider.aclose(), other_loop))


class TestForgottenConnections:
    """A network that drops connections without a word, as a NAT does with idle ones, and a machine that slept."""

    @pytest.fixture
    async def tunnel(self, database_url: str) -> AsyncIterator[tuple[Tunnel, str]]:
        """A network to the database, and the database's URL through it."""
        if not is_server(database_url):
            pytest.skip("no network leads to a file")
        async with tunnel_to(database_url) as tunnel_and_url:
            yield tunnel_and_url

    async def test_one_timeout_is_enough(self, tunnel: tuple[Tunnel, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """After ten connections were forgotten, one request waits for one time-out, and all get their answers."""
        network, url = tunnel
        monkeypatch.setattr(engines, "COMMAND_TIMEOUT_SECONDS", 2)  # rather than 10
        monkeypatch.setattr(store, "PATIENCE_SECONDS", 3.9)  # rather than 15: too short for a second time-out
        provider, client = provider_on(url), new_client()
        await provider.register_client(client)
        pairs = await asyncio.gather(*(sign_in(provider, client) for _ in range(20)))
        assert network.connections >= 5
        network.forget()
        started = time.monotonic()
        for pair in pairs:
            assert await provider.verify_token(pair.access_token) is not None
        assert time.monotonic() - started < 6  # one time-out, and not a second, nor one for each connection
        network.forget()
        assert len(await asyncio.gather(*(sign_in(provider, client) for _ in range(20)))) == 20
        await provider.aclose()

    async def test_the_system_watches_them(self, tunnel: tuple[Tunnel, str]) -> None:
        """The system gives up a connection whose other end acknowledges nothing for 5 seconds, also an idle one."""
        provider = provider_on(tunnel[1])
        await provider.check_schema()
        assert isinstance(provider._store.writer, AsyncEngine)
        async with provider._store.writer.connect() as connection:
            raw = await connection.get_raw_connection()
            connected = getattr(raw.driver_connection, "_transport").get_extra_info("socket")  # noqa: B009
            assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        await provider.aclose()
