"""Measure calls per second over HTTP, with server processes and a client process."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.contenders import IN_MEMORY, SQLITE
from benchmarks.server import IN_MEMORY_DATABASE
from benchmarks.timing import Measure, take_turns
from tests.serving import free_port

START_SECONDS = 60
CALLS, REFRESHES, FLOWS = "tools/call over HTTP", "refreshes over HTTP", "flows over HTTP"
WORKERS = "refreshes over HTTP, workers on one SQLite file"
ONE_WORKER, TWO_WORKERS = "one worker", "two workers"
_LOAD = str(Path(__file__).with_name("load.py"))


@contextmanager
def server(database: str) -> Iterator[int]:
    """Run a server process on a database, and yield its port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.server", database, str(port)])
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server on {database} did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


async def measure_http(databases: Mapping[str, str], *, rounds: int, seconds: float) -> tuple[list[Measure], float]:
    """Measure calls, refreshes and flows per second on each database and InMemoryOAuthProvider, and two workers.

    Also return the client's largest share of a processor in any round.
    """
    busiest = 0.0

    async def load(kind: str, connections: int, *ports: int) -> float:
        nonlocal busiest
        command = [sys.executable, _LOAD, kind, str(seconds), str(connections), *map(str, ports)]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"the client failed: {kind} at {connections}")
        rate, share = json.loads(output)
        busiest = max(busiest, share)
        return float(rate)

    measures = []
    with contextlib.ExitStack() as stack:
        ports = {
            name: stack.enter_context(server(database))
            for name, database in {IN_MEMORY: IN_MEMORY_DATABASE, **databases}.items()
        }
        second = stack.enter_context(server(databases[SQLITE]))
        for name, kind, connections in (
            (CALLS, "call", 1),
            (CALLS, "call", 16),
            (REFRESHES, "refresh", 1),
            (REFRESHES, "refresh", 16),
            (FLOWS, "flow", 1),
        ):
            turns = {who: partial(load, kind, connections, port) for who, port in ports.items()}
            # FastMCP dominates a call, so the differences are a few percent
            more = 2 if kind == "call" else 1
            measures.append(await take_turns(Measure(name, "/s", connections), turns, more * rounds))
        workers = {
            ONE_WORKER: partial(load, "refresh", 8, ports[SQLITE]),
            TWO_WORKERS: partial(load, "refresh", 4, ports[SQLITE], second),
        }
        measures.append(await take_turns(Measure(WORKERS, "/s", 8), workers, rounds))
    return measures, busiest
