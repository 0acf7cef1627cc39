"""`oauth-store copy`: all of it or nothing, on every pair of databases, with what may be in the way."""

import asyncio
import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from oauth_store.cli.app import main
from oauth_store.database import copy as copying
from oauth_store.database.copy import copy
from oauth_store.database.models import Base, Client, Code, Token
from oauth_store.database.schema import upgrade
from oauth_store.errors import OAuthStoreError
from tests.chaos import Child, flow_until_killed
from tests.commands import environment_for, run
from tests.databases import create_postgres_database, drop_postgres_database, execute, sqlite_rows
from tests.forks import fork
from tests.stores import await_registration, check_whole, dump, fill, registrations, token

TABLES = [table.name for table in Base.metadata.sorted_tables]


def count(url: str) -> dict[str, int]:
    """The number of rows of each table."""
    rows = execute(url, *(f"SELECT count(*) FROM {name}" for name in TABLES))
    return dict(zip(TABLES, (row[0][0] for row in rows), strict=True))


EMPTY = dict.fromkeys(TABLES, 0)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A file with a few rows of each table."""
    path = str(tmp_path / "source.db")
    fill(path)
    return path


def test_there_and_back_nothing_has_changed(empty_database_url: str, tmp_path: Path, source: str) -> None:
    """Every value of every column of every table comes back as it was, from whatever database it went to."""
    fill_more = [insert(Token).values(token(number)) for number in range(100, 100 + 2 * copying.BATCH)]
    execute(source, *fill_more)
    back = str(tmp_path / "back.db")
    there = asyncio.run(copy(source, empty_database_url))
    assert there.rows == {"oauth_clients": 8, "oauth_codes": 2, "oauth_tokens": 10 + 2 * copying.BATCH}
    assert not there.source_changed
    assert asyncio.run(copy(empty_database_url, back)).rows == there.rows
    assert dump(back) == dump(source)


def test_from_each_server_to_another_database_of_its_own(
    empty_database_url: str, request: pytest.FixtureRequest, tmp_path: Path, source: str
) -> None:
    """A server's database is copied to PostgreSQL as well as a file is, and is left as it was."""
    asyncio.run(copy(source, empty_database_url))
    server = request.getfixturevalue("postgres_server")
    target = asyncio.run(create_postgres_database(server))
    try:
        assert asyncio.run(copy(empty_database_url, target)).rows == count(empty_database_url) == count(target)
    finally:
        asyncio.run(drop_postgres_database(server, target))


def test_the_command_tells_what_it_copied(database_url: str, source: str) -> None:
    """The command says how many rows of each table it copied and verified, without a bar in a pipe."""
    answer = run("copy", source, database_url)
    assert answer.returncode == 0
    assert answer.stderr == ""
    assert [line.split() for line in answer.stdout.splitlines()[1:]] == [
        ["8", "oauth_clients"],
        ["2", "oauth_codes"],
        ["10", "oauth_tokens"],
    ]


def test_the_command_prints_json(tmp_path: Path, source: str) -> None:
    """--json prints the same for programs."""
    target = str(tmp_path / "target.db")
    answer = run("copy", source, target, "--json")
    assert answer.returncode == 0
    assert json.loads(answer.stdout) == {
        "source": source,
        "target": target,
        "rows": {"oauth_clients": 8, "oauth_codes": 2, "oauth_tokens": 10},
        "source_changed": False,
    }
    assert os.stat(target).st_mode & 0o777 == 0o600


def test_a_target_behind_a_link_is_the_owners_alone(tmp_path: Path, source: str) -> None:
    """Where the target is a link to a file that does not exist yet, that file has mode 0600."""
    target = tmp_path / "target.db"
    target.symlink_to("elsewhere.db")
    before = os.umask(0)
    try:
        asyncio.run(copy(source, str(target)))
    finally:
        os.umask(before)
    assert (tmp_path / "elsewhere.db").stat().st_mode & 0o777 == 0o600
    assert dump(str(target)) == dump(source)


