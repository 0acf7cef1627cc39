"""What each session on a database sets, whatever the server's own settings are."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from oauth_store.database.models import clients, tokens
from oauth_store.database.schema import upgrade
from tests.crowds import NAME, check_crowd
from tests.databases import administer_mariadb, postgres_directory
from tests.mariadb import default, mariadb_server
from tests.steps import provider_on, registered
from tests.stores import token

_METADATA = "SELECT client_metadata FROM oauth_clients"


@pytest.fixture(scope="module")
def own_mariadb() -> Iterator[str]:
    """A server that takes what clients send for latin1 unless they set another character set."""
    options = ("--character-set-server=latin1", "--skip-character-set-client-handshake")
    with postgres_directory() as directory, mariadb_server(directory, *options) as url:
        yield url


@pytest.fixture
def own_database(own_mariadb: str) -> Iterator[str]:
    """An empty database of that server."""
    asyncio.run(administer_mariadb(own_mariadb, "CREATE DATABASE own"))
    yield own_mariadb.replace("/test", "/own")
    asyncio.run(administer_mariadb(own_mariadb, "DROP DATABASE own"))


DEFAULTS = [
    ("sql_mode", "''"),
    ("sql_mode", "'NO_BACKSLASH_ESCAPES'"),
    ("sql_mode", "'ORACLE,EMPTY_STRING_IS_NULL,PAD_CHAR_TO_FULL_LENGTH'"),
    ("sql_mode", "'MSSQL,HIGH_NOT_PRECEDENCE'"),
    ("sql_select_limit", "1"),
    ("foreign_key_checks", "0"),
]


@pytest.mark.parametrize(("variable", "value"), DEFAULTS)
def test_defaults_of_a_mariadb_server_change_nothing(own_database: str, variable: str, value: str) -> None:
    """With each default of the server the migration runs, flows succeed, and bad values are refused."""

    async def run() -> None:
        async with provider_on(own_database) as provider:
            await check_crowd(provider)
            too_long = {"client_id": "x", "client_metadata": "{}", "created_at": 1, "client_secret_hash": b"'" * 33}
            with pytest.raises(DataError, match="client_secret_hash"):
                await provider._store.write(Session.execute, insert(clients), too_long)
            with pytest.raises(IntegrityError, match="FOREIGN KEY"):
                await provider._store.write(Session.execute, insert(tokens), token(client_id="nobody"))

    with default(own_database, variable, value):
        upgrade(own_database)
        asyncio.run(run())


@pytest.mark.parametrize("option", ["?charset=latin1", "?charset=utf8"])
def test_text_is_stored_as_utf8(own_database: str, option: str) -> None:
    """The database stores a name with an emoji as it is, also where the URL names a smaller character set."""

    async def run() -> None:
        async with provider_on(own_database + option) as provider:
            await registered(provider, client_name=NAME)

    asyncio.run(run())
    ((found,),) = asyncio.run(administer_mariadb(own_database, "SET NAMES utf8mb4", _METADATA))
    assert json.loads(found)["client_name"] == NAME
