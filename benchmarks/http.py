"""Measure calls per second over HTTP, with server processes and a client process."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import IN_MEMORY, SQLITE
from benchmarks.server import IN_MEMORY_DATABASE
from benchmarks.timing import Measure, take_turns
from tests.serving import free_port

START_SECONDS = 60
CALLS, REFRESHES, FLOWS = "tools/call over HTTP", "refreshes over HTTP", "flows over HTTP"
WORKERS = "refreshes over HTTP, workers on one SQLite file"
ONE_WORKER, TWO_WORKERS = "one worker", "two workers"
_LOAD = str(Path(__file__).with_name("load.py"))


class Server(NamedTuple):
    """A server process."""

    port: int
    pid: int


def server(database: str) -> AbstractContextManager[Server]:
    """Run a server process on a database."""
    return serving("-m", "benchmarks.server", database)


@contextmanager
def serving(*program: str) -> Iterator[Server]:
    """Run a Python program whose last argument is the port that it listens on."""
    port = free_port()
    process = subprocess.Popen([sys.executable, *program, str(port)])
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(program)}")
            time.sleep(0.05)
        yield Server(port, process.pid)
    finally:
        process.terminate()
        process.wait()


async def load(kind: str, seconds: float, connections: int, *ports: int) -> tuple[float, float]:
    """Return what `benchmarks/load.py` prints: calls per second, and the client's share of a processor."""
    command = [sys.executable, _LOAD, kind, str(seconds), str(connections), *map(str, ports)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the client failed: {kind} at {connections}")
    rate, share = json.loads(output)
    return float(rate), float(share)


async def measure_http(databases: Mapping[str, str], *, rounds: int, seconds: float) -> tuple[list[Measure], float]:
    """Measure calls, refreshes and flows per second on each database and InMemoryOAuthProvider, and two workers.

    Also return the client's largest share of a processor in any round.
    """
    busiest = 0.0

    async def rate(kind: str, connections: int, *ports: int) -> float:
        nonlocal busiest
        found, share = await load(kind, seconds, connections, *ports)
        busiest = max(busiest, share)
        return found

    measures = []
    with contextlib.ExitStack() as stack:
        ports = {
            name: stack.enter_context(server(database)).port
            for name, database in {IN_MEMORY: IN_MEMORY_DATABASE, **databases}.items()
        }
        second = stack.enter_context(server(databases[SQLITE])).port
        for name, kind, connections in (
            (CALLS, "call", 1),
            (CALLS, "call", 16),
            (REFRESHES, "refresh", 1),
            (REFRESHES, "refresh", 16),
            (FLOWS, "flow", 1),
        ):
            turns = {who: partial(rate, kind, connections, port) for who, port in ports.items()}
            # FastMCP dominates a call, so the differences are a few percent
            more = 2 if kind == "call" else 1
            measures.append(await take_turns(Measure(name, "/s", connections), turns, more * rounds))
        workers = {
            ONE_WORKER: partial(rate, "refresh", 8, ports[SQLITE]),
            TWO_WORKERS: partial(rate, "refresh", 4, ports[SQLITE], second),
        }
        measures.append(await take_turns(Measure(WORKERS, "/s", 8), workers, rounds))
    return measures, busiest
