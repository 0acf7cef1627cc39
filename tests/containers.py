"""Containers as examples/deploy/Dockerfile describes them, without Docker: each in a mount namespace of its own.

Its root is an overlay over this machine's, with changes in memory, so that nothing is left of it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import wait_for_port

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
STOP_SECONDS = 10

LAYER = """
mount -t tmpfs -o mode=755 tmpfs "$WORK"
mkdir "$WORK/changes" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=/,upperdir=$WORK/changes,workdir=$WORK/work" overlay "$WORK/root"
"""
BASE = """
cd "$WORK/root"
printf 'root:x:0:0:root:/root:/bin/sh\n' >etc/passwd
printf 'root:x:0:\n' >etc/group
rm -rf app data
mount --rbind /proc proc
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 tmpfs tmp
for path in $PYTHONS; do  # the interpreter, and what is installed
    mkdir -p ".$path"
    mount --rbind "$path" ".$path"
    mount -o remount,bind,ro ".$path"
    while path=$(dirname "$path") && [ "$path" != / ]; do chmod o+x ".$path"; done
done
"""
DOCKER = """
touch .dockerenv etc/hostname
mount --bind etc/hostname etc/hostname
"""
VOLUME = """
if [ -z "$(ls -A "$VOLUME")" ]; then
    chown --reference=data "$VOLUME"
    chmod --reference=data "$VOLUME"
fi
mount --bind "$VOLUME" data
"""
SOCKET = """
touch "tmp/${SOCKET##*/}"
mount --bind "$SOCKET" "tmp/${SOCKET##*/}"
"""
READ_ONLY = """
mount -o remount,bind,ro "$WORK/root"
"""


def instructions(dockerfile: Path = DEPLOY / "Dockerfile") -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, and what stands behind them."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, value) for name, _, value in (line.partition(" ") for line in lines if line)]


def value(instruction: str) -> str:
    """What stands behind the one instruction of this name."""
    [found] = [value for name, value in instructions() if name == instruction]
    return found


def build() -> str:
    """The steps of the Dockerfile, but for the installation: what it installs, this environment has."""
    steps = []
    for name, step in instructions():
        if name == "RUN" and not step.startswith("pip install "):
            steps.append(f"chroot . sh -ec {shlex.quote(step)}")
        if name == "COPY":
            source, target = step.split()
            assert target == "."
            steps.append(f"mkdir -p .{value('WORKDIR')} && cp {DEPLOY / source} .{value('WORKDIR')}")
    return "\n".join(steps) + "\n"


def require_namespaces(directory: Path) -> None:
    """Skip where no mount namespace can be made."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", LAYER],
        env=os.environ | {"WORK": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")


class Container:
    """A process of the image, from its root to its user and command. The socket of a database server is in its /tmp."""

    def __init__(
        self,
        directory: Path,
        port: int,
        volume: Path | None = None,
        *,
        socket: Path | None = None,
        read_only: bool = True,
        **environment: str,
    ) -> None:
        directory.mkdir()
        self.log = directory / "log"
        self.port = port
        (directory / "mounts").mkdir()
        user, group = value("USER").split(":")
        command = [word.replace(f"--port {value('EXPOSE')} ", f"--port {port} ") for word in json.loads(value("CMD"))]
        words = ["chroot", f"{directory}/mounts/root", "setpriv", "--reuid", user, "--regid", group, "--clear-groups"]
        words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "env", "-i", "HOME=/app"]
        words += [f"PATH={Path(sys.executable).parent}:/usr/bin:/bin", *shlex.split(value("ENV"))]
        words += [f"{name}={text}" for name, text in environment.items()]
        words += ["sh", "-c", f'cd {value("WORKDIR")} && exec "$@"', "sh", *command]
        mounts = [VOLUME if volume else "", SOCKET if socket else "", READ_ONLY if read_only else ""]
        script = "".join([LAYER, BASE, build(), DOCKER, *mounts])
        paths = {"WORK": f"{directory}/mounts", "VOLUME": str(volume), "SOCKET": str(socket)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-ec", f"{script}\nexec {shlex.join(words)}"],
                env=os.environ | paths | {"PYTHONS": " ".join(sorted(pythons()))},
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        """Wait until it listens."""
        wait_for_port(self.process, self.port, self.log)

    def kill(self) -> None:
        """End it with SIGKILL; its root and its memory go with it."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)


def pythons() -> set[str]:
    """The directories of the interpreter, of what is installed, and of the package."""
    found = {Path(directory).resolve() for directory in (ROOT, sys.prefix, sys.base_prefix)}
    return {str(path) for path in found if not any(path != other and path.is_relative_to(other) for other in found)}
