"""`oauth-store doctor` on real databases, healthy and misconfigured."""

import json
import os
import re
import sqlite3
import time
from pathlib import Path

import pytest
from argon2 import PasswordHasher, Type
from sqlalchemy import insert

from oauth_store.database.files import find_mount
from oauth_store.database.models import Token
from oauth_store.database.schema import upgrade
from oauth_store.doctor.examine import examine, examine_password_hash
from oauth_store.doctor.files import file_system
from oauth_store.doctor.finding import clock
from oauth_store.pages.passwords import hash_password
from tests.commands import run
from tests.databases import execute
from tests.doctors import bad, finding, mounted, on_postgresql, role
from tests.stores import token

DOCS = Path(__file__).parent.parent.parent / "docs" / "doctor.md"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners and mounting need root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A healthy file in its own directory."""
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    upgrade(str(directory / "oauth.db"))
    return directory / "oauth.db"


def write(path: Path, *statements: str) -> None:
    """Change a file without our settings."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


# Healthy


def test_a_healthy_database_has_no_finding(database_url: str) -> None:
    """A database as `upgrade` creates it has no problems and no warnings."""
    assert bad(database_url) == {}


def test_the_command(path: Path) -> None:
    """Each finding is a line, with the fix below it; the exit code is 1 if any is a problem."""
    answer = run("doctor", database=str(path))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "ok       schema: 0003, which this release needs\n" in answer.stdout
    path.chmod(0o666)
    answer = run("doctor", "--database", str(path))
    assert answer.returncode == 1
    assert f"problem  file modes: other users may write: oauth.db 0666\n         -> run: chmod 600 {path}\n" in (
        answer.stdout
    )


def test_json(path: Path) -> None:
    """--json has the same findings, and the same exit code."""
    path.chmod(0o666)
    answer = run("doctor", "--json", database=str(path))
    assert answer.returncode == 1
    told = json.loads(answer.stdout)
    assert told["ok"] is False
    (problem,) = [finding for finding in told["findings"] if finding["level"] == "problem"]
    assert problem == {
        "check": "file modes",
        "level": "problem",
        "found": "other users may write: oauth.db 0666",
        "advice": f"run: chmod 600 {path}",
    }


def test_nothing_is_created(tmp_path: Path) -> None:
    """A missing file is a warning, and is not created."""
    assert "does not exist yet" in finding(tmp_path / "no.db", "database", "warning")
    assert list(tmp_path.iterdir()) == []


def test_only_a_file_is_looked_at(tmp_path: Path) -> None:
    """A directory, a device or a missing directory is one finding, and no advice concerns its mode."""
    for path, found in (
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "no" / "oauth.db", f"neither does its directory {tmp_path / 'no'}"),
    ):
        assert found in finding(path, "database", "problem")
        assert "chmod" not in run("doctor", database=str(path)).stdout


def test_a_setting_that_is_none_is_one_line(tmp_path: Path) -> None:
    """An unsupported database is an error of the command, as for every other command."""
    answer = run("doctor", database="mongodb://db/wiki")
    assert answer.returncode == 1
    assert answer.stderr.startswith("oauth-store: no support for 'mongodb'")


def test_memory() -> None:
    """A database in memory is a warning: it is lost with its process."""
    assert "nothing survives a restart" in finding(":memory:", "database", "warning")


