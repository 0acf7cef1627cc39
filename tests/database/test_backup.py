"""`oauth-store backup`: one moment of a file that a server writes to, and never at the cost of another file."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oauth_store import OAuthStoreError
from oauth_store.database.backup import backup
from oauth_store.database.schema import upgrade
from tests.chaos import Child, flow_until_killed, new_provider
from tests.commands import run
from tests.databases import sqlite_rows
from tests.steps import new_client, sign_in
from tests.stores import await_registration, check_whole, dump, fill, registrations


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A file with a few rows of each table."""
    path = str(tmp_path / "oauth.db")
    fill(path)
    return path


def test_a_backup_is_one_private_file_with_everything(tmp_path: Path, source: str) -> None:
    """The backup has every value of every table, mode 0600, and neither -wal nor -shm."""
    file = tmp_path / "backup.db"
    answer = run("backup", str(file), database=source)
    assert answer.returncode == 0
    assert answer.stdout == f"Backed up {source} at schema 0003 to {file}, and verified it (0.1 MiB).\n"
    assert answer.stderr == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.db", "oauth.db"]
    assert dump(str(file)) == dump(source)
    assert sqlite_rows(str(file), "PRAGMA journal_mode") == [("delete",)]


def test_json(tmp_path: Path, source: str) -> None:
    """--json tells the same to programs."""
    file = tmp_path / "backup.db"
    answer = run("backup", str(file), "--json", "--database", source)
    assert json.loads(answer.stdout) == {
        "source": source,
        "file": str(file),
        "revision": "0003",
        "size": file.stat().st_size,
    }


def test_backups_of_a_busy_file_are_of_one_moment_each(tmp_path: Path) -> None:
    """While a process writes, each backup opens, has all that was acknowledged before it, and only whole pairs."""
    source, journal = str(tmp_path / "oauth.db"), tmp_path / "journal"
    upgrade(source)
    with Child(flow_until_killed, source, journal, 3) as server:
        for _ in range(3):
            server.receive()
        for number in range(3):
            acknowledged = registrations(journal)
            file = str(tmp_path / f"backup-{number}.db")
            answer = run("backup", file, database=source)
            assert answer.returncode == 0, answer.stderr
            clients = {row[0] for row in sqlite_rows(file, "SELECT client_id FROM oauth_clients")}
            assert acknowledged <= clients
            check_whole(file)
        last = len(registrations(journal))
        await_registration(journal, last)
        assert server.process.is_alive()


async def test_a_restored_backup_lets_clients_in(tmp_path: Path) -> None:
    """A server that finds a backup in the place of its file knows the tokens of then, and refuses those of later."""
    source, file = tmp_path / "oauth.db", tmp_path / "backup.db"
    client = new_client()
    async with new_provider(str(source)) as provider:
        await provider.register_client(client)
        before = await sign_in(provider, client)
        assert run("backup", str(file), database=str(source)).returncode == 0
        after = await sign_in(provider, client)
    for path in (source, Path(f"{source}-wal"), Path(f"{source}-shm")):
        path.unlink(missing_ok=True)
    file.rename(source)
    async with new_provider(str(source)) as provider:
        assert await provider.verify_token(before.access_token) is not None
        assert await provider.verify_token(after.access_token) is None
        assert await sign_in(provider, client)


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_an_old_schema_is_backed_up_as_it_is(revision: str, tmp_path: Path) -> None:
    """Before an upgrade is when one wants a backup."""
    source, file = str(tmp_path / "oauth.db"), str(tmp_path / "backup.db")
    upgrade(source, revision)
    answer = run("backup", file, database=source)
    assert answer.returncode == 0
    assert f"at schema {revision}" in answer.stdout
    assert dump(file) == dump(source)


# What it refuses


def refused(database: str, file: Path, complaint: str) -> None:
    """Run the command, and expect one line and exit code 1."""
    answer = run("backup", str(file), database=database)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert complaint in answer.stderr


def test_nothing_is_ever_overwritten(tmp_path: Path, source: str) -> None:
    """A file that exists, a directory, a dangling link and the database itself are refused, and stay as they are."""
    precious, dangling = tmp_path / "precious", tmp_path / "dangling"
    precious.write_text("")
    dangling.symlink_to(tmp_path / "elsewhere")
    before = dump(source)
    for file in (precious, tmp_path, dangling, Path(source)):
        refused(source, file, "already exists, and backup never overwrites")
    assert precious.read_text() == ""
    assert not (tmp_path / "elsewhere").exists()
    assert dump(source) == before


@pytest.mark.parametrize(
    ("database", "complaint"),
    [
        ("postgresql://ada:pa55word@127.0.0.1/wiki", "pg_dump"),
        ("mysql://ada:pa55word@127.0.0.1/wiki", "mysqldump --single-transaction"),
        (":memory:", "in memory"),
    ],
)
def test_what_is_no_file_is_refused(database: str, complaint: str, tmp_path: Path) -> None:
    """A server's database is for its own tools, and memory for none."""
    refused(database, tmp_path / "backup.db", complaint)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """A database that is not there, is empty, or is no database leaves no backup, and is not created."""
    (tmp_path / "notes.txt").write_text("my notes\n" * 200)
    (tmp_path / "empty.db").touch()
    refused(str(tmp_path / "no.db"), tmp_path / "backup.db", "no.db does not exist")
    refused(str(tmp_path / "empty.db"), tmp_path / "backup.db", "nothing to back up")
    refused(str(tmp_path / "notes.txt"), tmp_path / "backup.db", "is not an SQLite database")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.db", "notes.txt"]


def test_no_place_for_the_backup(tmp_path: Path, source: str) -> None:
    """A directory that does not exist is one line."""
    refused(source, tmp_path / "no" / "backup.db", "No such file or directory")


# What goes wrong on the way


def test_a_damaged_file_leaves_no_backup(tmp_path: Path, source: str) -> None:
    """A page that is not what it should be is found in the copy, which then goes away."""
    with sqlite3.connect(source) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_oauth_tokens_grant_id'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with Path(source).open("r+b") as file:
        file.seek((page - 1) * size + size // 2)
        file.write(b"\xff" * (size // 2))
    with pytest.raises(OAuthStoreError, match="damaged"):
        backup(source, tmp_path / "backup.db")
    assert [path.name for path in tmp_path.iterdir()] == ["oauth.db"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_no_backup(tmp_path: Path, source: str) -> None:
    """Where there is no room, one line says so, and nothing is left behind."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        refused(source, disk / "backup.db", "database or disk is full")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_backup_that_is_stopped_leaves_nothing(tmp_path: Path, source: str) -> None:
    """Ctrl-C takes the half of a backup away."""
    connection = sqlite3.connect(source)
    connection.execute("CREATE TABLE ballast AS SELECT zeroblob(300000000) AS b")
    connection.commit()
    connection.close()
    file = tmp_path / "backup.db"
    process = subprocess.Popen(
        [sys.executable, "-m", "oauth_store", "backup", str(file), "--database", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 2**22):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(2)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["oauth.db"]
