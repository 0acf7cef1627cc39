"""The state of the schema at first use, and its creation by any number of processes at once."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from alembic import context
from alembic.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from oauth_store import SchemaError
from oauth_store.database.models import Base
from oauth_store.database.names import VERSION_TABLE
from oauth_store.database.schema import HEAD, alembic_config, downgrade, upgrade
from oauth_store.database.url import database_url as as_url
from tests.commands import alembic
from tests.databases import (
    create_postgres_database,
    drop_postgres_database,
    dump,
    execute,
    file_bytes,
    is_server,
    rows_of,
    select,
    shape,
)
from tests.forks import context as forks
from tests.steps import RESOURCE, new_client, provider_on
from tests.vs2 import VS2

ROOT = Path(__file__).parent.parent.parent
COMMANDS = "run `alembic upgrade head` (in a checkout) or `oauth-store upgrade`"
START_TIMEOUT_SECONDS = 60


async def refusal(url: str) -> str:
    """What a provider says that cannot use the database: at the start, and again at each step of a flow."""
    async with provider_on(url) as provider:
        with pytest.raises(SchemaError) as at_start:
            await provider.check_schema()
        with pytest.raises(SchemaError) as at_a_step:
            await provider.get_client("some-client")
    assert str(at_start.value) == str(at_a_step.value)
    return str(at_start.value)


def name_of(url: str) -> str:
    """How messages name a database."""
    return as_url(url).render_as_string(hide_password=True) if is_server(url) else url


async def dumped(url: str) -> dict[str, Any]:
    """Everything that stands in a database."""
    return await asyncio.to_thread(dump, url)


# The states.


async def test_an_empty_database_is_created_at_first_use(empty_database_url: str) -> None:
    """The first step on an empty database creates the schema of this release, by running the migrations."""
    async with provider_on(empty_database_url) as provider:
        assert await provider.get_client("some-client") is None
    found = await dumped(empty_database_url)
    assert found["rows"][VERSION_TABLE] == [(HEAD,)]
    assert set(found["rows"]) == {VERSION_TABLE, *Base.metadata.tables}


def test_the_tables_of_mariadb(empty_database_url: str) -> None:
    """Created by a provider or migrated, they compare text exactly, whatever the server's default."""
    if not empty_database_url.startswith("mysql"):
        pytest.skip("tables have no options on this database")
    options = (
        "SELECT engine, table_collation FROM information_schema.tables"
        f" WHERE table_schema = database() AND table_name <> '{VERSION_TABLE}'"
    )
    start_a_provider(empty_database_url)
    created = select(empty_database_url, options)
    downgrade(empty_database_url, "base")
    upgrade(empty_database_url)
    assert created == select(empty_database_url, options) == [("InnoDB", "utf8mb4_bin")] * len(Base.metadata.tables)


async def test_check_schema_creates_an_empty_database(empty_database_url: str) -> None:
    """To check the schema of an empty database creates it, as the first request would."""
    async with provider_on(empty_database_url) as provider:
        await provider.check_schema()
    assert (await dumped(empty_database_url))["rows"][VERSION_TABLE] == [(HEAD,)]


async def test_a_database_at_head_is_used_as_it_is(database_url: str) -> None:
    """On a database that is at the revision of this release the provider changes nothing at its start."""
    before = await dumped(database_url)
    async with provider_on(database_url) as provider:
        await provider.check_schema()
    assert await dumped(database_url) == before


async def test_a_server_at_work_does_not_mind_an_upgrade(database_url: str) -> None:
    """At head, an upgrade finds nothing to do and needs nobody to stop: a deployment may always run it."""
    client = new_client()
    async with provider_on(database_url) as provider:
        await provider.register_client(client)
        await asyncio.to_thread(upgrade, database_url)
        assert await provider.get_client(client.client_id) is not None
        await provider.register_client(new_client())


async def test_a_database_that_went_down_to_base_is_empty(database_url: str) -> None:
    """An empty version table, which a downgrade to base leaves, is no version: the schema is created anew."""
    await asyncio.to_thread(downgrade, database_url, "base")
    async with provider_on(database_url) as provider:
        await provider.check_schema()
    assert (await dumped(database_url))["rows"][VERSION_TABLE] == [(HEAD,)]