def test_a_bar_is_drawn_on_a_terminal(tmp_path: Path, source: str) -> None:
    """On a terminal, a bar shows both halves of the work."""
    command = f"{sys.executable} -m oauth_store copy {source} {tmp_path / 'target.db'}"
    answer = subprocess.run(
        ["script", "--quiet", "--return", "--command", command, "/dev/null"],
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        check=True,
    )
    assert "copying" in answer.stdout
    assert "verifying" in answer.stdout
    assert "20/20" in answer.stdout


# What it refuses


def refused(source: str, target: str, complaint: str) -> None:
    """Run the command, and expect one line and exit code 1."""
    answer = run("copy", source, target)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert complaint in answer.stderr
    assert "pa55word" not in answer.stderr


def test_a_target_that_holds_a_row_is_refused(database_url: str, source: str) -> None:
    """A single row in the target, of whatever table, refuses the copy, and stays as it is."""
    execute(database_url, insert(Code).values(code_row()))
    refused(source, database_url, "is not empty: oauth_codes has rows")
    assert count(database_url) == {**EMPTY, "oauth_codes": 1}


def code_row() -> dict[str, Any]:
    """A row of a request."""
    return {
        "handle_hash": b"1" * 32,
        "client_id": "x",
        "grant_id": b"2" * 16,
        "redirect_uri": "",
        "redirect_uri_provided_explicitly": True,
        "code_challenge": "",
        "scopes": "",
        "created_at": 1,
        "expires_at": 1,
    }


def test_a_copy_is_not_repeated_onto_itself(database_url: str, source: str) -> None:
    """The second of two copies finds the rows of the first, and changes nothing."""
    assert run("copy", source, database_url).returncode == 0
    before = count(database_url)
    refused(source, database_url, "delete those of oauth_tokens, oauth_codes, oauth_clients, in this order")
    assert count(database_url) == before
    execute(database_url, *(f"DELETE FROM {name}" for name in ("oauth_tokens", "oauth_codes", "oauth_clients")))
    assert run("copy", source, database_url).returncode == 0


def test_a_source_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    """A source that is not there is refused, and neither of the two files is made."""
    refused(str(tmp_path / "no.db"), str(tmp_path / "target.db"), "no.db does not exist")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_source_is_refused(empty_database_url: str, tmp_path: Path) -> None:
    """A database without our tables is refused: it is most likely the wrong one."""
    if "://" not in empty_database_url:
        Path(empty_database_url).touch()
    refused(empty_database_url, str(tmp_path / "target.db"), "is empty: there is nothing to copy")
    assert not (tmp_path / "target.db").exists()


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_a_source_of_another_schema_is_refused(revision: str, tmp_path: Path) -> None:
    """An older source has to be upgraded first; nothing is made of the target."""
    path = str(tmp_path / "old.db")
    upgrade(path, revision)
    refused(path, str(tmp_path / "target.db"), f"is at schema {revision}, but this release needs")
    assert not (tmp_path / "target.db").exists()


def test_a_target_of_another_schema_is_refused(empty_database_url: str, source: str) -> None:
    """An older target has to be upgraded first."""
    upgrade(empty_database_url, "0002")
    refused(source, empty_database_url, "is at schema 0002, but this release needs")
    assert count(empty_database_url) == EMPTY


def test_a_file_that_is_no_database_is_refused(tmp_path: Path, source: str) -> None:
    """A text file is neither read as a source nor written to as a target."""
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\n" * 200)
    refused(str(notes), str(tmp_path / "target.db"), "is not an SQLite database")
    refused(source, str(notes), "is not an SQLite database")
    assert notes.read_text() == "my notes\n" * 200


def test_databases_in_memory_are_refused(source: str) -> None:
    """Memory is nowhere to copy to."""
    refused(source, ":memory:", "the target is a database in memory")
    refused(":memory:", source, "the source is a database in memory")


