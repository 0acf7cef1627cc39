"""What `make serve` runs."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from examples.demo import ClientApp, clean_environment
from examples.serve import main
from examples.server import port
from oauth_store.pages.passwords import hash_password
from tests.commands import run_forked
from tests.serving import free_port

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "examples.serve"]
SECONDS = 60

# the store of the client outlives the client object, as a file would
pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


def environment(**settings: str) -> dict[str, str]:
    """The environment of a run, without settings of another server."""
    return {**clean_environment(), "PYTHONPATH": str(ROOT), **settings}


class Run:
    """A process of the example, in a directory of its own."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self._said, self._errors = directory.with_suffix(".out"), directory.with_suffix(".err")
        with self._said.open("w") as said, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                COMMAND, cwd=directory, env=environment(**settings), stdout=said, stderr=errors
            )
        deadline = time.monotonic() + SECONDS
        while "Ctrl-C stops it." not in self.said:
            assert self.process.poll() is None, self.said + self.errors
            assert time.monotonic() < deadline, self.said + self.errors
            time.sleep(0.05)
        # it listened before it said so: once it answers, nothing is imported any more in which Ctrl-C would be lost
        httpx2.get(f"http://127.0.0.1:{settings['PORT']}/", timeout=SECONDS)

    @property
    def said(self) -> str:
        """What it has printed."""
        return self._said.read_text()

    @property
    def errors(self) -> str:
        """What it has logged."""
        return self._errors.read_text()

    @property
    def password(self) -> str:
        """The password that it shows."""
        found = re.search(r"^Password +([a-z0-9-]+)   \(for this run", self.said, re.MULTILINE)
        assert found is not None, self.said
        return found[1]

    def interrupt(self) -> int:
        """Send what Ctrl-C sends, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=SECONDS)


@contextmanager
def running(directory: Path, **settings: str) -> Iterator[Run]:
    """Start the example, and end it at last."""
    directory.mkdir(exist_ok=True)
    run = Run(directory, **settings)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


async def test_a_person_can_do_what_it_says(tmp_path: Path) -> None:
    """Its password opens the page; after Ctrl-C and a new start, with another one, the client goes on as it was."""
    directory, number = tmp_path / "wiki", free_port()
    url = f"http://127.0.0.1:{number}/mcp"
    with running(directory, PORT=str(number)) as run:
        assert f"claude mcp add --transport http wiki {url}\n" in run.said
        assert f"Connected apps http://127.0.0.1:{number}/apps" in run.said
        assert "BASE_URL=https://wiki.example.com make serve" in run.said
        assert str(directory / "mcp_oauth.db") in run.said
        first = run.password
        app = ClientApp(url, first)
        await app.call_tool()
        assert (directory / "mcp_oauth.db").exists()
        assert run.interrupt() == 0
        assert "Stopped." in run.said
        assert run.said.count(first) == 1
        assert first not in run.errors
        assert "approval granted" in run.errors
        assert "Traceback" not in run.errors
    with running(directory, PORT=str(number)) as run:
        assert run.password != first
        await app.call_tool()
        assert app.authorizations == 1
        assert run.interrupt() == 0


async def test_ctrl_c_does_not_wait_for_clients(tmp_path: Path) -> None:
    """A client that is connected does not keep the server from ending, without a traceback."""
    number = free_port()
    with running(tmp_path / "wiki", PORT=str(number)) as run:
        app = ClientApp(f"http://127.0.0.1:{number}/mcp", run.password)
        await app.call_tool()
        async with app.connect():
            assert run.interrupt() == 0
        assert "Traceback" not in run.errors


def test_a_password_of_ones_own_is_not_shown(tmp_path: Path) -> None:
    """Where MCP_OAUTH_PASSWORD_HASH is set, that one counts; and a public URL is what clients are told."""
    hashed = hash_password("correct horse")
    settings = {"MCP_OAUTH_PASSWORD_HASH": hashed, "BASE_URL": "https://wiki.example.com/", "PORT": str(free_port())}
    with running(tmp_path / "wiki", **settings) as run:
        assert "the password whose hash is in MCP_OAUTH_PASSWORD_HASH" in run.said
        assert "for this run" not in run.said
        assert hashed not in run.said
        assert "Add custom connector: https://wiki.example.com/mcp\n" in run.said
        assert "wiki https://wiki.example.com/mcp\n" in run.said
        assert run.interrupt() == 0


def refused(directory: Path, **settings: str) -> str:
    """The one line that a run ends with at once."""
    done = run_forked(main, ["examples/serve.py"], environment(**settings), directory=directory)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "secret" not in done.stdout + done.stderr
    return done.stderr


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    """Somebody else's port is named, and so is the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        said = refused(tmp_path, PORT=str(number))
    assert said.startswith(f"cannot start: 127.0.0.1:{number}: Address already in use; choose another port")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"BASE_URL": "http://wiki.example.com"}, "expected https://"),
        ({"MCP_OAUTH_PASSWORD_HASH": "my secret"}, "MCP_OAUTH_PASSWORD_HASH is not an argon2 hash"),
        ({"MCP_OAUTH_DB": "postgresql://me:secret@127.0.0.1:1/wiki"}, "127.0.0.1:1/wiki"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(tmp_path: Path, settings: dict[str, str], complaint: str) -> None:
    """A bad setting, or a database that is not there, says so, with exit code 1, no traceback, and no secret."""
    said = refused(tmp_path, PORT=str(free_port()), **settings)
    assert said.startswith("cannot start: ")
    assert complaint in said


@pytest.mark.parametrize("found", ["http", "65536", "0", "-1", "80.5"])
def test_a_bad_port_is_named(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """What PORT is, and what it should be."""
    monkeypatch.setenv("PORT", found)
    with pytest.raises(SystemExit, match=f"PORT is '{found}'; expected a number from 1 to 65535"):
        port()