def test_a_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that depends on the working directory is a warning that names the current file."""
    monkeypatch.chdir(path.parent)
    assert str(path) in finding("oauth.db", "path", "warning")


def test_the_documentation_has_a_section_for_each_check() -> None:
    """docs/doctor.md has a section for every check."""
    sources = "".join(source.read_text() for source in (DOCS.parent.parent / "oauth_store" / "doctor").glob("*.py"))
    checks = set(re.findall(r'(?:ok|warning|problem|clock)\(\s*"([A-Za-z\' ]+)"', sources))
    checks |= set(re.findall(r'check = "([a-zA-Z ]+)"', sources)) | {"CORS"}
    documented = set(re.findall(r"^### (.+)$", DOCS.read_text(), re.MULTILINE))
    assert len(checks) > 20
    assert checks <= documented


# The schema


def test_an_empty_database(empty_database_url: str) -> None:
    """A database without tables is a warning: the server creates them, or uses another database."""
    if "://" not in empty_database_url:
        Path(empty_database_url).touch(0o600)
    assert "the server creates the tables at first use" in finding(empty_database_url, "schema", "warning")


def test_an_old_schema(empty_database_url: str) -> None:
    """An old schema is a problem that names the command."""
    upgrade(empty_database_url, "0002")
    assert "oauth-store upgrade" in finding(empty_database_url, "schema", "problem")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """A text file is a problem, and not changed."""
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 200)
    path.chmod(0o600)
    assert "is not an SQLite database" in finding(path, "database", "problem")
    assert path.read_text() == "my notes\n" * 200


def test_a_server_that_is_away() -> None:
    """An unreachable server is a problem that does not print its password."""
    told = finding("postgresql://ada:pa55word@127.0.0.1:1/wiki", "database", "problem")
    assert "Connect call failed" in told
    assert "pa55word" not in told


# The file


@pytest.mark.parametrize(("mode", "level"), [(0o640, "warning"), (0o604, "warning"), (0o620, "problem")])
def test_a_file_that_others_may_open(mode: int, level: str, path: Path) -> None:
    """A file that others may read is a warning, and one that they may write a problem, with the chmod."""
    path.chmod(mode)
    assert f"chmod 600 {path}" in finding(path, "file modes", level)


def test_a_wal_that_others_may_read(path: Path) -> None:
    """The -wal and the -shm have the same content as the file: their modes count too."""
    connection = sqlite3.connect(path)
    connection.execute("SELECT count(*) FROM oauth_clients").fetchone()
    Path(f"{path}-wal").chmod(0o644)
    # in another process: this one must not open and close a file that SQLite has open
    answer = run("doctor", database=str(path))
    connection.close()
    assert f"-> run: chmod 600 {path}-wal\n" in answer.stdout


@needs_root
def test_files_of_two_owners(path: Path) -> None:
    """A -wal of another user, such as a command run as root may leave, keeps the server out."""
    connection = sqlite3.connect(path)
    connection.execute("SELECT count(*) FROM oauth_clients").fetchone()
    os.chown(f"{path}-wal", 65534, -1)
    answer = run("doctor", database=str(path))
    connection.close()
    assert answer.returncode == 1
    assert "problem  file owner: oauth.db belongs to root, oauth.db-wal belongs to nobody" in answer.stdout
    assert f"chown root {path} {path}-wal" in answer.stdout


@needs_root
def test_a_directory_that_its_owner_may_not_write(path: Path) -> None:
    """Without write access to the directory, SQLite cannot create a -wal."""
    os.chown(path, 65534, -1)
    assert "the file belongs to nobody, who may not create its -wal" in finding(path, "directory", "problem")
    os.chown(path.parent, 65534, -1)
    assert bad(path) == {}


@needs_root
def test_a_user_that_is_a_number_alone(path: Path) -> None:
    """In a container a user may have no name."""
    for file in (path, path.parent):
        os.chown(file, 23456, 23456)
    assert bad(path) == {}


def test_a_directory_that_is_everyones(path: Path) -> None:
    """Any user who may write to the directory may replace the file; with the sticky bit, only their own."""
    path.parent.chmod(0o777)
    assert f"chmod o-w {path.parent}" in finding(path, "directory", "problem")
    path.parent.chmod(0o1777)
    assert bad(path) == {}


@needs_root
@pytest.mark.parametrize(("size", "level"), [("8m", "problem"), ("40m", "warning"), ("100m", None)])
def test_a_disk_that_is_nearly_full(size: str, level: str | None, path: Path, tmp_path: Path) -> None:
    """Little disk space is a warning, and almost none a problem, before it keeps clients out."""
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", tmp_path / "disk") as disk:
        upgrade(str(disk / "oauth.db"))
        if level is None:
            assert bad(disk / "oauth.db") == {}
        else:
            assert "make room" in finding(disk / "oauth.db", "disk space", level)


def test_a_network_drive() -> None:
    """The file system is that of the mount with the longest path to the file, and of the last one there."""
    mounts = (
        "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        "30 22 0:40 / /srv rw - nfs4 nas:/wiki rw\n"
        "31 30 254:17 / /srv/local rw master:1 - xfs /dev/vdb1 rw\n"
        "32 30 0:41 / /srv/my\\040share rw - cifs //nas/w rw\n"
        "33 22 0:42 / /mnt rw - tmpfs tmpfs rw\n"
        "34 33 0:43 / /mnt rw - fuse.sshfs host: rw\n"
    )

    def kind(path: str) -> tuple[str, bool]:
        mount = find_mount(Path(path), mounts)
        assert mount is not None
        found = file_system(mount)
        return found.level, "PostgreSQL" in str(found.advice)

    assert kind("/srv/oauth.db") == ("problem", True)
    assert kind("/srv/my share/oauth.db") == ("problem", True)
    assert kind("/mnt/oauth.db") == ("problem", True)
    assert kind("/srv/local/oauth.db") == ("ok", False)
    assert kind("/srvlocal/oauth.db") == ("ok", False)
    assert kind("/home/oauth.db") == ("ok", False)


def test_a_journal_that_is_no_wal(path: Path) -> None:
    """A file that is not in WAL mode is a warning, and is not changed."""
    write(path, "PRAGMA journal_mode = DELETE")
    assert "delete, not WAL" in finding(path, "journal mode", "warning")
    assert "delete, not WAL" in finding(path, "journal mode", "warning")


def test_a_damaged_file(path: Path) -> None:
    """A damaged page is a problem that says how to recover."""
    connection = sqlite3.connect(path)
    connection.executemany(
        "INSERT INTO oauth_clients VALUES (?, '{}', NULL, 1, NULL)", [(f"client {n}",) for n in range(2000)]
    )
    connection.commit()
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_oauth_clients_1'"
    (page,) = connection.execute(query).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size + size // 2)
        file.write(b"\xff" * (size // 2))
    told = bad(path)
    assert "restore a backup" in str(told["integrity"].advice)


def test_a_token_without_its_client(path: Path) -> None:
    """A row without its client is damage too: something wrote without foreign keys."""
    write(
        path,
        "INSERT INTO oauth_tokens (token_hash, kind, grant_id, client_id, scopes, created_at, expires_at) "
        "VALUES (x'00', 'access_token', x'00', 'nobody', '', 1, 9999999999)",
    )
    assert "a row of oauth_tokens refers to a missing row of oauth_clients" in finding(path, "integrity", "problem")


# The content


def test_times_from_the_future(database_url: str) -> None:
    """A row from an hour in the future shows that a clock is, or was, wrong."""
    row = token(client_id=None, kind="session", created_at=int(time.time()) + 3600, expires_at=2**40)
    execute(database_url, insert(Token).values(row))
    assert "60 minutes in the future" in finding(database_url, "stored times", "problem")


def test_a_purge_backlog(path: Path) -> None:
    """More expired rows than a server deletes in a few hours are a warning."""
    write(
        path,
        "INSERT INTO oauth_tokens (token_hash, kind, grant_id, scopes, created_at, expires_at) "
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i <= 10000) "
        "SELECT randomblob(32), 'session', randomblob(16), '', 1, 2 FROM n",
    )
    assert "10,001 of oauth_tokens" in finding(path, "purge backlog", "warning")


@pytest.mark.parametrize(
    ("ahead", "uncertainty", "level"),
    [(0.2, 0, "ok"), (-4, 0, "ok"), (6, 2, "ok"), (-10, 0, "warning"), (61, 0, "problem"), (-7200, 1, "problem")],
)
def test_another_clock(ahead: float, uncertainty: float, level: str) -> None:
    """A difference of 5 seconds is a warning and of 60 a problem, less the time that the query took."""
    assert clock("clock", ahead, uncertainty).level == level


# Servers


def with_setting(database_url: str, name: str, value: str) -> None:
    """Change a setting of a PostgreSQL database for new connections."""
    execute(
        database_url,
        f"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {name} = {value}', current_database()); END $$",
    )


def test_a_standby(database_url: str) -> None:
    """A read-only database is a problem, though all reads work."""
    on_postgresql(database_url)
    with_setting(database_url, "default_transaction_read_only", "on")
    assert "use the primary" in finding(database_url, "writing", "problem")


def test_commits_that_may_be_lost(database_url: str) -> None:
    """synchronous_commit = off is a warning: a crash may lose acknowledged writes."""
    on_postgresql(database_url)
    with_setting(database_url, "synchronous_commit", "off")
    assert "synchronous_commit" in finding(database_url, "durability", "warning")


def test_privileges_that_are_missing(database_url: str) -> None:
    """A user that may not insert, or not delete, is a problem that names the missing privileges."""
    on_postgresql(database_url)
    select, some = (
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
        "GRANT INSERT, UPDATE ON oauth_tokens TO {role}",
    )
    with role(database_url, select, some) as url:
        found = bad(url)
    assert list(found) == ["privileges", "writing"]
    assert "DELETE on oauth_tokens" in found["privileges"].found
    assert "INSERT on oauth_clients" in found["privileges"].found
    assert "INSERT on oauth_tokens" not in found["privileges"].found
    assert found["writing"].found == "permission denied for table oauth_clients"


def test_a_table_that_is_not_transactional(database_url: str) -> None:
    """On MariaDB, a table of another engine or character set is a problem."""
    if not database_url.startswith(("mysql", "mariadb")):
        pytest.skip("a matter of MariaDB")
    execute(database_url, "ALTER TABLE oauth_codes ENGINE = MyISAM")
    assert "oauth_codes MyISAM" in finding(database_url, "tables", "problem")


# The password


def test_a_password_hash_of_ours_is_fine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash from `oauth-store hash-password` is checked, and not shown."""
    hashed = hash_password("correct horse")
    monkeypatch.setenv("MCP_OAUTH_PASSWORD_HASH", hashed)
    told = list(examine(str(path), None))
    assert [finding.level for finding in told if finding.check == "password"] == ["ok"]
    assert hashed.rpartition("$")[2] not in str(told)


@pytest.mark.parametrize(
    ("value", "level"),
    [
        ("", "warning"),
        ("pa55word", "problem"),
        ("=19=65536,t=3,p=4", "problem"),  # what a shell leaves of a hash in double quotes
        (PasswordHasher(time_cost=1, memory_cost=1024).hash("x"), "warning"),
        (PasswordHasher(type=Type.I).hash("x"), "warning"),
        (PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash("x"), "ok"),
        ("$argon2id$v=19$m=4194304,t=3,p=4$MTIzNDU2Nzg$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg", "warning"),
    ],
    ids=["none", "a password", "torn", "weak", "of another kind", "fine", "costly"],
)
def test_a_password_hash(value: str, level: str) -> None:
    """An invalid hash is a problem, a weak or a costly one a warning; none is repeated."""
    told = examine_password_hash(value)
    assert told.level == level
    assert not value or value not in str(told)
