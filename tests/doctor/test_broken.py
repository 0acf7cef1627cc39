"""`oauth-store doctor` on broken databases: each check is independent, and none ends in a traceback."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import insert, make_url

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from oauth_store.database.models import Client
from oauth_store.doctor.examine import examine
from tests.commands import COMMAND, environment_for, run, run_json
from tests.databases import execute, file_bytes, select
from tests.doctors import bad, finding, mounted, on_postgresql, role
from tests.steps import BASE_URL
from tests.stores import fill

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users and mounts need root")
NOBODY = 65534


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with rows in each table."""
    path = tmp_path_factory.mktemp("filled") / "oauth.db"
    fill(str(path), tokens=400)
    return path


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled file, in its own directory."""
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    path = directory / "oauth.db"
    shutil.copyfile(filled, path)
    path.chmod(0o600)
    return path


def root_page(path: Path, name: str) -> tuple[int, int]:
    """Return the offset of the first page of a table or an index, and its size."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    return (page - 1) * size, size


def damage(name: str) -> Callable[[Path], None]:
    """Overwrite the first page of a table."""

    def overwrite(path: Path) -> None:
        begin, size = root_page(path, name)
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(b"\xff" * size)

    return overwrite


def overwrite_the_schema(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 900)


def truncate(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_a_directory_in_place_of_the_wal(path: Path) -> None:
    Path(f"{path}-wal").mkdir()


def put_a_link_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


FILE = ["file modes", "file owner", "directory", "disk space", "file system"]
INSIDE = ["integrity", "writing", "stored times", "purge backlog"]


@pytest.mark.parametrize(
    ("change", "said", "checks"),
    [
        (damage("oauth_clients"), "malformed", [*FILE, "schema", *INSIDE]),
        (damage("oauth_tokens"), "malformed", [*FILE, "schema", *INSIDE]),
        (damage("ix_oauth_tokens_expires_at"), "restore a backup", [*FILE, "schema", *INSIDE]),
        (damage("oauth_store_version"), "problem  schema: database disk image is malformed", [*FILE, *INSIDE]),
        (overwrite_the_schema, "malformed", FILE),
        (truncate(lambda size: size // 2), "malformed", FILE),
        (truncate(lambda _size: 4096), "malformed", FILE),
        (truncate(lambda _size: 50), "malformed", FILE),
        (replace_by_a_directory, "is a directory", []),
        (put_a_directory_in_place_of_the_wal, "problem  database:", FILE),
        (put_a_link_in_a_circle, "Too many levels of symbolic links", []),
    ],
    ids=[
        "clients",
        "tokens",
        "an index",
        "the version",
        "the schema",
        "half a file",
        "one page",
        "50 bytes",
        "a directory",
        "a directory as -wal",
        "a link to itself",
    ],
)
def test_a_file_that_is_broken(change: Callable[[Path], None], said: str, checks: list[str], path: Path) -> None:
    """Any damage to a file is a problem in one line, and the checks that can still run do."""
    change(path)
    answer = run("doctor", database=str(path))
    assert (answer.returncode, answer.stderr) == (1, "")
    assert said in answer.stdout
    told = json.loads(run("doctor", "--json", database=str(path)).stdout)
    assert told["ok"] is False
    found = {each["check"] for each in told["findings"]}
    assert found >= set(checks), found
    assert all(each["advice"] for each in told["findings"] if each["level"] != "ok")


def test_a_file_without_a_byte(path: Path) -> None:
    """An empty file is a warning: the server creates its tables."""
    os.truncate(path, 0)
    assert "the server creates the tables at first use" in finding(path, "schema", "warning")


@pytest.mark.parametrize("after", ["versions", "file modes", "disk space", "database", "integrity"])
def test_a_file_that_is_deleted_meanwhile(after: str, path: Path) -> None:
    """A file that is deleted during the check is not created again, and the open file is checked to the end."""
    checks = []
    for each in examine(str(path), None):
        checks.append(each.check)
        if each.check == after:
            path.unlink(missing_ok=True)
    assert not path.exists()
    assert checks[-1] in ("database", "purge backlog")


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path in a deleted directory is a problem of the check `path`."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert bad("oauth.db")["path"].level == "problem"


@needs_root
def test_a_directory_that_may_not_be_entered(path: Path, tmp_path: Path) -> None:
    """A directory of another user is a problem that says as which user to run the command."""
    for directory in [*tmp_path.parents][:3]:
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    tmp_path.chmod(0o711)
    answer = run("doctor", database=str(path), user=NOBODY)
    assert (answer.returncode, answer.stderr) == (1, "")
    assert f"problem  database: Permission denied: {path}\n" in answer.stdout
    assert "run this as the server's user" in answer.stdout


@needs_root
def test_a_file_system_that_is_read_only(path: Path, tmp_path: Path) -> None:
    """A disk that the kernel made read-only is found by the test write."""
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "-o", "size=100m,mode=0700", "tmpfs", tmp_path / "disk") as disk:
        shutil.copyfile(path, disk / "oauth.db")
        (disk / "oauth.db").chmod(0o600)
        with closing(sqlite3.connect(disk / "oauth.db")) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        found = bad(disk / "oauth.db")
    assert "Read-only file system" in found["disk space"].found
    assert "readonly" in found["writing"].found
    assert "integrity" not in found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process in a transaction that writes."""
    program = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "connection.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, path], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_a_lock_that_another_process_holds(path: Path) -> None:
    """A write that waits for a lock until it times out is a problem that reports the lock."""
    with locked(path):
        told = finding(path, "writing", "problem")
    assert told.startswith("database is locked (SQLITE_BUSY) -> end the process that holds the lock")


def is_open(path: Path, pid: int) -> bool:
    """Return whether a process has a file open, on Linux."""
    descriptors = Path(f"/proc/{pid}/fd")
    return any(str(path) == os.path.realpath(descriptor) for descriptor in descriptors.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which files a process has open, Linux alone reports")
@pytest.mark.parametrize("json_too", [False, True])
def test_what_was_found_is_told_before_the_end(json_too: bool, path: Path) -> None:
    """Each finding is printed at once; if the command is interrupted, its JSON has the findings so far."""
    command = [*COMMAND, "doctor", *(["--json"] if json_too else [])]
    with (
        locked(path),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_for(str(path))
        ) as doctor,
    ):
        assert doctor.stdout is not None
        read = ""
        if json_too:
            while not is_open(path, doctor.pid):
                time.sleep(0.05)
            time.sleep(1)  # it waits five seconds for the lock
        else:
            while "integrity" not in read:
                read += doctor.stdout.readline()
        doctor.send_signal(signal.SIGINT)
        output, errors = doctor.communicate(timeout=30)
    assert doctor.returncode == 130, errors
    assert "Traceback" not in errors
    if json_too:
        told = json.loads(output)
        assert told["ok"] is False
        assert "integrity" in [each["check"] for each in told["findings"]]


@pytest.mark.parametrize("json_too", [False, True])
def test_an_interrupt_as_a_check_begins(json_too: bool, path: Path) -> None:
    """SIGINT right after `asyncio.run` installed its handler: it cancels the task and forgets why."""
    program = (
        "import os, signal, sys; install = signal.signal\n"
        "def interrupted(number, handler):\n"
        "    before = install(number, handler)\n"
        "    if handler is not signal.default_int_handler: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return before\n"
        "signal.signal = interrupted; from oauth_store.cli.app import main; main()"
    )
    doctor = subprocess.run(
        [sys.executable, "-c", program, "doctor", *(["--json"] if json_too else [])],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment_for(str(path)),
        check=False,
    )
    assert doctor.returncode == 130, doctor.stderr
    assert "Traceback" not in doctor.stderr
    if json_too:
        assert json.loads(doctor.stdout)["ok"] is False


def test_the_bytes_stay_as_they_are(path: Path) -> None:
    """No byte changes, neither of a healthy file nor of the -wal that a killed server left."""
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert bad(path) == {}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["oauth.db"]

    program = (
        "import os, sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "connection.execute('PRAGMA wal_autocheckpoint = 0'); "
        "[connection.execute('UPDATE oauth_clients SET created_at = created_at + 1') for _ in range(20)]; "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, path], check=False)
    wal = Path(f"{path}-wal")
    with wal.open("r+b") as file:  # and the disk lost a page of it
        file.seek(wal.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    files = path.read_bytes() + wal.read_bytes()
    assert bad(path) == {}
    assert path.read_bytes() + wal.read_bytes() == files


# Mounts


@needs_root
async def test_a_file_that_is_mounted_alone(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is mounted alone is a warning of the doctor, and of the server at start; a directory is none."""
    inside = tmp_path / "container"
    inside.mkdir(mode=0o700)
    (inside / "oauth.db").touch()

    async def start() -> list[str]:
        caplog.clear()
        async with SQLAlchemyOAuthProvider(inside / "oauth.db", base_url=BASE_URL, approval=AutoApproval()) as provider:
            await provider.check_schema()
        return [record.message for record in caplog.records if record.name == "oauth_store"]

    with mounted("--bind", path, inside / "oauth.db"):
        (warned,) = await start()
        assert warned.startswith(f"{inside}/oauth.db is mounted alone")
        answer = run("doctor", database=str(inside / "oauth.db"))
        assert f"warning  mount: {inside}/oauth.db is mounted alone" in answer.stdout
        assert "-> mount the directory of the file instead" in answer.stdout
    with mounted("--bind", path.parent, inside):
        assert await start() == []
        assert "mounted alone" not in run("doctor", database=str(inside / "oauth.db")).stdout


# Servers


def test_a_user_that_may_not_read(database_url: str) -> None:
    """A user without privileges on the tables is a problem that lists them, and the other checks still run."""
    on_postgresql(database_url)
    with role(database_url) as url:
        found = {each.check: each for each in examine(url, None)}
    assert found["schema"].found == "permission denied for table oauth_store_version"
    assert "SELECT on oauth_tokens" in found["privileges"].found
    for check in ("writing", "stored times", "purge backlog"):
        assert found[check].level == "problem"
        assert "GRANT" in str(found[check].advice)
    assert found["durability"].level == found["connections"].level == "ok"


def test_a_user_without_the_schema(database_url: str) -> None:
    """A user without USAGE on the schema sees an empty database: a problem that names the GRANT."""
    on_postgresql(database_url)
    with role(database_url, "REVOKE USAGE ON SCHEMA public FROM public") as url:
        told = finding(url, "schema", "problem")
    assert "oauth_tokens is in public" in told
    assert "GRANT USAGE ON SCHEMA public TO" in told


def test_tables_in_another_schema(database_url: str) -> None:
    """A search_path that misses the tables is a warning that names their schema."""
    on_postgresql(database_url)
    with role(database_url, "CREATE SCHEMA other", "GRANT USAGE ON SCHEMA other TO {role}") as url:
        execute(database_url, f"ALTER ROLE {make_url(url).username} SET search_path = other")
        told = finding(url, "schema", "warning")
        execute(database_url, "DROP SCHEMA other")
    assert "no tables in other, but oauth_tokens is in public" in told


RIGHTS = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}"
SECURE = "ALTER TABLE oauth_clients ENABLE ROW LEVEL SECURITY"


def test_policies_that_refuse_rows(database_url: str) -> None:
    """Row level security without a policy refuses every row: the test write reports it."""
    on_postgresql(database_url)
    with role(database_url, RIGHTS, SECURE) as url:
        found = bad(url)
    assert "violates row-level security policy" in found["writing"].found
    assert "oauth_clients" in found["row level security"].found


def test_policies_that_hide_rows(database_url: str) -> None:
    """A policy that accepts rows and shows none is a problem: written rows are missing."""
    on_postgresql(database_url)
    execute(database_url, insert(Client).values(client_id="x", client_metadata="{}", created_at=1))
    policy = "CREATE POLICY takes ON oauth_clients FOR INSERT TO {role} WITH CHECK (true)"
    with role(database_url, RIGHTS, SECURE, policy) as url:
        assert select(url, "SELECT * FROM oauth_clients") == []
        found = bad(url)
        execute(database_url, "DROP POLICY takes ON oauth_clients")
    assert found["writing"].found == "this user cannot see rows that it wrote: oauth_clients"


def test_policies_that_may_hide_rows(database_url: str) -> None:
    """A policy that shows all rows is only a warning: another policy might hide some."""
    on_postgresql(database_url)
    policy = "CREATE POLICY shows ON oauth_clients TO {role} USING (true)"
    with role(database_url, RIGHTS, SECURE, policy) as url:
        told = finding(url, "row level security", "warning")
        execute(database_url, "DROP POLICY shows ON oauth_clients")
    assert "BYPASSRLS" in told


def test_a_table_that_another_locks(database_url: str) -> None:
    """A table that cannot be read in time is a problem of the checks that need it, and of no other."""
    on_postgresql(database_url)
    lock = "BEGIN; LOCK TABLE oauth_codes IN ACCESS EXCLUSIVE MODE"
    timeout = "ALTER ROLE {role} SET lock_timeout = '100ms'"
    with role(database_url, RIGHTS, timeout) as url, holding(database_url, lock):
        found = {each.check: each for each in examine(url, None)}
    for check in ("writing", "stored times", "purge backlog"):
        assert "lock timeout" in found[check].found
    assert [each.check for each in found.values() if each.level == "problem"] == [
        "writing",
        "stored times",
        "purge backlog",
    ]


@contextmanager
def holding(url: str, statement: str) -> Iterator[None]:
    """Another process with a transaction in which it has executed a statement."""
    program = (
        "import asyncio, asyncpg, sys\n"
        "async def main():\n"
        "    connection = await asyncpg.connect(sys.argv[1])\n"
        "    await connection.execute(sys.argv[2])\n"
        "    print('holding', flush=True)\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, url, statement], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"holding\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_a_user_of_mariadb_that_may_only_read(database_url: str) -> None:
    """On MariaDB, a user that may not write is a problem, though no catalog that it can read shows it."""
    if not database_url.startswith(("mysql", "mariadb")):
        pytest.skip("a matter of MariaDB")
    url = make_url(database_url)
    user = f"reader_{os.urandom(4).hex()}"
    execute(
        database_url,
        f"CREATE USER {user} IDENTIFIED BY 'pa55word'",
        f"GRANT SELECT ON {url.database}.* TO {user}",
    )
    try:
        reader = url.set(username=user, password="pa55word").render_as_string(hide_password=False)
        told = finding(reader, "writing", "problem")
    finally:
        execute(database_url, f"DROP USER {user}")
    assert "INSERT command denied" in told
    assert "GRANT" in told


def test_a_write_that_is_tried_leaves_nothing(database_url: str) -> None:
    """After the test write, no row has changed, and no byte of a file."""
    before = [
        select(database_url, f"SELECT * FROM {name}") for name in ("oauth_clients", "oauth_codes", "oauth_tokens")
    ]
    content = file_bytes(database_url) if "://" not in database_url else b""
    assert run_json("doctor", database=database_url)["ok"] is True
    assert before == [
        select(database_url, f"SELECT * FROM {name}") for name in ("oauth_clients", "oauth_codes", "oauth_tokens")
    ]
    assert content == (file_bytes(database_url) if "://" not in database_url else b"")


def test_a_wal_beside_an_empty_file_stays(tmp_path: Path) -> None:
    """The doctor does not open an empty file that has a -wal: SQLite would delete the -wal with all its data."""
    path = tmp_path / "oauth.db"
    path.touch(0o600)
    (tmp_path / "oauth.db-wal").write_bytes(b"what is left")
    findings = list(examine(str(path), None))
    assert [f.check for f in findings if f.level == "problem"] == ["database"]
    assert (tmp_path / "oauth.db-wal").read_bytes() == b"what is left"
