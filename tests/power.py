"""A power cut, simulated: what a process wrote and synced, recorded by strace, and what of it a disk has afterwards."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SECTOR = 512
_CALL = re.compile(rb"(\d+) +(pwrite64|write|fsync|fdatasync|ftruncate)\(\d+<((?:\\x[0-9a-f]{2})+)>(?:, )?(.*)")
_RESUMED = re.compile(rb"(\d+) +<\.\.\. (fsync|fdatasync) resumed>.*= 0")
_STRING = re.compile(rb'"((?:\\x[0-9a-f]{2})*)", (.*)')


def need_strace() -> str:
    """The program that records. Without it the test is skipped; with OAUTH_STORE_TEST_REQUIRE_STRACE=1, it fails."""
    found = shutil.which("strace")
    if found is not None:
        return found
    if os.environ.get("OAUTH_STORE_TEST_REQUIRE_STRACE") == "1":
        pytest.fail("strace is not installed")
    pytest.skip("strace is not installed")


def record(program: str, arguments: list[str], log: Path, enough: Callable[[], bool]) -> None:
    """Run a Python program under strace until there is enough of it, and kill it."""
    calls = "trace=pwrite64,write,fsync,fdatasync,ftruncate"
    command = [need_strace(), "-f", "-y", "-xx", "-s", "70000", "--seccomp-bpf", "-e", calls, "-o", str(log)]
    process = subprocess.Popen([*command, sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not enough():
            assert process.poll() is None, "the program has ended"
            assert time.monotonic() < deadline, "the program has done too little"
            time.sleep(0.05)
    finally:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        process.wait(30)  # then strace has written all of the log


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the kernel: a `write`, a `truncate`, or a `sync` that began or ended."""

    what: str
    path: str
    offset: int = 0
    data: bytes = b""


def calls_in(log: Path, directory: Path) -> list[Call]:
    """The calls on the files of a directory, in their order."""
    return list(_calls(log, str(directory)))


def _calls(log: Path, directory: str) -> Iterator[Call]:
    syncing: dict[bytes, str] = {}
    lengths: dict[str, int] = {}
    with log.open("rb") as lines:
        for line in lines:
            resumed = _RESUMED.match(line)
            if resumed and resumed[1] in syncing:
                yield Call("synced", syncing.pop(resumed[1]))
            call = _CALL.match(line)
            path = _bytes(call[3]).decode() if call else ""
            if call is None or not path.startswith(directory):
                continue
            name, rest = call[2], call[4]
            if name in (b"fsync", b"fdatasync"):
                yield Call("sync", path)
                if b"unfinished" in rest:
                    syncing[call[1]] = path
                else:
                    yield Call("synced", path)
            elif name == b"ftruncate":
                yield Call("truncate", path, int(re.split(rb"\D", rest)[0]))
            else:
                written = _STRING.match(rest)
                assert written is not None, line[:200]
                data, numbers = _bytes(written[1]), re.findall(rb"\d+", written[2])
                assert len(data) == int(numbers[0]), "strace has cut a write"
                offset = int(numbers[1]) if name == b"pwrite64" else lengths.get(path, 0)
                lengths[path] = offset + len(data)
                yield Call("write", path, offset, data)


def _bytes(text: bytes) -> bytes:
    return bytes.fromhex(text.replace(rb"\x", b"").decode())


class Disk:
    """The files of a directory as a disk has them while calls are made, from what was there before."""

    def __init__(self, before: dict[str, bytes], *, heeds_syncs: bool = True) -> None:
        """A disk that does not heed syncs loses what was synced too."""
        self._heeds_syncs = heeds_syncs
        self._synced = {path: bytearray(content) for path, content in before.items()}
        self._pending: dict[str, list[Call]] = {}
        self._syncing: dict[str, list[Call]] = {}

    def make(self, call: Call) -> None:
        """Make one call."""
        pending = self._pending.setdefault(call.path, [])
        if call.what == "sync":
            self._syncing[call.path] = list(pending)
        elif call.what != "synced":
            pending.append(call)
        elif self._heeds_syncs:
            for written in self._syncing.pop(call.path, []):
                pending.remove(written)
                _apply(self._synced.setdefault(call.path, bytearray()), written)

    def after_a_cut(self, chance: random.Random, kept: float) -> dict[str, bytes]:
        """What is there afterwards: of each write that was not synced, all, nothing, or a part of its sectors."""
        files = {path: bytearray(content) for path, content in self._synced.items()}
        for path, pending in self._pending.items():
            content = files.setdefault(path, bytearray())
            for call in pending:
                if chance.random() < kept:
                    _apply(content, call)
                elif 0 < kept < 1 and call.what == "write":
                    sectors = range(0, len(call.data), SECTOR)
                    for start in chance.sample(sectors, chance.randrange(len(sectors) + 1)):
                        _apply(content, Call("write", path, call.offset + start, call.data[start : start + SECTOR]))
        return {path: bytes(content) for path, content in files.items()}


def _apply(content: bytearray, call: Call) -> None:
    end = call.offset + len(call.data)
    if call.what == "truncate":
        del content[call.offset :]
    content.extend(bytes(max(0, end - len(content))))
    content[call.offset : end] = call.data if call.what == "write" else b""
