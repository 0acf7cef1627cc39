"""`oauth-store` in real terminals and pipes: no traceback, and no control characters from a client."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.fill import fill
from tests.commands import COMMAND, TIMEOUT_SECONDS, environment_for, run, run_anew, run_on_terminal
from tests.steps import provider_on, registered, sign_in

NASTY = "\x1b[31mred\x1b]0;title\x07\u202egnp.exe\u200b\r\n\x9b2J [bold]x[/bold] :smile:"


@pytest.fixture
async def nasty(tmp_path: Path) -> str:
    """A database whose client, subject and scopes have everything that could fool a terminal."""
    path = str(tmp_path / "oauth.db")
    async with provider_on(path) as provider:
        client = await registered(provider, client_id=f"id{NASTY}", client_name=NASTY)
        await sign_in(provider, client)
    with closing(sqlite3.connect(path)) as file:  # as older releases accepted scopes
        file.execute("UPDATE oauth_tokens SET scopes = ?", [f"read a{NASTY.split()[0]}"])
        file.commit()
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with a few hundred grants."""
    path = str(tmp_path_factory.mktemp("large") / "oauth.db")
    asyncio.run(fill(path, 500))
    return path


@pytest.mark.parametrize("command", ["grants", "clients"])
@pytest.mark.parametrize("columns", [200, 80, 40, 10])
def test_a_terminal_is_not_fooled(command: str, columns: int, nasty: str) -> None:
    """On terminals of any width, a client's control characters are removed, and its markup is not interpreted."""
    code, output = run_on_terminal(command, database=nasty, columns=columns, NO_COLOR="1")
    assert code == 0
    styles = re.sub(r"\x1b\[[0-9;]*m", "", output)  # ours: bold
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202e]", styles)
    assert "\x1b[31m" not in output
    if columns in (200, 40):  # elsewhere it is broken into several lines
        assert "[31mred ]0;title gnp.exe 2J [bold]x[/bold] :smile:" in styles
    if columns == 80:
        assert max(map(len, styles.splitlines())) == 80


def test_json_is_ascii(nasty: str) -> None:
    """In JSON, a client's text is complete, and escaped."""
    ran = run("grants", "--json", database=nasty)
    assert ran.stdout.isascii()
    assert ran.stdout.replace("\n", "").isprintable()
    assert json.loads(ran.stdout)["grants"][0]["client_name"] == NASTY


def test_no_colours(large: str) -> None:
    """NO_COLOR and a dumb terminal get no color; a pipe gets no escape sequences."""
    for output in (
        run_on_terminal("status", database=large, NO_COLOR="1")[1],
        run_on_terminal("status", database=large, TERM="dumb")[1],
    ):
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", output)
    for command in (["status"], ["grants"], ["--help"], ["revoke"]):
        ran = run(*command, database=large)
        assert "\x1b" not in ran.stdout + ran.stderr


