"""A MariaDB Galera cluster: three nodes, each of which takes writes."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import asyncmy  # noqa: F401  (it reads its version from a file, which must not happen in an event loop)
import pytest

from tests.databases import postgres_directory
from tests.serving import free_port, wait_for_port

NODES = 3
SECONDS = 60
USER = "mysql"
PROVIDERS = ("/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so", "/usr/lib/libgalera_smm.so")


def need_galera() -> str:
    """The library that makes a cluster of MariaDB servers. Without it the test is skipped."""
    found = next(filter(os.path.exists, PROVIDERS), None)
    if found is None or shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("galera-4 is not installed")
    return found


class Node:
    """One of the servers, with a directory and ports of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.group_port = free_port(), free_port()
        self._state_port, self._copy_port = free_port(), free_port()

    @property
    def url(self) -> str:
        """The URL of its database `test`."""
        return f"mysql://root@127.0.0.1:{self.port}/test"

    @contextmanager
    def running(self, *options: str, name: str = "alone") -> Iterator[None]:
        """Run the server, and end it cleanly."""
        log = self.directory / f"{name}.log"
        command = ["mariadbd", "--no-defaults", f"--datadir={self.directory / 'data'}", f"--port={self.port}"]
        command += [f"--socket={self.directory / 'socket'}", "--bind-address=127.0.0.1", f"--log-error={log}"]
        command += ["--innodb-flush-log-at-trx-commit=2", "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2"]
        with subprocess.Popen(
            [*command, *_as_user(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            try:
                wait_for_port(server, self.port, log)
                yield
            finally:
                server.terminate()

    def in_a_cluster(self, library: str, nodes: "list[Node]") -> list[str]:
        """The options of a member."""
        others = ",".join(f"127.0.0.1:{node.group_port}" for node in nodes)
        provider = f"gmcast.listen_addr=tcp://127.0.0.1:{self.group_port};ist.recv_addr=127.0.0.1:{self._state_port}"
        return [
            "--wsrep-on=ON",
            f"--wsrep-provider={library}",
            f"--wsrep-cluster-address=gcomm://{others}",
            f"--wsrep-provider-options={provider}",
            "--wsrep-node-address=127.0.0.1",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address=127.0.0.1:{self._copy_port}",
        ]


@contextmanager
def galera() -> Iterator[list[str]]:
    """Run three nodes. Yields a URL of each."""
    library = need_galera()
    with postgres_directory() as directory, ExitStack() as stack:
        nodes = [Node(directory / str(number)) for number in range(NODES)]
        first = nodes[0]
        first.directory.mkdir()
        _give(directory)
        _give(first.directory)
        data = f"--datadir={first.directory / 'data'}"
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", data, "--auth-root-authentication-method=normal", *_as_user()],
            check=True,
            capture_output=True,
        )
        # Each begins with the same files, so that none has to copy them from another one
        with first.running(*first.in_a_cluster(library, nodes), "--wsrep-new-cluster", name="seed"):
            _until_ready(first, 1)
        for node in nodes[1:]:
            shutil.copytree(first.directory, node.directory)
            for path in (node.directory, *node.directory.rglob("*")):
                _give(path)
        stack.enter_context(first.running(*first.in_a_cluster(library, nodes), "--wsrep-new-cluster"))
        _until_ready(first, 1)
        for size, node in enumerate(nodes[1:], start=2):
            stack.enter_context(node.running(*node.in_a_cluster(library, nodes)))
            _until_ready(node, size)
        yield [node.url for node in nodes]


def _as_user() -> list[str]:
    """The options of a server that root starts: the program that copies files between nodes gives up root's rights."""
    return [f"--user={USER}"] if os.geteuid() == 0 else []


def _give(path: Path) -> None:
    if os.geteuid() == 0:
        shutil.chown(path, USER, USER)


def _until_ready(node: Node, size: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        status = _status(node)
        if status.get("wsrep_ready") == "ON" and status.get("wsrep_cluster_size") == str(size):
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


def _status(node: Node) -> dict[str, str]:
    """What a node says of itself; nothing while it is no member yet, and refuses everything."""
    command = ["mariadb", "--no-defaults", "--host=127.0.0.1", f"--port={node.port}", "--user=root", "--skip-ssl"]
    command += ["--batch", "--skip-column-names", "--execute=SHOW STATUS LIKE 'wsrep_%'"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)
