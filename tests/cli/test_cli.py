"""`oauth-store` on the command line: one-line errors, exit codes, and an untouched file."""

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.cli.app import app
from oauth_store.display import iso
from tests.clocks import turned
from tests.commands import alembic, run, run_json
from tests.databases import sqlite_rows
from tests.steps import Provider, new_client, refresh, sign_in
from tests.workers import settle


def test_help_names_the_commands() -> None:
    """--help lists the commands."""
    answer = run("--help")
    assert answer.returncode == 0
    for command in ("upgrade", "downgrade", "status", "alembic-ini"):
        assert command in answer.stdout


def test_upgrade_and_status(empty_database_url: str) -> None:
    """`upgrade` migrates a database to this release's schema, and `status` shows it; both may be repeated."""
    for _ in range(2):
        answer = run("upgrade", database=empty_database_url)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "The database is at schema 0003.\n", "")
    answer = run("status", "--database", empty_database_url)
    assert answer.returncode == 0
    assert "is at schema 0003, which this release needs" in answer.stdout


def test_status_creates_nothing(tmp_path: Path) -> None:
    """`status` of a database that does not exist does not create it."""
    answer = run("status", database=str(tmp_path / "oauth.db"))
    assert answer.returncode == 0
    assert "oauth.db does not exist yet. The server creates it at first use" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_status_of_an_old_schema(tmp_path: Path) -> None:
    """For an old schema, `status` exits with 1 and names the command to run."""
    path = str(tmp_path / "oauth.db")
    assert run("upgrade", "0001", database=path).returncode == 0
    answer = run("status", database=path)
    assert answer.returncode == 1
    assert "is at schema 0001, but this release needs 0003" in answer.stderr
    assert "oauth-store upgrade" in answer.stderr


@pytest.mark.parametrize("command", ["upgrade", "downgrade"])
def test_a_revision_that_does_not_exist(command: str, tmp_path: Path) -> None:
    """It is a one-line error that names the revisions, and changes nothing."""
    path = str(tmp_path / "oauth.db")
    run("upgrade", database=path)
    answer = run(command, "9999", database=path, answer="y\n")
    assert answer.returncode == 1
    assert "oauth-store: there is no schema 9999; expected a revision from 0001 to 0003, and" in answer.stderr
    assert sqlite_rows(path, "SELECT version_num FROM oauth_store_version") == [("0003",)]


def test_downgrade_asks(tmp_path: Path) -> None:
    """`downgrade`, which deletes all tokens, asks for confirmation."""
    path = str(tmp_path / "oauth.db")
    run("upgrade", database=path)
    answer = run("downgrade", "0001", database=path, answer="n\n")
    assert answer.returncode == 1
    assert "nothing was changed" in answer.stderr
    assert "Migrate the database down to 0001? Below 0002, this deletes all tokens." in answer.stdout + answer.stderr
    assert sqlite_rows(path, "SELECT version_num FROM oauth_store_version") == [("0003",)]
    answer = run("downgrade", "0001", database=path, answer="y\n")
    assert answer.returncode == 0
    assert "deletes" in answer.stdout
    assert sqlite_rows(path, "SELECT version_num FROM oauth_store_version") == [("0001",)]
    assert run("downgrade", "base", "--yes", database=path).returncode == 0


