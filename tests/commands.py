"""`oauth-store`, run in a process of its own: with pipes, as scripts do, or on a terminal, as people do."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic.config import main as alembic_main

from oauth_store.cli.app import main
from tests.forks import fork

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "oauth_store"]
TIMEOUT_SECONDS = 60


def environment_for(database: str | None, **more: str) -> dict[str, str]:
    """The environment of a command that is to find its database in MCP_OAUTH_DB."""
    ours = ("MCP_OAUTH_DB", "SUDO_USER", "PYTEST_", "COLUMNS")  # of the tests: cyclopts warns of them, xdist has 80
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**environment, **({} if database is None else {"MCP_OAUTH_DB": database}), **more}


def run(
    *arguments: str, database: str | None = None, answer: str | bytes = "", user: int | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which may be another user's; `more` are environment variables.

    The process is forked from one that has imported what the commands need, which takes them a second.
    """
    command = ["oauth-store", *arguments]
    return run_forked(main, command, environment_for(database, **more), answer=answer, user=user)


def alembic(database: str, *arguments: str, umask: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the `alembic` command as an operator does in a checkout."""
    environment = environment_for(database)
    return run_forked(alembic_main, ["alembic", *arguments], environment, directory=ROOT, umask=umask)


def run_forked(
    program: Callable[[], None],
    command: list[str],
    environment: dict[str, str],
    *,
    answer: str | bytes = "",
    directory: Path | None = None,
    **rights: int | None,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a forked process, with `answer` on its standard input. `rights` are those of `become`."""
    with tempfile.TemporaryDirectory() as streams:
        paths = [Path(streams, name) for name in ("stdin", "stdout", "stderr")]
        for path, content in zip(paths, (answer, "", ""), strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        process = fork(program, command, environment, paths, directory, **rights)
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, TIMEOUT_SECONDS)
        output, errors = (path.read_text() for path in paths[1:])
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def run_anew(
    *arguments: str, database: str | None = None, answer: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell does: by an interpreter that has to start first."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        input=answer,
        env=environment_for(database, **more),
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def run_json(*arguments: str, database: str, answer: str = "", code: int = 0) -> Any:
    """Run the command with --json, and return its one document."""
    ran = run(*arguments, "--json", database=database, answer=answer)
    assert ran.returncode == code, ran.stderr
    return json.loads(ran.stdout)


def run_on_terminal(
    *arguments: str,
    database: str | None = None,
    answers: dict[str, str] | None = None,
    columns: int = 80,
    **more: str,
) -> tuple[int, str]:
    """Run the command on a terminal, answering what it asks. Return its exit code and what the terminal got."""
    terminal, its_side = pty.openpty()
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = environment_for(database, **{"TERM": "xterm-256color", **more})
    process = fork(main, ["oauth-store", *arguments], environment, [Path(os.ttyname(its_side))] * 3)
    output, waiting, deadline = b"", dict(answers or {}), time.monotonic() + TIMEOUT_SECONDS
    interrupted, pressed = False, 0.0
    while process.exitcode is None or select.select([terminal], [], [], 0)[0]:
        assert time.monotonic() < deadline, output.decode()
        if interrupted and time.monotonic() > pressed + 2:
            os.write(terminal, b"\x03")  # Python misses one between its last look for signals and the read that waits
            pressed = time.monotonic()
        if not select.select([terminal, process.sentinel], [], [], 0.1)[0]:
            continue
        if select.select([terminal], [], [], 0)[0]:
            output += os.read(terminal, 4096)
        for question in [asked for asked in waiting if asked.encode() in output]:
            answer = waiting.pop(question)
            os.write(terminal, answer.encode())
            interrupted, pressed = answer == "\x03", time.monotonic()
    os.close(its_side)  # until here it was open: what a process has written outlives it
    os.close(terminal)
    process.join()
    return int(process.exitcode), output.decode()
