"""Processes of examples/server.py."""

import os
import socket
import time
from pathlib import Path

from examples.demo import SERVER, clean_environment
from examples.server import main
from tests.forks import fork
from tests.serving import free_port

SECONDS = 60


class ExampleServer:
    """A process of examples/server.py, on the same port at every start. Its log grows with each."""

    program = staticmethod(main)

    def __init__(self, log: Path, database: str, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self._log = log
        self._environment = {**clean_environment(), "PORT": str(self.port), "MCP_OAUTH_DB": database, **settings}

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        self._process = fork(self.program, [str(SERVER)], self._environment, [Path(os.devnull), self._log, self._log])
        deadline = time.monotonic() + SECONDS
        while not self._listens():
            assert self._process.is_alive(), self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()

    def restart(self) -> None:
        """Kill the process, and start another one on the same port."""
        self.kill()
        self.start()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