async def test_a_database_behind_is_refused(empty_database_url: str) -> None:
    """At an older revision the provider names it, the one that it needs, and the command; it migrates nothing."""
    await asyncio.to_thread(upgrade, empty_database_url, "0001")
    before = await dumped(empty_database_url)
    said = await refusal(empty_database_url)
    assert said == f"{name_of(empty_database_url)} is at schema 0001, but this release needs {HEAD}; {COMMANDS}"
    assert await dumped(empty_database_url) == before


async def test_a_database_ahead_is_refused(database_url: str) -> None:
    """At a revision of a newer release the provider names it, the one that it knows, and what to install."""
    await asyncio.to_thread(execute, database_url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    before = await dumped(database_url)
    said = await refusal(database_url)
    assert said == (
        f"{name_of(database_url)} is at schema 9999, which this release does not know (it needs {HEAD}); "
        "install the newer release of fastmcp-oauth-store that upgraded the database"
    )
    with pytest.raises(SchemaError) as at_upgrade:
        await asyncio.to_thread(upgrade, database_url)
    assert str(at_upgrade.value) == said
    assert await dumped(database_url) == before


async def test_a_vs2_database_is_refused(empty_database_url: str) -> None:
    """On the tables of VS-2 without a version the provider says so, and what to do; it migrates nothing."""
    await asyncio.to_thread(VS2(RESOURCE).write, empty_database_url)
    if is_server(empty_database_url):
        await asyncio.to_thread(execute, empty_database_url, f"DROP TABLE {VERSION_TABLE}")
    before = await dumped(empty_database_url)
    said = await refusal(empty_database_url)
    assert said == (
        f"{name_of(empty_database_url)} is a VS-2 database, but this release needs schema {HEAD}; "
        f"stop the server that uses it, then {COMMANDS}"
    )
    assert await dumped(empty_database_url) == before
    await asyncio.to_thread(upgrade, empty_database_url)
    async with provider_on(empty_database_url) as provider:
        await provider.check_schema()


FOREIGN = {
    "of an application": ["CREATE TABLE oauth_tokens (id INTEGER PRIMARY KEY, token TEXT, client_id TEXT)"],
    "with a column more than VS-2": [
        "CREATE TABLE oauth_clients (client_id TEXT PRIMARY KEY, client_json TEXT, created_at REAL, owner TEXT)",
    ],
    "beside one of VS-2": [
        "CREATE TABLE oauth_clients (client_id TEXT PRIMARY KEY, client_json TEXT NOT NULL, created_at REAL NOT NULL)",
        "CREATE TABLE oauth_codes (code TEXT PRIMARY KEY, user_id INTEGER)",
    ],
}


@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.not_on_mariadb("MariaDB has no key on TEXT, which these tables want")
async def test_tables_of_our_names_that_are_not_ours_are_refused(
    empty_database_url: str, statements: list[str]
) -> None:
    """Another application's `oauth_tokens` is never taken for VS-2's: neither provider nor upgrade touches it."""
    for statement in statements:
        await asyncio.to_thread(execute, empty_database_url, statement)
    before = await dumped(empty_database_url)
    said = await refusal(empty_database_url)
    name = statements[-1].split()[2]
    assert said.startswith(f"found tables named {name} that do not belong to oauth_store")
    assert f"schema {HEAD}" in said
    assert said.endswith("use another database, or another schema of it")
    with pytest.raises(SchemaError) as at_upgrade:
        await asyncio.to_thread(upgrade, empty_database_url)
    assert str(at_upgrade.value) == said
    assert await dumped(empty_database_url) == before


async def test_an_sqlite_file_that_is_not_ours_keeps_its_journal_mode(tmp_path: Path) -> None:
    """Of a file with another application's tables not even the header is changed by the look at it."""
    path = tmp_path / "app.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE oauth_tokens (id INTEGER PRIMARY KEY)")
    connection.close()
    before = path.read_bytes()
    await refusal(str(path))
    with pytest.raises(SchemaError, match="do not belong to oauth_store"):
        await asyncio.to_thread(upgrade, path)
    assert path.read_bytes() == before


