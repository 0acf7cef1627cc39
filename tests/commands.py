"""`oauth-store`, run in a process of its own: with pipes, as scripts do, or on a terminal, as people do."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from typing import Any

COMMAND = [sys.executable, "-m", "oauth_store"]
TIMEOUT_SECONDS = 60


def environment_for(database: str | None, **more: str) -> dict[str, str]:
    """The environment of a command that is to find its database in MCP_OAUTH_DB."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MCP_OAUTH_DB", "SUDO_USER")}
    return {**environment, **({} if database is None else {"MCP_OAUTH_DB": database}), **more}


def run(
    *arguments: str,
    database: str | None = None,
    answer: str = "",
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `more` are environment variables."""
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
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment_for(database, **{"TERM": "xterm-256color", **more}),
        preexec_fn=lambda: os.login_tty(slave),
    )
    os.close(slave)
    output, waiting, deadline = b"", dict(answers or {}), time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.1)[0]:
            continue
        try:
            read = os.read(master, 4096)
        except OSError:  # the other side was closed
            break
        output += read
        for question in [asked for asked in waiting if asked.encode() in output]:
            os.write(master, waiting.pop(question).encode())
    os.close(master)
    return process.wait(TIMEOUT_SECONDS), output.decode()
