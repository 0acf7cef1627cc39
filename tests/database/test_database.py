"""From a setting to a database: engines, event loops, cancelled requests, and files."""

import asyncio
import gc
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from oauth_store import AutoApproval, ConfigurationError, DatabaseUnavailable, SchemaError, SQLAlchemyOAuthProvider
from oauth_store.database.engines import create_engine
from oauth_store.database.models import Client, Token, clients
from oauth_store.database.schema import prepare
from oauth_store.database.store import ATTEMPTS, Store
from oauth_store.database.url import database_url
from oauth_store.errors import LostRaceError
from tests.databases import create_postgres_database, drop_postgres_database, engine_of, value_of
from tests.steps import BASE_URL, Provider, authorize, new_client, provider_on, refresh, sign_in
from tests.workers import settle


class TestSettings:
    """Settings that are not usable stop the server at construction."""

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"base_url": "wiki.example.com"}, "base_url is 'wiki.example.com', which is not a URL"),
            ({"base_url": ""}, "base_url is '', which is not a URL"),
            ({"base_url": "ftp://wiki.example.com"}, "base_url is 'ftp://wiki.example.com'"),
            ({"base_url": "http://wiki.example.com"}, "expected https://"),
            ({"base_url": "https://wiki.example.com?x=1"}, "without a user, query or fragment"),
            ({"base_url": BASE_URL, "issuer_url": "http://wiki.example.com"}, "issuer_url is"),
            ({"base_url": BASE_URL, "resource_base_url": "nonsense"}, "resource_base_url is"),
            ({"base_url": BASE_URL, "access_token_expiry_seconds": 0}, "access_token_expiry_seconds is 0"),
            ({"base_url": BASE_URL, "refresh_token_expiry_seconds": -1}, "refresh_token_expiry_seconds is -1"),
            (
                {"base_url": BASE_URL, "authorization_code_expiry_seconds": 1.5},
                "authorization_code_expiry_seconds is 1.5",
            ),
            ({"base_url": BASE_URL, "refresh_grace_seconds": -1}, "refresh_grace_seconds is -1"),
            ({"base_url": BASE_URL, "refresh_grace_seconds": None}, "refresh_grace_seconds is None"),
        ],
    )
    def test_a_bad_setting_says_what_is_expected(self, settings: dict[str, Any], complaint: str) -> None:
        """Each names the setting, what was found and what is expected."""
        with pytest.raises(ConfigurationError, match=complaint.replace("?", r"\?")):
            SQLAlchemyOAuthProvider(":memory:", approval=AutoApproval(), **settings)

    def test_a_grace_of_zero_is_a_setting(self) -> None:
        """refresh_grace_seconds=0 is allowed: it switches the replay off."""
        SQLAlchemyOAuthProvider(":memory:", base_url=BASE_URL, refresh_grace_seconds=0)

    def test_building_a_provider_touches_nothing(self, tmp_path: Path) -> None:
        """A provider can be built before its database, or its directory, exists, and outside an event loop."""
        SQLAlchemyOAuthProvider(tmp_path / "missing" / "oauth.db", base_url=BASE_URL)
        assert list(tmp_path.iterdir()) == []


