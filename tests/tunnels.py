"""A network between a client and a server that forgets connections, as a NAT or a firewall does: nothing comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sqlalchemy.engine import make_url

PORTS = {"postgresql": 5432, "mysql": 3306}


class Tunnel:
    """Passes on what comes in either direction, until `forget()`; connections that are made later work."""

    def __init__(self, url: str) -> None:
        """Lead to the server of a database, at its port, or at the socket in its directory."""
        self._url = make_url(url)
        self._remembered: set[object] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """Those that are open and not forgotten."""
        return len(self._remembered)

    def forget(self) -> None:
        """Pass on nothing more of the connections that are open, in either direction, and close none."""
        self._remembered.clear()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side closes it."""
        port = self._url.port or PORTS[self._url.get_backend_name()]
        if "host" in self._url.query:
            connecting = asyncio.open_unix_connection(Path(str(self._url.query["host"])) / f".s.PGSQL.{port}")
        else:
            connecting = asyncio.open_connection(self._url.host, port)
        server_reader, server_writer = await connecting
        connection = object()
        self._remembered.add(connection)
        try:
            await asyncio.gather(
                self._pass_on(connection, reader, server_writer), self._pass_on(connection, server_reader, writer)
            )
        finally:
            self._remembered.discard(connection)

    async def _pass_on(self, connection: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if connection in self._remembered:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@asynccontextmanager
async def tunnel_to(url: str) -> AsyncIterator[tuple[Tunnel, str]]:
    """Yield a tunnel to the server of a database, and the database's URL through it."""
    tunnel = Tunnel(url)
    async with await asyncio.start_server(tunnel.accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        through = make_url(url).difference_update_query(["host"]).set(host="127.0.0.1", port=port)
        yield tunnel, through.render_as_string(hide_password=False)