@pytest.mark.parametrize("command", ["upgrade", "status"])
@pytest.mark.parametrize(
    ("database", "complaint"),
    [
        ("mongodb://db/wiki", "no support for 'mongodb' databases"),
        ("postgresql+psycopg2://db/wiki", "no support for the driver 'psycopg2'"),
        ("postgresql://ada:pa55word@127.0.0.1:1/wiki", "Connect call failed"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(command: str, database: str, complaint: str) -> None:
    """An unknown driver or a server that is down is a one-line error without the password, and exit code 1."""
    answer = run(command, database=database)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("oauth-store: ")
    assert complaint in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "pa55word" not in answer.stderr


@pytest.mark.parametrize("command", ["upgrade", "status"])
def test_a_file_that_is_no_database_is_untouched(command: str, tmp_path: Path) -> None:
    """A text file is refused in one line, and not changed."""
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 200)
    answer = run(command, database=str(path))
    assert answer.returncode == 1
    assert answer.stderr == f"oauth-store: {path} is not an SQLite database; set MCP_OAUTH_DB to another path\n"
    assert path.read_text() == "my notes\n" * 200


@pytest.mark.parametrize("command", ["upgrade", "status"])
def test_a_schema_of_a_newer_release_is_untouched(command: str, tmp_path: Path) -> None:
    """A database from a newer release is refused in one line that names the release to install."""
    path = tmp_path / "oauth.db"
    run("upgrade", database=str(path))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE oauth_store_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    answer = run(command, database=str(path))
    assert answer.returncode == 1
    assert "is at schema 9999, which this release does not know (it needs 0003)" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert path.read_bytes() == before


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    """The error names the directory to create, and nothing is created."""
    answer = run("upgrade", database=str(tmp_path / "missing" / "oauth.db"))
    assert answer.returncode == 1
    assert "cannot create" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_alembic_itself_says_the_same(tmp_path: Path) -> None:
    """`alembic upgrade head` in a checkout uses MCP_OAUTH_DB, and prints the same error."""
    ran = alembic(str(tmp_path / "oauth.db"), "upgrade", "head")
    assert ran.returncode == 0
    assert sqlite_rows(str(tmp_path / "oauth.db"), "SELECT version_num FROM oauth_store_version") == [("0003",)]
    ran = alembic(str(tmp_path / "missing" / "oauth.db"), "upgrade", "head")
    assert ran.returncode != 0
    assert "create its directory" in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


def test_alembic_ini_is_where_it_says() -> None:
    """Alembic accepts the printed path."""
    assert Path(run("alembic-ini").stdout.strip()).is_file()


READING = [["grants"], ["clients"], ["purge", "--dry-run"], ["purge"], ["explain"], ["revoke", "--all", "--yes"]]
READING += [["clients", "remove", "x", "--yes"], ["clients", "add", "x", "--redirect-uri", "https://x.example/"]]


def refused(command: list[str], database: str, complaint: str) -> None:
    """One line on standard error, nothing on standard output, and exit code 1; with --json too."""
    for options in ([], ["--json"]):
        ran = run(*command, *options, database=database, answer="access_x")
        assert (ran.returncode, ran.stdout) == (1, ""), command
        assert complaint in ran.stderr, command
        assert ran.stderr.count("\n") == 1, command


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_what_is_no_database_of_ours(command: list[str], tmp_path: Path) -> None:
    """A database that is missing, empty, foreign, a directory or in memory is a one-line error; nothing is created."""
    refused(command, str(tmp_path / "missing.db"), "missing.db does not exist; name the server's database with")
    refused(command, str(tmp_path), "is a directory; name the server's database with")
    refused(command, "/dev/null", "/dev/null is a device; name the server's database with")
    refused(command, ":memory:", "an in-memory database exists only inside its server")
    assert list(tmp_path.iterdir()) == []
    for name, content, complaint in (
        ("empty.db", b"", "is empty; name the server's database with"),
        ("notes.txt", b"my notes\n" * 200, "is not an SQLite database"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refused(command, str(path), complaint)
        assert path.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"empty.db", "notes.txt"}


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_another_schema(command: list[str], empty_database_url: str) -> None:
    """On an older schema, and on that of a newer release, each command reports it and does nothing."""
    run("upgrade", "0002", database=empty_database_url)
    refused(command, empty_database_url, "is at schema 0002, but this release needs 0003; run")
    run("downgrade", "base", "--yes", database=empty_database_url)


def test_a_database_server_that_is_not_there() -> None:
    """The error says what to check, in one line and without the password."""
    ran = run("grants", database="postgresql://ada:secret@127.0.0.1:1/wiki")
    assert ran.returncode == 1
    assert "cannot be used: " in ran.stderr
    assert "; check that the database server runs, and the host and the port in the URL\n" in ran.stderr
    assert "secret" not in ran.stderr


NOBODY = 65534


def run_as_nobody(*arguments: str, database: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that has dropped root privileges."""
    return run(*arguments, database=database, answer="access_x", user=NOBODY, LOGNAME="nobody")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read here")
def test_without_rights() -> None:
    """For a file that this user may not read or write, the error says what to do, in one line."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "oauth.db"
        run("upgrade", database=str(path))
        hint = "run this as the server's user"
        for command in [["status"], *READING]:
            ran = run_as_nobody(*command, database=str(path))
            assert (ran.returncode, ran.stdout) == (1, "")
            assert ran.stderr == f"oauth-store: {path} is not readable by nobody; {hint}\n"
        path.chmod(0o644)
        ran = run_as_nobody("clients", "add", "x", "--redirect-uri", "https://x.example/", database=str(path))
        assert (ran.returncode, ran.stdout) == (1, "")
        assert re.fullmatch(rf"oauth-store: {path} cannot be used: [^\n]+\n", ran.stderr)
        Path(directory).chmod(0o700)
        ran = run_as_nobody("grants", database=str(path))
        assert ran.returncode == 1
        assert ran.stderr == f"oauth-store: {path} cannot be accessed: Permission denied; {hint}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave files behind that others may not write")
def test_root_leaves_nothing_behind() -> None:
    """Commands that root runs on another user's database leave no file that this user's server cannot write."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "oauth.db"
        run("upgrade", database=str(path))
        os.chown(path, NOBODY, NOBODY)
        os.chown(directory, NOBODY, NOBODY)
        holder = sqlite3.connect(path)  # keeps the -wal and the -shm that the first command makes
        for command in (["grants"], ["clients", "add", "x", "--redirect-uri", "https://x.example/"], ["purge"]):
            assert run(*command, database=str(path)).returncode == 0
            assert {file.stat().st_uid for file in Path(directory).iterdir()} == {NOBODY}
            holder.execute("SELECT * FROM oauth_clients").fetchall()
        holder.close()
        ran = run_as_nobody("clients", "add", "y", "--redirect-uri", "https://x.example/", database=str(path))
        assert (ran.returncode, ran.stderr) == (0, "")


async def test_status_counts(provider: SQLAlchemyOAuthProvider, make_provider: Provider, database_url: str) -> None:
    """`status` counts live, expired and idle rows of the three tables, with the size and the age of the grants."""
    await provider.check_schema()
    told = run_json("status", database=database_url)
    assert told["live_grants"] == 0
    assert told["oldest_grant_at"] is None
    client, before = new_client(), make_provider()  # of its own: it would purge what it finds later
    with turned(-2 * 24 * 3600):  # its codes and access tokens have expired
        await before.register_client(client)
        first = await sign_in(before, client)
        await sign_in(before, client)
    with turned(-40 * 24 * 3600):
        await before.register_client(new_client())
        await settle(before)
    await refresh(provider, client, first)
    await provider.register_client(new_client())
    told = run_json("status", database=database_url)
    assert (told["schema_found"], told["schema_needed"], told["problem"]) == ("0003", "0003", None)
    assert told["size_bytes"] > 10_000
    assert told["live_grants"] == 2
    assert told["oldest_grant_at"] <= told["newest_grant_at"] < iso(int(time.time()) - 24 * 3600)
    assert told["tables"] == {
        "oauth_clients": {"rows": 3, "live": 1, "expired": 1, "idle": 1},
        "oauth_codes": {"rows": 2, "live": 0, "expired": 2, "idle": 0},
        "oauth_tokens": {"rows": 6, "live": 3, "expired": 2, "idle": 1},
    }
    output = run("status", database=database_url).stdout
    assert "and has 2 live grants (oldest: 2 d ago, newest: 2 d ago)." in output
    assert re.search(r"oauth_tokens +6 +3 +2 +1\n", output)


def test_status_in_json(tmp_path: Path) -> None:
    """A missing database is not a problem; an old schema or a file that is no database is one, with exit code 1."""
    path = str(tmp_path / "oauth.db")
    told = {"database": path, "schema_found": None, "schema_needed": "0003", "problem": None}
    assert run_json("status", database=path) == told
    run("upgrade", "0001", database=path)
    found = run_json("status", database=path, code=1)
    assert found["schema_found"] == "0001"
    assert "run `alembic upgrade head`" in found["problem"]
    Path(path).write_text("notes " * 1000)
    assert "is not an SQLite database" in run_json("status", database=path, code=1)["problem"]


async def test_purge(
    provider: SQLAlchemyOAuthProvider, make_provider: Provider, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--dry-run counts what the purge then deletes, in as many batches as needed; usable rows are kept."""
    client, before = new_client(), make_provider()  # of its own: it would purge what it finds later
    with turned(-40 * 24 * 3600):
        await before.register_client(client)
        await before.register_client(new_client())
        for _ in range(3):
            await sign_in(before, client)
    live = await sign_in(provider, client)
    expected = {"tokens": 6, "codes": 3, "clients": 1}
    assert run_json("purge", "--dry-run", database=database_url) == {**expected, "dry_run": True}
    assert run("purge", "--dry-run", database=database_url).stdout == "Would delete: 6 tokens, 3 codes, 1 client.\n"
    monkeypatch.setattr("oauth_store.cli.app.PURGE_BATCH", 2)
    told = await asyncio.to_thread(app, ["purge", "--database", database_url], result_action="return_value")
    assert told is None
    assert run_json("purge", database=database_url) == {"tokens": 0, "codes": 0, "clients": 0, "dry_run": False}
    assert await provider.verify_token(live.access_token) is not None


async def test_a_purge_is_an_event(provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
    """--verbose logs the purge as a server does; a purge that finds nothing logs nothing."""
    with turned(-40 * 24 * 3600):
        await provider.register_client(new_client())
    ran = run("purge", "-v", database=database_url)
    assert ran.stderr == "INFO: purged: tokens=0 codes=0 clients=1\n"
    assert run("purge", "-v", database=database_url).stderr == ""


def test_schema_commands_in_json(tmp_path: Path) -> None:
    """upgrade, downgrade and alembic-ini print one document; output of migrations goes to standard error."""
    path = str(tmp_path / "oauth.db")
    assert run_json("upgrade", database=path) == {"database": path, "schema_found": "0003"}
    ran = run("downgrade", "0001", "--yes", "--json", database=path)
    assert json.loads(ran.stdout) == {"database": path, "schema_found": "0001"}
    assert "deletes" in ran.stderr
    assert "CREATE TABLE" in run_json("upgrade", "--sql", database=path)["sql"]
    assert Path(run_json("alembic-ini", database=path)["alembic_ini"]).is_file()
