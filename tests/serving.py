"""A real HTTP server in this process, on a port of its own."""

import asyncio
import datetime
import ipaddress
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.types import ASGIApp

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


@asynccontextmanager
async def serving(app: ASGIApp, port: int, **options: Any) -> AsyncIterator[str]:
    """Serve `app`, and yield the URL of its root. `options` are uvicorn's: with an `ssl_certfile`, over TLS."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none", **options)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.005)
    try:
        yield f"{'https' if config.is_ssl else 'http'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
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