def same_path(path: Path) -> str:
    return str(path.parent / "." / path.name)


def symlink(path: Path) -> str:
    (path.parent / "symlink.db").symlink_to(path)
    return str(path.parent / "symlink.db")


def hard_link(path: Path) -> str:
    (path.parent / "hardlink.db").hardlink_to(path)
    return str(path.parent / "hardlink.db")


def as_url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.mark.parametrize("spelling", [same_path, symlink, hard_link, as_url])
def test_one_file_under_two_names_is_refused(spelling: Callable[[Path], str], tmp_path: Path, source: str) -> None:
    """A file is not copied onto itself, however it is called."""
    before = dump(source)
    refused(source, spelling(Path(source)), "are the same database")
    assert dump(source) == before


def test_one_server_database_under_two_urls_is_refused(empty_database_url: str) -> None:
    """A server's database is not copied onto itself, however its URL is spelled; an empty one neither."""
    if "://" not in empty_database_url:
        pytest.skip("a file")
    upgrade(empty_database_url)
    other = empty_database_url.replace("127.0.0.1", "localhost").replace("mysql://", "mariadb://")
    refused(empty_database_url, other, "are the same database")


def test_passwords_are_never_shown(source: str) -> None:
    """A server that is away is one line without the password."""
    refused(source, "postgresql://ada:pa55word@127.0.0.1:1/wiki", "Connect call failed")
    refused("mysql://ada:pa55word@127.0.0.1:1/wiki", source, "cannot be used")
    refused(source, "postgresql://127.0.0.1:1/wiki?user=ada&password=pa55word", "Connect call failed")


# What goes wrong on the way


def test_a_row_that_does_not_fit_leaves_the_target_empty(postgres_server: str, tmp_path: Path, source: str) -> None:
    """A value that the target cannot hold, in the last batch, undoes all that came before; the error quotes no row."""
    statements = [insert(Token).values(token(n)) for n in range(100, 100 + 2 * copying.BATCH)]
    execute(source, *statements, update(Token).where(Token.token_hash == b"\xff" * 32).values(revoked_reason="x" * 65))
    target = asyncio.run(create_postgres_database(postgres_server))
    try:
        refused(source, target, "refused a row of oauth_tokens")
        assert count(target) == EMPTY
        execute(source, update(Token).where(Token.token_hash == b"\xff" * 32).values(revoked_reason="x" * 64))
        assert run("copy", source, target).returncode == 0
    finally:
        asyncio.run(drop_postgres_database(postgres_server, target))


def test_a_token_without_its_client_leaves_the_target_empty(database_url: str, source: str) -> None:
    """What breaks a rule of the schema is one line, without the row."""
    connection = sqlite3.connect(source)
    connection.execute("DELETE FROM oauth_clients WHERE client_id = 'abc'")  # foreign keys are off here
    connection.commit()
    connection.close()
    answer = run("copy", source, database_url)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "Nothing was copied" in answer.stderr or "FOREIGN KEY" in answer.stderr, answer.stderr
    assert "aced" not in answer.stderr
    assert count(database_url) == EMPTY


def test_ids_that_mariadb_takes_for_one_are_refused(empty_database_url: str, source: str) -> None:
    """MariaDB pads: 'abc' and 'abc ' cannot both be there. The others keep them apart."""
    values = {"client_id": "abc ", "client_metadata": "{}", "created_at": 1}
    execute(source, insert(Client).values(values))
    answer = run("copy", source, empty_database_url)
    if empty_database_url.startswith(("mysql", "mariadb")):
        assert answer.returncode == 1
        assert "Duplicate entry" in answer.stderr
        assert count(empty_database_url) == EMPTY
    else:
        assert answer.returncode == 0


