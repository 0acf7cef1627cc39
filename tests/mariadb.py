"""A MariaDB of a test's own, whose settings the test may change: the one that all tests share has to stay as it is."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.databases import administer_mariadb
from tests.serving import free_port, wait_for_port


@contextmanager
def mariadb_server(directory: Path, *options: str) -> Iterator[str]:
    """Run a server with these options. Yields the URL of its database `test`. Skips where MariaDB is not installed."""
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("no mariadbd here")
    user = ["--user=root"] if os.geteuid() == 0 else []
    data, log, port = directory / "data", directory / "mariadb.log", free_port()
    subprocess.run(
        ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", *user],
        check=True,
        capture_output=True,
    )
    command = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={directory / 'socket'}", f"--port={port}"]
    command += ["--bind-address=127.0.0.1", f"--log-error={log}", *user, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_port(server, port, log)
            yield f"mysql://root@127.0.0.1:{port}/test"
        finally:
            server.terminate()


@contextmanager
def default(server: str, variable: str, value: str) -> Iterator[None]:
    """Give a server's variable another value for new connections, and at the end the one that MariaDB comes with."""
    asyncio.run(administer_mariadb(server, f"SET GLOBAL {variable} = {value}"))
    try:
        yield
    finally:
        asyncio.run(administer_mariadb(server, f"SET GLOBAL {variable} = DEFAULT"))