async def test_an_application_beside_ours_does_not_disturb(empty_database_url: str) -> None:
    """In a database with tables and an `alembic_version` of an application, ours are created, found and used."""
    for statement in (
        "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('f00d')",
        "CREATE TABLE users (id INTEGER PRIMARY KEY, token TEXT)",
        "INSERT INTO users VALUES (1, 'ada')",
    ):
        await asyncio.to_thread(execute, empty_database_url, statement)
    before = await dumped(empty_database_url)
    for _ in range(2):
        async with provider_on(empty_database_url) as provider:
            await provider.check_schema()
    after = await dumped(empty_database_url)
    assert after["rows"][VERSION_TABLE] == [(HEAD,)]
    assert {name: rows for name, rows in after["rows"].items() if name in before["rows"]} == before["rows"]


async def test_a_provider_goes_on_once_the_database_was_upgraded(empty_database_url: str) -> None:
    """A provider that refused a database looks again at the next step: nobody has to start the server anew."""
    await asyncio.to_thread(upgrade, empty_database_url)
    await asyncio.to_thread(execute, empty_database_url, f"UPDATE {VERSION_TABLE} SET version_num = '0000'")
    async with provider_on(empty_database_url) as provider:
        with pytest.raises(SchemaError, match="is at schema 0000"):
            await provider.get_client("some-client")
        await asyncio.to_thread(execute, empty_database_url, f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")
        assert await provider.get_client("some-client") is None


async def test_memory_has_the_schema_of_a_file(tmp_path: Path) -> None:
    """`:memory:`, which no migration runs on, has the same tables as a file."""
    in_memory = await definitions_in(":memory:")
    assert {name for name, _ in in_memory} > set(Base.metadata.tables)
    assert in_memory == await definitions_in(str(tmp_path / "oauth.db"))


async def definitions_in(database: str) -> list[tuple[str, list[str]]]:
    """The SQL of everything that a provider creates in SQLite, but for the version."""
    statement = (
        f"SELECT name, coalesce(sql, '') AS sql FROM sqlite_master WHERE tbl_name != '{VERSION_TABLE}' ORDER BY name"
    )
    async with provider_on(database) as provider:
        await provider.check_schema()
        rows = await rows_of(provider, statement)
        # SQLite puts the name of a table that was renamed into quotes.
        return [(row.name, row.sql.replace('"', "").split()) for row in rows]


# Engines that are passed in.


@asynccontextmanager
async def engine_on(url: str | URL, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine of an application, which the application disposes."""
    engine = create_async_engine(url, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def test_an_engine_is_migrated_through_its_own_connection(tmp_path: Path) -> None:
    """An engine whose creator leads elsewhere is created where it leads; the file of its URL is never made."""
    named, meant = tmp_path / "named.db", tmp_path / "meant.db"
    url = f"sqlite+aiosqlite:///{named}"
    async with (
        engine_on(url, async_creator=lambda: aiosqlite.connect(meant)) as engine,
        provider_on(engine) as provider,
    ):
        await provider.register_client(new_client())
    assert (await dumped(str(meant)))["rows"][VERSION_TABLE] == [(HEAD,)]
    assert not named.exists()


async def test_an_engine_without_a_name_that_leads_to_a_file_gets_a_version(tmp_path: Path) -> None:
    """An engine whose URL says memory, and whose creator leads to a file, can be used again after a restart."""
    path = tmp_path / "meant.db"
    for _ in range(2):
        async with (
            engine_on("sqlite+aiosqlite://", async_creator=lambda: aiosqlite.connect(path)) as engine,
            provider_on(engine) as provider,
        ):
            await provider.check_schema()
    assert (await dumped(str(path)))["rows"][VERSION_TABLE] == [(HEAD,)]


async def test_an_engine_is_not_disposed(empty_database_url: str) -> None:
    """An engine that was passed in is the application's: `aclose` leaves its connections open."""
    closed: list[object] = []
    async with engine_on(as_url(empty_database_url)) as engine:
        event.listen(engine.sync_engine, "close", lambda *connection: closed.append(connection))
        pool = engine.pool
        async with provider_on(engine) as provider:
            await provider.register_client(new_client())
        assert engine.pool is pool
        assert closed == []


async def test_a_memory_engine_serves_one_provider_after_another() -> None:
    """The database of a `:memory:` engine that was passed in lives as long as the engine, through many providers."""
    client = new_client()
    async with engine_on("sqlite+aiosqlite://") as engine:
        async with provider_on(engine) as provider:
            await provider.register_client(client)
        async with provider_on(engine) as provider:
            assert await provider.get_client(client.client_id) is not None


async def test_an_engine_keeps_its_settings(tmp_path: Path) -> None:
    """To create the schema on a connection of an application does not change how that connection is set."""
    async with engine_on(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}") as engine:
        before = await settings(engine)
        async with provider_on(engine) as provider:
            await provider.check_schema()
        assert await settings(engine) == before


async def settings(engine: AsyncEngine) -> dict[str, Any]:
    """How the connections of an engine are set."""
    async with engine.connect() as connection:
        return {
            pragma: await connection.scalar(text(f"PRAGMA {pragma}"))
            for pragma in ("foreign_keys", "locking_mode", "journal_mode", "secure_delete", "synchronous")
        }


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
async def test_an_engine_that_begins_by_itself_is_migrated(tmp_path: Path, begin: str) -> None:
    """An engine with the `begin` event of SQLAlchemy's documentation, which sends a BEGIN of its own, works."""
    path = tmp_path / "app.db"
    async with engine_on(f"sqlite+aiosqlite:///{path}", connect_args={"isolation_level": None}) as engine:
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        async with provider_on(engine) as provider:
            await provider.register_client(new_client())
    assert (await dumped(str(path)))["rows"][VERSION_TABLE] == [(HEAD,)]


async def test_a_start_that_is_cancelled_does_not_block_the_next(tmp_path: Path) -> None:
    """A provider that is cancelled while it creates the schema holds up no other, and has created it in the end."""
    async with (
        engine_on(f"sqlite+aiosqlite:///{tmp_path / 'one.db'}") as one,
        engine_on(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}") as other,
        provider_on(one) as creator,
        provider_on(other) as independent,
    ):
        creating, go_on = asyncio.Event(), asyncio.Event()

        def pause(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if statement.strip().startswith("CREATE"):
                creating.set()
                await_only(go_on.wait())

        event.listen(one.sync_engine, "before_cursor_execute", pause)
        start = asyncio.create_task(creator.check_schema())
        await creating.wait()
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            await independent.check_schema()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        go_on.set()
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            await creator.check_schema()


def test_an_application_migrates_meanwhile(tmp_path: Path) -> None:
    """Alembic's context is global to a process: creating our schema leaves an application's own migration alone."""
    config = alembic_config()
    with EnvironmentContext(config, ScriptDirectory.from_config(config)):
        start_a_provider(str(tmp_path / "oauth.db"))
        assert context.config is config


# Many at once.

_start: Barrier


def _join(start: Barrier) -> None:
    global _start
    _start = start


def _at_once(work: Callable[[str], None], url: str) -> None:
    _start.wait(START_TIMEOUT_SECONDS)
    work(url)


def in_processes(count: int, work: Callable[[str], None], urls: list[str]) -> None:
    """Do `work` in `count` processes at the same moment, with one URL after the other."""
    with ProcessPoolExecutor(count, forks(), initializer=_join, initargs=(forks().Barrier(count),)) as pool:
        for url in urls:
            for done in [pool.submit(_at_once, work, url) for _ in range(count)]:
                done.result()


def start_a_provider(url: str) -> None:
    """What a server does at its start."""

    async def start() -> None:
        async with provider_on(url) as provider:
            await provider.check_schema()
            await provider.register_client(new_client())

    asyncio.run(start())


@pytest.fixture(params=["sqlite", "postgresql"])
async def empty_database_urls(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Some databases of each kind that nothing was ever done to."""
    if request.param == "sqlite":
        yield [str(tmp_path / f"{number}.db") for number in range(3)]
        return
    server = request.getfixturevalue("postgres_server")
    urls = [await create_postgres_database(server) for _ in range(3)]
    yield urls
    for url in urls:
        await drop_postgres_database(server, url)


def test_eight_processes_start_on_one_empty_database(empty_database_urls: list[str]) -> None:
    """Any number of servers may start on an empty database at once: one creates the schema, all of them go."""
    in_processes(8, start_a_provider, empty_database_urls)
    for url in empty_database_urls:
        assert select(url, f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]
        assert select(url, "SELECT count(*) FROM oauth_clients") == [(8,)]


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_four_processes_start_with_engines_of_an_application(empty_database_urls: list[str], level: str) -> None:
    """Engines that were passed in create the schema once too, at whatever level their application reads."""
    in_processes(4, partial(start_with_an_engine, level), empty_database_urls)
    for url in empty_database_urls:
        assert select(url, f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]
        assert select(url, "SELECT count(*) FROM oauth_clients") == [(4,)]


def start_with_an_engine(level: str, url: str) -> None:
    """What a server does whose application has an engine."""

    async def start() -> None:
        async with (
            engine_on(as_url(url), isolation_level=level) as engine,
            provider_on(engine) as provider,
        ):
            await provider.check_schema()
            await provider.register_client(new_client())

    asyncio.run(start())


def test_four_processes_upgrade_one_vs2_database(empty_database_urls: list[str]) -> None:
    """Upgrades of one VS-2 database that run at once carry its rows over once, and all of them succeed."""
    for url in empty_database_urls:
        VS2(RESOURCE).write(url)
    in_processes(4, _upgrade, empty_database_urls)
    for url in empty_database_urls:
        assert select(url, f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]
        assert select(url, "SELECT count(*) FROM oauth_tokens") == [(10,)]


def _upgrade(url: str) -> None:
    upgrade(url)


def test_an_upgrade_that_was_killed_can_be_run_again(tmp_path: Path) -> None:
    """After whichever write an upgrade of a VS-2 file is killed, the next ends it: no row lost, no secret left."""
    for writes in range(1, 12):
        path, vs2 = str(tmp_path / f"{writes}.db"), VS2(RESOURCE)
        vs2.write_file(path)
        process = forks().Process(target=_upgrade, args=(path,))
        process.start()
        kill_after(process, path, writes)
        process.join()
        upgrade(path)
        assert select(path, "SELECT count(*) FROM oauth_tokens") == [(10,)]
        content = file_bytes(path)
        assert not any(secret[-20:].encode() in content for secret in vs2.secrets)
        if process.exitcode == 0:
            break


def kill_after(process: BaseProcess, path: str, writes: int) -> None:
    """Kill a process after it has written so often to an SQLite file or its -wal, unless it ends before."""
    seen = states_of(path)
    while writes and process.is_alive():
        now = states_of(path)
        writes, seen = writes - (now != seen), now
    process.kill()


def states_of(path: str) -> list[tuple[int, int] | None]:
    """What a look from outside, which opens nothing, tells of the writes to a file and its -wal."""
    states: list[tuple[int, int] | None] = []
    for name in (path, f"{path}-wal"):
        try:
            status = os.stat(name)
            states.append((status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            states.append(None)
    return states


def test_four_alembic_commands_upgrade_one_database(empty_database_url: str) -> None:
    """`alembic upgrade head` may run in four shells at once."""
    with ThreadPoolExecutor(4) as pool:
        shells = list(pool.map(lambda _: alembic(empty_database_url, "upgrade", "head"), range(4)))
    assert [line for shell in shells for line in shell.stderr.splitlines() if not line.startswith("INFO ")] == []
    assert [shell.returncode for shell in shells] == [0] * 4
    assert select(empty_database_url, f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]


def test_threads_upgrade_two_databases(empty_database_urls: list[str]) -> None:
    """Upgrades of different databases in the threads of one process do not get into each other's way."""
    with ThreadPoolExecutor(len(empty_database_urls)) as pool:
        list(pool.map(_upgrade, empty_database_urls))
    assert len({str(shape(url)) for url in empty_database_urls}) == 1
    for url in empty_database_urls:
        assert select(url, f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]


# Files.


def test_a_provider_creates_its_file_for_its_owner_alone(tmp_path: Path) -> None:
    """The file, its -wal and its -shm are created with mode 0600, whatever the umask of the server."""
    script = (
        "import asyncio, os, sys\n"
        "from oauth_store import AutoApproval, SQLAlchemyOAuthProvider\n"
        "from tests.steps import new_client\n"
        "provider = SQLAlchemyOAuthProvider('oauth.db', base_url='http://127.0.0.1', approval=AutoApproval())\n"
        "async def main():\n"
        "    async with provider:\n"
        "        await provider.register_client(new_client())\n"
        "        print(*(f'{name} {os.stat(name).st_mode & 0o777:o}' for name in sorted(os.listdir())), sep=', ')\n"
        "asyncio.run(main())\n"
    )
    modes = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        umask=0,
    ).stdout
    assert modes == "oauth.db 600, oauth.db-shm 600, oauth.db-wal 600\n"