_POSTGRESQL_FUNCTION = "CREATE FUNCTION f() RETURNS trigger AS $$ BEGIN {} END $$ LANGUAGE plpgsql"
TRIGGERS = {
    "sqlite": {
        "changed": "CREATE TRIGGER t AFTER INSERT ON oauth_codes BEGIN UPDATE oauth_codes SET state = 'x'; END",
        "missing": "CREATE TRIGGER t BEFORE INSERT ON oauth_codes BEGIN SELECT RAISE(IGNORE); END",
    },
    "postgresql": {
        "changed": _POSTGRESQL_FUNCTION.format("NEW.state = 'x'; RETURN NEW;"),
        "missing": _POSTGRESQL_FUNCTION.format("RETURN NULL;"),
    },
    "mysql": {"changed": "CREATE TRIGGER t BEFORE INSERT ON oauth_codes FOR EACH ROW SET NEW.state = 'x'"},
}


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_what_comes_back_changed_is_not_committed(what: str, database_url: str, source: str) -> None:
    """A database that changes a row, or drops one, is found out before anything is committed."""
    kind = "sqlite" if "://" not in database_url else database_url.partition("://")[0]
    if what not in TRIGGERS[kind]:
        pytest.skip("MariaDB has no trigger that drops a row")
    statements = [TRIGGERS[kind][what]]
    if kind == "postgresql":
        statements.append("CREATE TRIGGER t BEFORE INSERT ON oauth_codes FOR EACH ROW EXECUTE FUNCTION f()")
    execute(database_url, *statements)
    complaint = "state" if what == "changed" else "it is missing"
    with pytest.raises(
        OAuthStoreError, match=rf"a row of oauth_codes differs between .* and the source: {complaint}. Nothing"
    ):
        asyncio.run(copy(source, database_url))
    assert count(database_url) == EMPTY


def test_a_target_that_somebody_writes_to_is_not_committed(database_url: str, source: str) -> None:
    """A registration that comes to the target during the copy stops it, on databases that let it come."""
    if "://" not in database_url:
        pytest.skip("SQLite has one writer: the copy")
    registration = insert(Client).values(client_id="early", client_metadata="{}", created_at=1)
    written: list[Any] = []

    def register(step: str, _rows: int, _total: int) -> None:
        if step == "verifying" and not written:
            with ThreadPoolExecutor() as other:  # which has an event loop of its own
                written.append(other.submit(execute, database_url, registration).result())

    with pytest.raises(OAuthStoreError, match="another process wrote to"):
        asyncio.run(copy(source, database_url, on_progress=register))
    assert count(database_url) == {**EMPTY, "oauth_clients": 1}


_END_OTHER_SESSIONS = {
    "postgresql": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT concat('KILL ', id) FROM information_schema.processlist "
    "WHERE db = database() AND id <> connection_id()",
}


def end_other_sessions(url: str) -> None:
    """End the sessions of all others on a server's database."""
    kind = url.partition("://")[0]
    rows = execute(url, _END_OTHER_SESSIONS[kind])[0]
    if kind == "mysql":
        execute(url, *(row[0] for row in rows))


@pytest.mark.parametrize("step", ["copying", "verifying"])
def test_a_connection_that_is_lost_is_one_line(step: str, database_url: str, source: str) -> None:
    """A database server that goes away in the middle is an error of ours, and the copy can be repeated."""
    if "://" not in database_url:
        pytest.skip("a file does not go away")
    execute(source, *(insert(Token).values(token(number)) for number in range(100, 100 + copying.BATCH)))
    ended: list[Any] = []

    def end(doing: str, _rows: int, _total: int) -> None:
        if doing == step and not ended:
            with ThreadPoolExecutor() as other:  # which has an event loop of its own
                ended.append(other.submit(end_other_sessions, database_url).result())

    with pytest.raises(OAuthStoreError):
        asyncio.run(copy(source, database_url, on_progress=end))
    assert ended
    assert count(database_url) == EMPTY
    assert asyncio.run(copy(source, database_url)).rows == count(database_url)


