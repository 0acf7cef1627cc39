"""Processes of examples/server.py."""

from pathlib import Path

from examples.demo import SERVER
from examples.server import main
from tests.processes import Process
from tests.serving import free_port


class ExampleServer(Process):
    """A process of examples/server.py."""

    program = staticmethod(main)
    command = (str(SERVER),)

    def __init__(self, log: Path, database: str, **settings: str) -> None:
        port = free_port()
        super().__init__(self.program, log, port, {"PORT": str(port), "MCP_OAUTH_DB": database, **settings})
        self.url = f"http://127.0.0.1:{port}/mcp"
