"""`oauth-store hash-password`, on a terminal and with a pipe."""

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from oauth_store import PasswordApproval
from oauth_store.cli.app import main
from tests.commands import environment_for, run
from tests.forks import fork

PASSWORD = "correct horse"
SECONDS = 30


def piped(data: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `data` on standard input."""
    return run("hash-password", *arguments, answer=data)


def typed(directory: Path, *answers: str | int) -> tuple[int, str, str]:
    """Run the command on its own terminal, and type an answer or send a signal at each prompt.

    Returns its exit code, what it wrote to standard output, and what the terminal showed.
    """
    terminal, its_side = pty.openpty()
    on_terminal, output = Path(os.ttyname(its_side)), directory / "output"
    streams = [on_terminal, output, on_terminal]  # getpass asks on the terminal, and not on standard output
    process = fork(main, ["oauth-store", "hash-password"], environment_for(None), streams)

    def press(answer: str | int) -> None:
        if isinstance(answer, int):
            os.kill(int(process.pid or 0), answer)
        else:
            os.write(terminal, answer.encode())

    try:
        shown = ""
        for answer in answers:
            shown += read_terminal(terminal, until=": ")
            press(answer)
        deadline = time.monotonic() + SECONDS
        while process.is_alive() and time.monotonic() < deadline:
            process.join(1)
            if process.is_alive() and answers[-1] in ("\x03", signal.SIGINT):
                press(answers[-1])  # Python misses one between its last look for signals and the read that waits
        os.close(its_side)
        shown += read_terminal(terminal)
    finally:
        process.kill()
        process.join()
        os.close(terminal)
    assert process.exitcode is not None
    return process.exitcode, output.read_text(), shown


def read_terminal(terminal: int, until: str | None = None) -> str:
    """Return the output of a terminal, up to a text, or up to the end of the process."""
    shown, deadline = "", time.monotonic() + SECONDS
    while until is None or not shown.endswith(until):
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"nothing more than {shown!r}"
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            data = b""
        if not data:
            assert until is None, f"the command ended: {shown}"
            break
        shown += data.decode()
    return shown


class TestTerminal:
    """Typed at a prompt."""

    def test_it_is_asked_for_twice_and_never_shown(self, tmp_path: Path) -> None:
        """The prompts are on the terminal, without echo; standard output has only the hash."""
        code, output, shown = typed(tmp_path, f"{PASSWORD}\n", f"{PASSWORD}\n")
        assert code == 0
        assert PasswordHasher().verify(output.removesuffix("\n"), PASSWORD)
        assert PASSWORD not in shown
        assert [line.strip() for line in shown.splitlines()] == [
            "Password:",
            "Repeat the password:",
            "Set MCP_OAUTH_PASSWORD_HASH to this hash (in single quotes if a shell reads it):",
        ]

    def test_a_slip_of_the_keyboard_is_noticed(self, tmp_path: Path) -> None:
        """Two different passwords are refused, and neither is shown."""
        code, output, shown = typed(tmp_path, f"{PASSWORD}\n", "correct house\n")
        assert (code, output) == (1, "")
        assert "the passwords do not match" in shown
        assert PASSWORD not in shown
        assert "house" not in shown

    def test_an_arrow_key_is_noticed(self, tmp_path: Path) -> None:
        """A password that the sign-in page would not accept is refused, before it locks the owner out."""
        code, output, shown = typed(tmp_path, "correct horse\x1b[D\n", "correct horse\x1b[D\n")
        assert (code, output) == (1, "")
        assert "control character" in shown

    @pytest.mark.parametrize("leaving", ["\x04", "\x03", signal.SIGINT], ids=["Ctrl-D", "Ctrl-C", "SIGINT"])
    def test_leaving_is_quiet(self, tmp_path: Path, leaving: str | int) -> None:
        """Ctrl-C and Ctrl-D end it with 130, without a traceback."""
        code, output, shown = typed(tmp_path, leaving)
        assert (code, output) == (130, "")
        assert "Traceback" not in shown


class TestPipe:
    """Piped in by a script."""

    @pytest.mark.parametrize(
        ("data", "password"),
        [
            (b"correct horse\n", PASSWORD),
            (b"correct horse", PASSWORD),
            (b"correct horse\r\nand more\n", PASSWORD),
            (b"  spaces count  \n", "  spaces count  "),
            ("cafe\u0301 au lait\n".encode(), "caf\u00e9 au lait"),
            (b"x" * 1000, "x" * 1000),
        ],
    )
    def test_the_first_line_is_hashed(self, data: bytes, password: str) -> None:
        """Standard output is the hash of the first line, as the sign-in page spells it, ready for PasswordApproval."""
        done = piped(data)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("$argon2id$")
        assert PasswordHasher().verify(done.stdout.removesuffix("\n"), password)
        assert "Set MCP_OAUTH_PASSWORD_HASH" in done.stderr
        PasswordApproval(password_hash=done.stdout.removesuffix("\n"))

    @pytest.mark.parametrize(
        ("data", "complaint"),
        [
            (b"", "the password is empty"),
            (b"\n", "the password is empty"),
            (b"\ncorrect horse\n", "the password is empty"),
            (b"seven77\n", "the password has 7 characters; expected 8 to 1000"),
            (b"x" * 1001, "the password has 1001 characters; expected 8 to 1000"),
            (b"correct\0horse\n", "control character"),
            (b"correct \xff horse\n", "not valid UTF-8"),
        ],
    )
    def test_what_could_not_be_used_is_refused(self, data: bytes, complaint: str) -> None:
        """The error is one line; there is no hash, and the password is not repeated."""
        done = piped(data)
        assert (done.returncode, done.stdout) == (1, "")
        assert complaint in done.stderr
        assert done.stderr.startswith("oauth-store: ")
        assert len(done.stderr.splitlines()) == 1
        assert "seven77" not in done.stderr

    def test_an_argument_is_refused_and_not_repeated(self) -> None:
        """Every process can read arguments: the error says how to do it, and does not repeat the password."""
        done = piped(b"", PASSWORD)
        assert (done.returncode, done.stdout) == (1, "")
        assert "type the password at the prompt" in done.stderr
        assert "horse" not in done.stderr


def test_the_help_names_it() -> None:
    """--help explains the command, and shows no argument."""
    done = piped(b"", "--help")
    assert done.returncode == 0
    assert "MCP_OAUTH_PASSWORD_HASH" in done.stdout
    assert "ARG" not in done.stdout