def test_a_pipe_gets_whole_lines(large: str) -> None:
    """In a pipe, each grant is one line of any length, for grep and awk."""
    lines = run("grants", "--limit", "0", database=large).stdout.splitlines()
    assert len(lines) == 2 + 400
    assert all(re.match(r"[0-9a-f]{12} ", line) for line in lines[2:])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode(encoding: str, nasty: str) -> None:
    """Characters that the output's encoding does not have are escaped."""
    for command in ("grants", "clients", "status"):
        ran = run_anew(command, database=nasty, PYTHONIOENCODING=encoding)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_whoever_reads_has_seen_enough(large: str) -> None:
    """If the pipe is closed early, the command exits silently with the exit code of SIGPIPE."""
    for options in (["--limit", "0"], ["--limit", "0", "--json"]):
        with subprocess.Popen(
            [*COMMAND, "grants", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_for(large),
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()  # before it can have written anything
            assert process.stderr.read() == b""
            assert process.wait(TIMEOUT_SECONDS) == 141


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["status", "grants --json", "revoke --all", "explain", "--help"])
def test_closed_streams(command: str, closed: str, large: str) -> None:
    """With standard input, output or error closed there is no traceback, and nothing is done without confirmation."""
    script = f"{' '.join(COMMAND)} {command} {closed}"
    ran = subprocess.run(
        ["bash", "-c", script],
        env=environment_for(large),
        input="",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert ran.returncode == (1 if command in ("revoke --all", "explain") else 0)
    assert "Traceback" not in ran.stdout + ran.stderr
    assert "Exception ignored" not in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", [["status"], ["grants", "--json"], ["clients"]])
def test_a_full_disk(command: list[str], large: str) -> None:
    """If the output cannot be written, there is a one-line error, and exit code 1."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*COMMAND, *command],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment_for(large),
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (
        1,
        "oauth-store: cannot write the output: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("command", "question"), [(["revoke", "--all"], "permanently? [y/N] "), (["explain"], "Token (not shown): ")]
)
def test_interrupted(command: list[str], question: str, large: str) -> None:
    """Ctrl-C at a prompt ends the command with 130, without a traceback, and nothing is done."""
    code, output = run_on_terminal(*command, database=large, answers={question: "\x03"})
    assert code == 130
    assert "Traceback" not in output
    code, output = run_on_terminal(*command, database=large, answers={question: "\x04"})
    assert code == 1
    assert "Traceback" not in output
    assert json.loads(run("grants", "--limit", "1", "--json", database=large).stdout)["total"] == 400


def test_a_signal_while_it_works(large: str) -> None:
    """SIGINT before any prompt ends it with 130, unless it was done already; never with a traceback."""
    for delay in (0.05, 0.3, 0.6):
        with subprocess.Popen(
            [*COMMAND, "status"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_for(large),
        ) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        # before Python runs our first line, it ends as usual
        assert process.returncode in (0, 130, -signal.SIGINT, 1)
        assert process.returncode != 1 or b"oauth_store" not in errors


def test_what_is_not_needed_is_not_imported(large: str) -> None:
    """Commands that only read do not import FastMCP, the SDK, Alembic and cryptography, which take a second."""
    commands = [
        ["status"],
        ["grants"],
        ["clients"],
        ["purge", "--dry-run"],
        ["revoke", "--subject", "ada", "--yes"],
        ["--help"],
    ]
    program = (
        "import json, sys; from oauth_store.cli.app import app\n"
        "heavy = {'fastmcp', 'mcp', 'alembic', 'cryptography', 'starlette', 'pydantic', 'jinja2'}\n"
        "for arguments in json.load(sys.stdin):\n"
        "    code = app(arguments, result_action='return_value')\n"
        "    if code or heavy & set(sys.modules):\n"
        "        sys.exit(f'{arguments}: {code}, imported {heavy & set(sys.modules)}')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment_for(large),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("Usage: oauth-store") == 1


COMMANDS = ["status", "grants", "revoke", "explain", "clients", "clients add", "clients remove", "purge", "upgrade"]
COMMANDS += ["downgrade", "alembic-ini", "passkey add", "passkey list", "passkey remove"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_helps(command: str) -> None:
    """--help of each command has its name, its options and the exit codes; no option shows a default of False."""
    ran = run(*command.split(), "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"Usage: oauth-store {command} ")
    assert "--json" in ran.stdout
    assert ("--database" in ran.stdout) == (command != "alembic-ini")
    assert "Exit codes: 0" in ran.stdout
    assert "False" not in ran.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, tmp_path: Path) -> None:
    """--install-completion writes a script with the commands, for the current shell."""
    ran = run("--install-completion", "--shell", shell, HOME=str(tmp_path), SHELL=f"/bin/{shell}", XDG_CONFIG_HOME="")
    assert ran.returncode == 0, ran.stderr
    written = "\n".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for command in ("grants", "revoke", "explain"):
        assert command in written
