"""Engines that were passed in: each keeps steps apart, or is refused when the provider is built."""

import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from oauth_store import ConfigurationError
from oauth_store.database.url import database_url as as_url
from tests.chaos import Child, use_in_several_loops
from tests.crowds import check_crowd
from tests.databases import is_server
from tests.steps import provider_on

ENGINES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "autocommit": {"isolation_level": "AUTOCOMMIT"},
    "serializable": {"isolation_level": "SERIALIZABLE"},
    "repeatable read": {"isolation_level": "REPEATABLE READ"},
    "one connection": {"pool_size": 1, "max_overflow": 0},
    "no pool": {"poolclass": NullPool},
    "ping": {"pool_pre_ping": True, "poolclass": AsyncAdaptedQueuePool},
}


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
async def test_an_engine_keeps_steps_apart(database_url: str, settings: dict[str, Any]) -> None:
    """24 flows at once succeed, 24 refreshes at once get one pair, and a step that fails leaves nothing."""
    if settings.get("isolation_level") == "REPEATABLE READ" and "://" not in database_url:
        pytest.skip("SQLite has no such level")
    engine = create_async_engine(as_url(database_url), **settings)
    await check_crowd(provider_on(engine))
    await engine.dispose()


async def test_options_of_an_engine_are_not_those_of_a_step(database_url: str) -> None:
    """An engine whose options ask for autocommit does not split a step."""
    engine = create_async_engine(as_url(database_url)).execution_options(isolation_level="AUTOCOMMIT")
    await check_crowd(provider_on(engine))
    await engine.dispose()


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
async def test_an_engine_of_psycopg(database_url: str, settings: dict[str, Any]) -> None:
    """The same with psycopg, which many applications have already."""
    if not database_url.startswith("postgresql"):
        pytest.skip("psycopg is a driver of PostgreSQL")
    engine = create_async_engine(make_url(database_url).set(drivername="postgresql+psycopg"), **settings)
    await check_crowd(provider_on(engine))
    await engine.dispose()


def test_an_engine_in_a_second_event_loop(database_url: str) -> None:
    """Connections of a loop that has ended are refused in one line, and the engine serves once it is disposed."""
    with Child(use_in_several_loops, as_url(database_url)) as child:
        refusal, served = child.receive(60)
    if is_server(database_url):
        assert re.fullmatch(r".* another event loop; await engine\.dispose\(\) .*", refusal)
    else:
        assert refusal is None
    assert served == 2


HOSTILE = {
    "SET sql_mode = ''": "no STRICT_TRANS_TABLES in sql_mode",
    "SET sql_mode = 'STRICT_ALL_TABLES,NO_BACKSLASH_ESCAPES'": "NO_BACKSLASH_ESCAPES in sql_mode",
    "SET NAMES latin1": "character_set_client = latin1, .*character_set_results = latin1",
    "SET character_set_results = utf8mb3": "character_set_results = utf8mb3",
    "SET foreign_key_checks = 0": "foreign_key_checks = 0",
    "SET sql_select_limit = 1": "sql_select_limit = 1",
}


@pytest.mark.parametrize("statement", HOSTILE)
async def test_sessions_that_change_what_a_statement_means_are_refused(database_url: str, statement: str) -> None:
    """One line names each setting that an engine's sessions must not have, before anything is written."""
    if not database_url.startswith("mysql"):
        pytest.skip("only MariaDB has such settings")
    engine = create_async_engine(as_url(database_url))

    @event.listens_for(engine.sync_engine, "connect")
    def change(connection: Any, _record: object) -> None:
        connection.cursor().execute(statement)

    provider = provider_on(engine)
    with pytest.raises(ConfigurationError, match=f"have {HOSTILE[statement]}, so .*pass the URL") as caught:
        await provider.check_schema()
    assert "\n" not in str(caught.value)
    await engine.dispose()


async def test_sessions_that_commit_each_statement_are_refused(database_url: str) -> None:
    """A listener that sets autocommit behind SQLAlchemy's back would split a step."""
    if not database_url.startswith("mysql"):
        pytest.skip("only MariaDB has such a setting")
    engine = create_async_engine(as_url(database_url))

    @event.listens_for(engine.sync_engine, "begin")
    def commit_each(connection: Connection) -> None:
        connection.exec_driver_sql("SET autocommit = 1")

    with pytest.raises(ConfigurationError, match="have autocommit = 1, so"):
        await provider_on(engine).check_schema()
    await engine.dispose()


async def test_a_begin_of_an_engine_takes_no_part(tmp_path: Path) -> None:
    """Where an engine for a file sends a BEGIN of its own, as SQLAlchemy shows, each step has its lock."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/oauth.db")
    event.listen(engine.sync_engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    await check_crowd(provider_on(engine))
    await engine.dispose()


async def test_an_engine_in_memory_keeps_steps_apart() -> None:
    """The one connection of an in-memory engine takes one step after the other."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    await check_crowd(provider_on(engine))
    await engine.dispose()


def test_an_engine_that_cannot_is_refused(tmp_path: object) -> None:
    """One line says what the engine is, why it cannot be used, and what to pass instead."""
    file = f"sqlite+aiosqlite:///{tmp_path}/oauth.db"
    for engine, reason in (
        (create_async_engine(file, poolclass=StaticPool), "StaticPool, .* leave out poolclass"),
        (create_async_engine("sqlite+aiosqlite://", poolclass=NullPool), "NullPool, .* another database"),
        (sqlalchemy.create_engine("sqlite://"), r"Engine; expected a path, a URL as text, or an AsyncEngine"),
        (as_url(file), r"URL; expected a path, a URL as text, or an AsyncEngine"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            provider_on(engine)  # type: ignore[arg-type]  # as without types
