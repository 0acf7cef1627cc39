"""A real HTTP server in this process, on a port of its own."""

import asyncio
import datetime
import ipaddress
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.types import ASGIApp

AUTHORITIES = "SSL_CERT_FILE"
"""The variable that names the file of the authorities that OpenSSL trusts."""

KEPT_PORTS = 100
_kept: deque[socket.socket] = deque()


def free_port() -> int:
    """A port that nobody listens on, and that nobody is given until this process has asked for KEPT_PORTS others.

    A socket that is bound, but does not listen, keeps it: Linux then lets only those listen there who name the port,
    with SO_REUSEADDR as all servers have it. Elsewhere that would be refused, and the port is free, as it says.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = int(kept.getsockname()[1])
    _kept.append(kept)
    while len(_kept) > (KEPT_PORTS if sys.platform == "linux" else 0):
        _kept.popleft().close()
    return port


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 60) -> None:
    """Wait until a server process listens. Fails with its log where it ends before, or takes longer. Blocks."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail(log.read_text())


class HTTPServer(uvicorn.Server):
    """Stops at once, where uvicorn looks ten times a second whether it is to stop, and then waits for a tenth more."""

    def __init__(self, app: Any, port: int, **options: Any) -> None:
        # By default uvicorn closes a connection that is idle for 5 seconds, perhaps just as a client sends on it.
        options = {"timeout_keep_alive": 300, **options}
        super().__init__(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none", **options))
        self._stopping = asyncio.Event()

    async def start(self) -> asyncio.Task[None]:
        """Listen. Return the task that serves, which ends after `stop()`."""
        task = asyncio.create_task(self.serve())
        while not self.started:
            if task.done():
                task.result()
            await asyncio.sleep(0.001)
        return task

    def stop(self) -> None:
        """Let the requests that are under way come to their end, and then the server."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Wait for `stop()`; once a second, see to the Date header."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what listens, then the connections, then the application, as uvicorn does."""
        for listening in self.servers:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.001)
        await self.lifespan.shutdown()


@asynccontextmanager
async def serving(app: ASGIApp, port: int, **options: Any) -> AsyncIterator[str]:
    """Serve `app`, and yield the URL of its root. `options` are uvicorn's: with an `ssl_certfile`, over TLS."""
    server = HTTPServer(app, port, **options)
    task = await server.start()
    try:
        yield f"{'https' if server.config.is_ssl else 'http'}://127.0.0.1:{port}"
    finally:
        server.stop()
        await task


def self_signed(host: str) -> bytes:
    """A certificate of a host, by its name or IPv4 address, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    is_address = host.replace(".", "").isdigit()
    alternative = x509.IPAddress(ipaddress.ip_address(host)) if is_address else x509.DNSName(host)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
