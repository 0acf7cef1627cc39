"""Processes that start in a hundredth of a second: a server that has imported what they need forks them."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = ["tests.chaos", "tests.preload"]


def context() -> ForkServerContext:
    """Where processes come from that run a function of a module. There is one such server for all of a test run."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOADED)
    return forkserver


def fork(
    program: Callable[[], None],
    command: list[str],
    environment: Mapping[str, str],
    streams: list[Path],
    directory: Path | None = None,
    **rights: int | None,
) -> ForkServerProcess:
    """Start a program in a process of its own. `rights` are those of `become`."""
    arguments = program, command, environment, directory or Path.cwd(), streams
    process: ForkServerProcess = context().Process(target=become, args=arguments, kwargs=rights)
    process.start()
    return process


def become(
    program: Callable[[], None],
    command: list[str],
    environment: Mapping[str, str],
    directory: Path,
    streams: list[Path],
    *,
    umask: int | None = None,
    user: int | None = None,
) -> None:
    """In a forked process: be a program that was started anew, with these files as its standard streams.

    A terminal among them becomes its own: Ctrl-C there is for it.
    """
    os.setsid()
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, written, written), strict=True)):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115 (until it ends)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (the same)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 (the same)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = command
    if umask is not None:
        os.umask(umask)
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    try:
        program()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
