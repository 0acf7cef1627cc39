"""`oauth-store`, as an operator types it: one line for an error, an exit code, and the file untouched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run
from tests.conftest import sqlite_rows


def test_help_names_the_commands() -> None:
    """--help tells what there is."""
    answer = run("--help")
    assert answer.returncode == 0
    for command in ("upgrade", "downgrade", "status", "alembic-ini"):
        assert command in answer.stdout


def test_upgrade_and_status(empty_database_url: str) -> None:
    """A database is upgraded to this release's schema, and its status says so; both may be repeated."""
    for _ in range(2):
        answer = run("upgrade", database=empty_database_url)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "The database is at schema 0003.\n", "")
    answer = run("status", "--database", empty_database_url)
    assert answer.returncode == 0
    assert "is at schema 0003, which this release needs" in answer.stdout


def test_status_creates_nothing(tmp_path: Path) -> None:
    """Asking for a database that does not exist yet does not make one."""
    answer = run("status", database=str(tmp_path / "oauth.db"))
    assert answer.returncode == 0
    assert "holds nothing yet" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_status_of_an_old_schema(tmp_path: Path) -> None:
    """A schema that is behind exits with 1, and names the command to run."""
    path = str(tmp_path / "oauth.db")
    assert run("upgrade", "0001", database=path).returncode == 0
    answer = run("status", database=path)
    assert answer.returncode == 1
    assert "is at schema 0001, this release needs 0003" in answer.stderr
    assert "oauth-store upgrade" in answer.stderr


def test_downgrade_asks(tmp_path: Path) -> None:
    """Going down, which loses every token, wants a yes."""
    path = str(tmp_path / "oauth.db")
    run("upgrade", database=path)
    answer = run("downgrade", "0001", database=path, answer="n\n")
    assert answer.returncode == 1
    assert "nothing was changed" in answer.stderr
    assert sqlite_rows(path, "SELECT version_num FROM oauth_store_version") == [("0003",)]
    answer = run("downgrade", "0001", database=path, answer="y\n")
    assert answer.returncode == 0
    assert "loses" in answer.stdout
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
    """An unknown driver, or a server that is away, is one line without the password, and exit code 1."""
    answer = run(command, database=database)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("oauth-store: ")
    assert complaint in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "pa55word" not in answer.stderr


@pytest.mark.parametrize("command", ["upgrade", "status"])
def test_a_file_that_is_no_database_is_untouched(command: str, tmp_path: Path) -> None:
    """A text file is refused in one line, and stays as it was."""
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 200)
    answer = run(command, database=str(path))
    assert answer.returncode == 1
    assert answer.stderr == f"oauth-store: {path} is not an SQLite database; set MCP_OAUTH_DB to another path\n"
    assert path.read_text() == "my notes\n" * 200


@pytest.mark.parametrize("command", ["upgrade", "status"])
def test_a_schema_of_a_newer_release_is_untouched(command: str, tmp_path: Path) -> None:
    """A database that a newer release has upgraded is refused in one line that says which release to install."""
    path = tmp_path / "oauth.db"
    run("upgrade", database=str(path))
    import sqlite3

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
    """The error says what to create; nothing is."""
    answer = run("upgrade", database=str(tmp_path / "missing" / "oauth.db"))
    assert answer.returncode == 1
    assert "cannot create" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_alembic_itself_says_the_same(tmp_path: Path) -> None:
    """`alembic upgrade head` in a checkout takes MCP_OAUTH_DB, and gives the same line for an error."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "MCP_OAUTH_DB": str(tmp_path / "oauth.db")}
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert sqlite_rows(str(tmp_path / "oauth.db"), "SELECT version_num FROM oauth_store_version") == [("0003",)]
    environment["MCP_OAUTH_DB"] = str(tmp_path / "missing" / "oauth.db")
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "create its directory" in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


def test_alembic_ini_is_where_it_says() -> None:
    """The path that is printed is one that alembic takes."""
    assert Path(run("alembic-ini").stdout.strip()).is_file()