@pytest.fixture
def large_source(tmp_path: Path) -> str:
    """A file whose copy takes a second or more."""
    path = str(tmp_path / "large.db")
    fill(path)
    connection = sqlite3.connect(path)
    connection.executemany(
        "INSERT INTO oauth_tokens (token_hash, kind, grant_id, client_id, scopes, created_at, expires_at) "
        "VALUES (randomblob(32), 'access_token', randomblob(16), 'abc', '', ?, 2)",
        [(n,) for n in range(LARGE - 10)],
    )
    connection.commit()
    connection.close()
    return path


LARGE = 20_010
"""Tokens of `large_source`."""
_ROWS_UNDER_WAY = {
    "postgresql": "SELECT pg_relation_size('oauth_tokens') / 100",
    "mysql": "SELECT coalesce(max(trx_rows_modified), 0) FROM information_schema.innodb_trx",
}


def is_under_way(target: str) -> bool:
    """Whether a copy is writing rows."""
    if "://" in target:
        return bool(execute(target, _ROWS_UNDER_WAY[target.partition(":")[0]])[0][0][0] > 1000)
    if not Path(target).exists():
        return False
    connection = sqlite3.connect(target, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    finally:
        connection.close()
    return False


def start_copy(source: str, target: str, directory: Path) -> tuple[ForkServerProcess, Path]:
    """Start the command. Return its process, and the file of what it says."""
    said = directory / f"{secrets.token_hex(4)}.log"
    command = ["oauth-store", "copy", source, target]
    return fork(main, command, environment_for(None), [Path(os.devnull), said, said]), said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_copy_that_is_stopped_leaves_the_target_empty(
    how: signal.Signals, database_url: str, large_source: str, tmp_path: Path
) -> None:
    """Ctrl-C, or worse, in the middle leaves no row; the same command then copies everything."""
    process, said = start_copy(large_source, database_url, tmp_path)
    deadline = time.monotonic() + 60
    while not is_under_way(database_url):
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2 if database_url.startswith("mysql") else 0.01)  # InnoDB tells nothing new within 0.1 s
    os.kill(int(process.pid or 0), how)
    process.join(60)
    assert process.exitcode == (130 if how is signal.SIGINT else -how)
    assert said.read_text() == ""
    assert count(database_url) == EMPTY
    answer = run("copy", large_source, database_url)
    assert answer.returncode == 0, answer.stderr
    assert count(database_url)["oauth_tokens"] == LARGE


def test_only_one_of_two_copies_at_once_succeeds(database_url: str, large_source: str, tmp_path: Path) -> None:
    """Two copies into one database: one is complete, and the other says why it did nothing."""
    both = [start_copy(large_source, database_url, tmp_path) for _ in range(2)]
    for process, _ in both:
        process.join(120)
    codes, answers = zip(*((process.exitcode, said.read_text()) for process, said in both), strict=True)
    assert sorted(codes) == [0, 1], answers
    loser = answers[codes.index(1)]
    assert loser.startswith("oauth-store: ")
    assert loser.count("\n") == 1, loser
    assert count(database_url)["oauth_tokens"] == LARGE


# While a server works on the source


def test_a_copy_of_a_busy_database_is_of_one_moment(database_url: str, tmp_path: Path) -> None:
    """What was acknowledged before is there, pairs are whole, the server goes on, and the copy says that it does."""
    journal, target = tmp_path / "journal", str(tmp_path / "copy.db")
    with Child(flow_until_killed, database_url, journal, 3) as server:
        for _ in range(3):
            server.receive()
        time.sleep(1)
        acknowledged = registrations(journal)
        answer = run("copy", database_url, target)
        assert answer.returncode == 0, answer.stderr
        assert "was written to during the copy" in answer.stderr
        await_registration(journal, len(acknowledged))
        assert server.process.is_alive()
    check_whole(target)
    clients = {row[0] for row in sqlite_rows(target, "SELECT client_id FROM oauth_clients")}
    assert acknowledged <= clients