class TestFiles:
    """The SQLite file."""

    async def test_a_missing_directory_is_one_clear_error(self, tmp_path: Path) -> None:
        """The error names the path and what to do; nothing is created; it works once the directory is there."""
        path = tmp_path / "missing" / "oauth.db"
        provider = SQLAlchemyOAuthProvider(path, base_url=BASE_URL)
        with pytest.raises(DatabaseUnavailable, match=r"cannot create .*missing/oauth\.db.*create its directory"):
            await provider.check_schema()
        path.parent.mkdir()
        await provider.check_schema()
        await provider.aclose()

    async def test_only_a_file_is_a_database(self, tmp_path: Path) -> None:
        """A directory, a device, a socket or a pipe is refused in one line, and SQLite never opens it."""
        os.mkfifo(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            for path, kind in (
                (tmp_path, "a directory; set MCP_OAUTH_DB to a file in it"),
                (Path("/dev/null"), "a device; set MCP_OAUTH_DB to a file"),
                (tmp_path / "pipe", "a pipe; set MCP_OAUTH_DB to a file"),
                (tmp_path / "socket", "a socket; set MCP_OAUTH_DB to a file"),
            ):
                provider = SQLAlchemyOAuthProvider(path, base_url=BASE_URL)
                with pytest.raises(DatabaseUnavailable) as caught:
                    await provider.check_schema()
                assert str(caught.value) == f"{path} is {kind}"

    async def test_a_file_that_is_no_database_stays_as_it_is(self, tmp_path: Path) -> None:
        """A text file is refused, and not a byte of it is changed."""
        path = tmp_path / "notes.txt"
        content = b"these are my notes, and no database at all\n" * 100
        path.write_bytes(content)
        provider = SQLAlchemyOAuthProvider(path, base_url=BASE_URL)
        with pytest.raises(SchemaError, match="is not an SQLite database"):
            await provider.check_schema()
        await provider.aclose()
        assert path.read_bytes() == content
        assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write here")
    def test_an_unwritable_directory_is_one_clear_error(self) -> None:
        """A user who may not write there gets one line, and exit code 1."""
        with tempfile.TemporaryDirectory() as parent:
            Path(parent).chmod(0o755)
            directory = Path(parent) / "locked"
            directory.mkdir(mode=0o555)
            ran = self.open_as_nobody(directory / "oauth.db")
            left = list(directory.iterdir())
        assert ran.returncode == 1
        assert f"cannot create {directory / 'oauth.db'}: Permission denied; create its directory" in ran.stderr
        assert left == []

    def open_as_nobody(self, path: Path) -> subprocess.CompletedProcess[str]:
        """Open a database in a process that has given up its rights."""
        program = (
            "import asyncio, os, sys, concurrent.futures.thread; from oauth_store import *\n"
            f"target = SQLAlchemyOAuthProvider({str(path)!r}, base_url={BASE_URL!r})\n"
            "os.setuid(65534)\n"
            "try: asyncio.run(target.check_schema())\n"
            "except OAuthStoreError as e: os.write(2, str(e).encode()); os._exit(1)"
        )
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    async def test_the_files_are_the_owners_alone(self, tmp_path: Path) -> None:
        """The database, its -wal and its -shm have mode 0600, whatever the umask."""
        before = os.umask(0)
        try:
            async with provider_on(tmp_path / "oauth.db") as provider:
                await provider.register_client(new_client())
                modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
        finally:
            os.umask(before)
        assert modes == {"oauth.db": 0o600, "oauth.db-wal": 0o600, "oauth.db-shm": 0o600}

    async def test_a_link_to_a_file_that_is_not_there_yet(self, tmp_path: Path) -> None:
        """Where the path is a link to a file that does not exist, that file is the owner's alone; the link stays."""
        disk = tmp_path / "disk"
        disk.mkdir()
        path = tmp_path / "oauth.db"
        path.symlink_to("disk/oauth.db")
        before = os.umask(0)
        try:
            async with provider_on(path) as provider:
                await provider.register_client(new_client())
                modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in disk.iterdir()}
        finally:
            os.umask(before)
        assert modes == {"oauth.db": 0o600, "oauth.db-wal": 0o600, "oauth.db-shm": 0o600}
        assert path.is_symlink()

    async def test_a_link_into_a_directory_that_is_not_there(self, tmp_path: Path) -> None:
        """The error names the path behind the link: its directory is what is missing."""
        path = tmp_path / "oauth.db"
        path.symlink_to("missing/other.db")
        provider = SQLAlchemyOAuthProvider(path, base_url=BASE_URL)
        with pytest.raises(DatabaseUnavailable, match=r"cannot create .*missing/other\.db.*create its directory"):
            await provider.check_schema()
        await provider.aclose()

    async def test_no_secret_is_in_the_files(self, tmp_path: Path) -> None:
        """Who finds the database, with its -wal, finds no token, code, handle or client secret in it."""
        path = tmp_path / "oauth.db"
        async with provider_on(path) as provider:
            secret = "the-secret-of-this-client"
            client = new_client(client_secret=secret, token_endpoint_auth_method="client_secret_post")
            await provider.register_client(client)
            code = await authorize(provider, client)
            first = await sign_in(provider, client)
            second = await refresh(provider, client, first)
            third = await refresh(provider, client, second)
            again = await refresh(provider, client, second)
            assert again.access_token == third.access_token
            tokens = [
                getattr(token, kind) for token in (first, second, third) for kind in ("access_token", "refresh_token")
            ]
            secrets = [secret, code, *tokens]
            secrets += [value.split("_", 1)[1] for value in [code, *tokens]]
            # Another process looks: closing the file in this one would drop SQLite's locks on it.
            program = (
                "import pathlib, sys; held = b''.join(p.read_bytes() for p in pathlib.Path(sys.argv[1]).iterdir())\n"
                "assert b'Test client' in held\n"
                "sys.exit(sum(secret.encode() in held for secret in sys.argv[2:]))"
            )
            subprocess.run([sys.executable, "-c", program, str(tmp_path), *secrets], check=True)

    async def test_a_wal_that_grew_shrinks_again(self, tmp_path: Path) -> None:
        """A -wal that grew while somebody read for long is cut back to 8 MiB after it was moved into the file."""
        path = tmp_path / "oauth.db"
        async with SQLAlchemyOAuthProvider(path, base_url=BASE_URL, approval=AutoApproval()) as provider:
            await provider.register_client(new_client())
            with closing(sqlite3.connect(path, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM oauth_clients").fetchone()
                rows = [{"client_id": f"{n}", "client_metadata": "x" * 2**20, "created_at": 1} for n in range(12)]
                await provider._store.write(lambda session: session.execute(insert(Client), rows) and None)
                assert Path(f"{path}-wal").stat().st_size > 12 * 2**20
            for _ in range(3):
                await provider.register_client(new_client())
            assert Path(f"{path}-wal").stat().st_size <= 8 * 2**20

    async def test_the_settings_of_a_file(self, tmp_path: Path) -> None:
        """Both connections enforce foreign keys, wipe what is deleted, wait for locks and survive a power cut."""
        async with SQLAlchemyOAuthProvider(tmp_path / "oauth.db", base_url=BASE_URL) as provider:
            await provider.check_schema()
            names = ("foreign_keys", "secure_delete", "busy_timeout", "synchronous", "journal_mode")
            for run in (provider._store.write, provider._store.read):
                settings = {name: await run(Session.scalar, text(f"PRAGMA {name}")) for name in names}
                assert settings == {
                    "foreign_keys": 1,
                    "secure_delete": 1,
                    "busy_timeout": 5000,
                    "synchronous": 2,
                    "journal_mode": "wal",
                }

    async def test_a_file_that_was_replaced_is_not_used(self, tmp_path: Path) -> None:
        """SQLite would write to the file that is gone, or mix the two: all is refused until it is put back."""
        path, aside = tmp_path / "oauth.db", tmp_path / "aside.db"
        async with provider_on(path) as provider:
            client = new_client()
            await provider.register_client(client)
            path.rename(aside)
            with pytest.raises(DatabaseUnavailable, match="is gone"):
                await provider.get_client(client.client_id)
            path.write_bytes(b"")
            for step in (provider.get_client(client.client_id), provider.register_client(new_client())):
                with pytest.raises(DatabaseUnavailable, match="was replaced while it was in use"):
                    await step
            aside.rename(path)
            assert await sign_in(provider, client)

    async def test_a_file_that_goes_while_it_is_written_to(self, tmp_path: Path) -> None:
        """What would be committed to a file that is gone is not acknowledged, and is not there once it is back."""
        path, aside = tmp_path / "oauth.db", tmp_path / "aside.db"
        async with SQLAlchemyOAuthProvider(path, base_url=BASE_URL, approval=AutoApproval()) as provider:
            client = new_client()
            await provider.register_client(client)

            def step(session: Session) -> None:
                session.execute(delete(Client))
                path.rename(aside)

            with pytest.raises(DatabaseUnavailable, match="is gone"):
                await provider._store.write(step)
            aside.rename(path)
            assert await sign_in(provider, client)

    async def test_a_restored_copy_runs_in_wal_mode_again(self, tmp_path: Path) -> None:
        """A copy that VACUUM INTO made, which is not in WAL mode, is switched back at first use."""
        async with SQLAlchemyOAuthProvider(tmp_path / "oauth.db", base_url=BASE_URL) as provider:
            await provider.check_schema()
            await provider._store.read(Session.execute, text(f"VACUUM INTO '{tmp_path / 'copy.db'}'"))
        async with SQLAlchemyOAuthProvider(tmp_path / "copy.db", base_url=BASE_URL) as provider:
            await provider.register_client(new_client())
            assert await provider._store.write(Session.scalar, text("PRAGMA journal_mode")) == "wal"


class TestMemory:
    """`:memory:`, for tests of one's own."""

    async def test_a_whole_flow(self) -> None:
        """All steps work, also many at once, and nothing is left behind."""
        async with provider_on(":memory:") as provider:
            client = new_client()
            await provider.register_client(client)
            tokens = await asyncio.gather(*(sign_in(provider, client) for _ in range(20)))
            for token in tokens:
                assert await provider.verify_token(token.access_token) is not None

    def test_it_lives_as_long_as_its_provider(self) -> None:
        """Another event loop finds the same database; another provider has its own."""
        provider = provider_on(":memory:")
        client = new_client()

        async def crowd() -> None:
            await asyncio.gather(*(provider.get_client(client.client_id) for _ in range(20)))

        asyncio.run(provider.register_client(client))
        asyncio.run(crowd())
        asyncio.run(crowd())
        assert asyncio.run(provider.get_client(client.client_id)) is not None
        other = SQLAlchemyOAuthProvider(":memory:", base_url=BASE_URL)
        assert asyncio.run(other.get_client(client.client_id)) is None
        asyncio.run(provider.aclose())
        asyncio.run(other.aclose())


class TestTransactions:
    """A step that fails leaves nothing."""

    async def test_an_error_rolls_back(self, provider: SQLAlchemyOAuthProvider) -> None:
        """What a step wrote before it failed is gone, and neither stays open nor goes into the next transaction."""
        client = new_client()
        await provider.register_client(client)

        def fail(session: Session) -> None:
            session.execute(delete(Client))
            raise ZeroDivisionError

        def in_transaction(session: Session) -> bool:
            driver_connection = session.connection().connection.driver_connection
            return bool(getattr(driver_connection, "in_transaction", False))

        with pytest.raises(ZeroDivisionError):
            await provider._store.write(fail)
        assert not await provider._store.read(in_transaction)
        assert not provider._store.sqlite or not await provider._store.write(in_transaction)
        assert await provider.get_client(client.client_id) is not None

    async def test_an_error_rolls_back_in_memory(self) -> None:
        """The same holds for `:memory:`."""
        async with provider_on(":memory:") as provider:
            await self.test_an_error_rolls_back(provider)


class TestEventLoops:
    """One provider, several loops after each other: `asyncio.run(check_schema())`, then the server."""

    @pytest.mark.filterwarnings(  # asyncpg complains of the connections that died with their loop
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
    )
    def test_a_second_loop_works(self, database_url: str) -> None:
        """Connections of a loop that has ended are not used, nor waited for."""
        provider = provider_on(database_url)
        client = new_client()

        async def crowd() -> None:
            await asyncio.gather(*(sign_in(provider, client) for _ in range(20)))

        asyncio.run(provider.check_schema())
        asyncio.run(provider.register_client(client))
        asyncio.run(crowd())
        asyncio.run(crowd())
        asyncio.run(provider.aclose())
        gc.collect()


class TestEngine:
    """An engine that was passed in."""

    async def test_it_is_used_and_not_disposed(self, database_url_of_engine: str) -> None:
        """The provider works on it, and leaves it open."""
        engine = create_async_engine(database_url_of_engine)
        provider = provider_on(engine)
        client = new_client()
        await provider.register_client(client)
        token = await refresh(provider, client, await sign_in(provider, client))
        assert await provider.verify_token(token.access_token) is not None
        pool = engine.pool
        await provider.aclose()
        assert engine.pool is pool
        async with engine.connect() as connection:
            assert (await connection.execute(select(func.count()).select_from(Client))).scalar() == 1
        await engine.dispose()

    @pytest.fixture
    def database_url_of_engine(self, database_url: str) -> str:
        from oauth_store.database.url import database_url as url_of

        return url_of(database_url).render_as_string(hide_password=False)


async def test_steps_of_a_new_provider_wait_for_its_schema(empty_database_url: str) -> None:
    """Fifty requests that arrive first at once all work, on a database that was empty."""
    async with provider_on(empty_database_url) as provider:
        clients = [new_client() for _ in range(50)]
        await asyncio.gather(*(provider.register_client(client) for client in clients))
        assert all(await asyncio.gather(*(provider.get_client(client.client_id) for client in clients)))


@pytest.mark.timeout(60)  # from Python 3.12 on, it used to wait without ever letting the event loop go on
async def test_a_step_that_has_just_ended_does_not_keep_it_open(provider: SQLAlchemyOAuthProvider) -> None:
    """Closing ends, also where a step is done and the event loop has not yet told so."""
    step = provider._store.keep(asyncio.create_task(provider.check_schema()))
    while not step.done():  # noqa: ASYNC110 (to be back before the loop tells of its end)
        await asyncio.sleep(0)
    assert step in provider._store._steps
    await provider.aclose()
    assert provider._store._steps == set()


async def test_closing_waits_for_what_is_under_way(provider: SQLAlchemyOAuthProvider) -> None:
    """A step that nobody waits for has done its work when aclose() returns: the event loop may end then."""
    await provider.check_schema()
    client = new_client()

    def add(session: Session) -> None:
        session.execute(insert(clients), {"client_id": client.client_id, "client_metadata": "{}", "created_at": 1})

    async def slow() -> None:
        await asyncio.sleep(0.2)
        await provider._store.write(add)

    step = provider._store.keep(asyncio.create_task(slow()))
    await provider.aclose()
    assert step.done()
    assert step.exception() is None


async def test_a_closed_provider_opens_again(provider: SQLAlchemyOAuthProvider) -> None:
    """aclose() ends connections, not the provider."""
    client = new_client()
    await provider.register_client(client)
    await provider.aclose()
    assert await provider.get_client(client.client_id) is not None


class TestCancelledRequests:
    """A client that hangs up cancels its request; the step under way is finished."""

    async def test_no_step_is_half_done(self, make_provider: Provider) -> None:
        """However early a refresh is cancelled, it happened or it did not: the old token or the successor works."""
        provider = make_provider()
        client = new_client()
        await provider.register_client(client)
        for round_ in range(40):
            token = await sign_in(provider, client)
            task = asyncio.create_task(refresh(provider, client, token))
            for _ in range(round_):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            again = await refresh(provider, client, token)
            assert await provider.verify_token(again.access_token) is not None
        unpaired = select(func.count()).select_from(Token).where(Token.paired_hash.is_(None))
        assert await value_of(provider, unpaired) == 0

    async def test_a_step_that_has_begun_is_finished(self, provider: SQLAlchemyOAuthProvider) -> None:
        """However early or late its request is cancelled, what a step does takes effect."""
        await provider.check_schema()
        for turns in range(1, 30):
            client = new_client()
            task = asyncio.create_task(provider.register_client(client))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await settle(provider)
            assert await provider.get_client(client.client_id) is not None

    async def test_no_connection_and_no_lock_is_lost(self, make_provider: Provider, database_url: str) -> None:
        """After 200 cancelled writes the pool has opened no more connections than it may, and others can write."""
        provider = make_provider()
        opened = 0

        def count(*_: object) -> None:
            nonlocal opened
            opened += 1

        from sqlalchemy import event

        event.listen(engine_of(provider._store.writer), "connect", count)
        tasks = []
        for number in range(200):
            task = asyncio.create_task(provider.register_client(new_client()))
            tasks.append(task)
            if number % 3:
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await provider.register_client(new_client())
        assert opened <= (1 if provider._store.sqlite else 10)
        other = make_provider()
        await asyncio.wait_for(other.register_client(new_client()), timeout=2)


async def test_nothing_of_a_failed_transaction_stays(provider: SQLAlchemyOAuthProvider) -> None:
    """An error inside write() rolls everything back, also errors that are frozen dataclasses."""
    from mcp.server.auth.provider import TokenError

    def fail(session: Session) -> None:
        session.execute(insert(Client).values(client_id="x", client_metadata="{}", created_at=1))
        raise TokenError("invalid_grant")

    with pytest.raises(TokenError):
        await provider._store.write(fail)
    assert await provider.get_client("x") is None


def test_sqlite_errors_do_not_print_values(tmp_path: Path) -> None:
    """An error of the database driver carries no bound value into the log."""

    async def fail() -> str:
        engine = create_engine(database_url(tmp_path / "x.db"))
        try:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT :secret FROM nowhere"), {"secret": "very-private"})
        except Exception as error:
            return str(error)
        finally:
            await engine.dispose()
        return ""

    assert "nowhere" in (message := asyncio.run(fail()))
    assert "very-private" not in message


async def test_errors_do_not_print_values(provider: SQLAlchemyOAuthProvider) -> None:
    """Nor does an error of any other database, of what is written or of what is read."""
    query, values = text("SELECT * FROM nowhere WHERE x = :secret"), {"secret": "very-private"}
    for run in (provider._store.write, provider._store.read):
        with pytest.raises((DBAPIError, DatabaseUnavailable), match="nowhere") as caught:
            await run(Session.execute, query, values)
        assert "very-private" not in str(caught.value)
        assert "very-private" not in "".join(traceback.format_exception(caught.value))  # its cause is in the log too


async def test_a_serialization_failure_is_tried_again(make_provider: Provider, database_url: str) -> None:
    """In an engine of REPEATABLE READ, where PostgreSQL refuses who comes second, refreshes at once give one pair."""
    url = make_url(database_url) if "://" in database_url else None
    if url is None or url.get_backend_name() != "postgresql":
        pytest.skip("SQLite has one writer, and MariaDB waits")
    engine = create_async_engine(url.set(drivername="postgresql+asyncpg"), isolation_level="REPEATABLE READ")
    provider = make_provider(engine)
    client = new_client()
    await provider.register_client(client)
    for _ in range(5):
        token = await sign_in(provider, client)
        answers = await asyncio.gather(*(refresh(provider, client, token) for _ in range(4)))
        assert len({answer.access_token for answer in answers}) == 1
    await provider.aclose()
    await engine.dispose()


async def test_a_deadlock_is_tried_again(provider: SQLAlchemyOAuthProvider) -> None:
    """Two transactions that lock two rows in opposite order both succeed on a server: one is run again."""
    if provider._store.sqlite:
        pytest.skip("SQLite has one writer: it knows no deadlock")
    for name in ("a", "b"):
        await provider.register_client(new_client(client_id=name))
    tries = {"a": 0, "b": 0}
    first_locked = {"a": asyncio.Event(), "b": asyncio.Event()}

    def step(session: Session, mine: str, other: str) -> None:
        tries[mine] += 1
        session.execute(text("UPDATE oauth_clients SET created_at = 1 WHERE client_id = :id"), {"id": mine})
        first_locked[mine].set()
        await_only(first_locked[other].wait())
        session.execute(text("UPDATE oauth_clients SET created_at = 2 WHERE client_id = :id"), {"id": other})

    await asyncio.gather(provider._store.write(step, "a", "b"), provider._store.write(step, "b", "a"))
    assert sorted(tries.values()) == [1, 2]


async def test_who_loses_a_race_begins_anew(provider: SQLAlchemyOAuthProvider) -> None:
    """A step that was overtaken is taken again, a few times; after that, the client is told to try later."""
    tries = 0

    def step(_session: Session, losses: int) -> str:
        nonlocal tries
        tries += 1
        if tries <= losses:
            raise LostRaceError
        return "won"

    assert await provider._store.write(step, ATTEMPTS - 1) == "won"
    assert tries == ATTEMPTS
    tries = 0
    with pytest.raises(DatabaseUnavailable, match="changed the same rows"):
        await provider._store.write(step, ATTEMPTS)
    assert tries == ATTEMPTS


@pytest.mark.parametrize("memory", [False, True])
async def test_a_commit_that_fails_leaves_no_transaction_open(tmp_path: Path, memory: bool) -> None:
    """Where a statement fails in a transaction, SQLite's lock is given back, and the next step works."""
    path = tmp_path / "oauth.db"
    database = ":memory:" if memory else path
    async with provider_on(database) as provider:
        client = new_client()
        await provider.register_client(client)
        again = {"client_id": client.client_id, "client_metadata": "{}", "created_at": 1}
        for _ in range(3):
            with pytest.raises(IntegrityError):
                await provider._store.write(Session.execute, insert(clients), again)
            assert await provider.get_client(client.client_id) is not None  # and nothing is sent with the next read
            if not memory:
                other = sqlite3.connect(path, timeout=0, isolation_level=None)
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")
                other.close()
        await sign_in(provider, client)


async def test_a_commit_that_is_refused_is_rolled_back(tmp_path: Path) -> None:
    """Where SQLite refuses the COMMIT itself, as for a deferred foreign key, no lock is held, and no row stays."""
    path = tmp_path / "oauth.db"

    def orphan(session: Session) -> None:
        session.execute(insert(clients), {"client_id": "x", "client_metadata": "{}", "created_at": 1})
        session.execute(text("PRAGMA defer_foreign_keys = ON"))
        session.execute(
            text(
                "INSERT INTO oauth_tokens (token_hash, kind, grant_id, client_id, scopes, created_at, expires_at) "
                "VALUES (x'01', 'refresh_token', x'02', 'nobody', '', 1, 2)"
            )
        )

    async with provider_on(path) as provider:
        await provider.register_client(new_client())
        with pytest.raises(IntegrityError):
            await provider._store.write(orphan)
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        other.close()
        await provider.register_client(new_client())
        assert await provider.get_client("x") is None


async def test_sqlite_is_asked_by_its_own_rules(tmp_path: Path) -> None:
    """A second process that writes at the same time is waited for, not failed."""
    path = tmp_path / "oauth.db"
    async with SQLAlchemyOAuthProvider(path, base_url=BASE_URL) as provider:
        await provider.check_schema()
        program = (
            "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); time.sleep(1); c.execute('COMMIT')"
        )
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            await asyncio.to_thread(other.stdout.readline)
            assert await provider.get_client("nobody") is None  # a reader never waits
            await provider.register_client(new_client(client_id="patient"))
        assert await provider.get_client("patient") is not None
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("passed_in", [False, True])
async def test_who_reads_first_may_still_write(tmp_path: Path, passed_in: bool) -> None:
    """A step looks without a lock; once it writes, no other process does, and who wrote in between does not fail it."""
    path = tmp_path / "oauth.db"
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with SQLAlchemyOAuthProvider(
        engine if passed_in else path, base_url=BASE_URL, approval=AutoApproval()
    ) as provider:
        await provider.register_client(new_client())

        def step(session: Session) -> int:
            rows = session.execute(select(func.count()).select_from(Client)).scalar_one()
            if passed_in:  # on its engine, as a server's, a step begins at once
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    await_only(asyncio.to_thread(other.execute, "BEGIN IMMEDIATE"))
            else:
                other.execute("UPDATE oauth_clients SET created_at = 2")
            session.execute(delete(Client))
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                if passed_in:
                    await_only(asyncio.to_thread(other.execute, "BEGIN IMMEDIATE"))
                else:
                    other.execute("BEGIN IMMEDIATE")
            return rows

        other = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        assert await provider._store.write(step) == 1
        other.close()
        assert await provider._store.read(Session.scalar, select(func.count()).select_from(Client)) == 0
    await engine.dispose()


async def test_prepare_runs_once(tmp_path: Path) -> None:
    """The schema is looked at once for a provider, not with every step."""
    looks = 0

    async def counted(store: Store) -> None:
        nonlocal looks
        looks += 1
        await prepare(store)

    store = Store(tmp_path / "x.db", counted)
    await asyncio.gather(*(store.read(Session.execute, text("SELECT 1")) for _ in range(10)))
    await store.read(Session.execute, text("SELECT 1"))
    await store.close()
    assert looks == 1


async def test_what_was_only_read_is_closed(postgres_server: str) -> None:
    """A database that was read from without a step, as commands do, has no connection left after aclose()."""
    url = await create_postgres_database(postgres_server)
    try:
        store = Store(url, prepare)
        await store.transact(Session.execute, False, text("SELECT 1"))
        await store.close()
        watcher = create_engine(make_url(url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        async with asyncio.timeout(10), watcher.connect() as connection:
            while (await connection.execute(text(query))).scalar():
                await connection.rollback()
                await asyncio.sleep(0.05)
    finally:
        await drop_postgres_database(postgres_server, url)
