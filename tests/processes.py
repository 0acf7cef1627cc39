"""Servers in processes of their own, which a test kills and starts again."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.demo import clean_environment
from tests.forks import fork

SECONDS = 60


class Process:
    """A process of a server, on the same port at every start. Its log grows with each."""

    command: Sequence[str] = ("serve",)

    def __init__(self, serve: Callable[[], None], log: Path, port: int, environment: Mapping[str, str]) -> None:
        """`serve` runs in the process. TEST_PORT is the port."""
        self.port = port
        self._serve = serve
        self._log = log
        self._environment = {**clean_environment(), **environment, "TEST_PORT": str(port)}

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = fork(self._serve, [*self.command], self._environment, [Path(os.devnull), self._log, self._log])
        deadline = time.monotonic() + SECONDS
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", self.port)):
                assert self._process.is_alive(), self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()

    def restart(self) -> None:
        """Kill it, and start it again."""
        self.kill()
        self.start()
