"""An SQLite file as the system sees it: its kind, and the mount that it is on."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
"""The list of mounts that this process sees. Only Linux has it."""


def file_kind(mode: int) -> str:
    """Name the kind of file that a `st_mode` describes: "a file" is the only one that can hold a database."""
    for is_kind, kind in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISFIFO, "a pipe"),
    ):
        if is_kind(mode):
            return kind
    return "a device"


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    kind: str
    """Its file system, such as ext4."""
    root: str
    """The directory of that file system which is mounted, such as /var/lib/docker/volumes/wiki/_data."""
    options: str
    """Those of the file system, such as upperdir=... of an overlay."""


def read_mounts() -> str | None:
    """Return the text of /proc/self/mountinfo, or None if the system has none. Raises `OSError`."""
    try:
        return os.fsdecode(MOUNTS.read_bytes())
    except FileNotFoundError:
        return None


def mount_of(path: Path) -> Mount | None:
    """Return the mount that a path is on, or None if the system does not list its mounts. Raises `OSError`."""
    mountinfo = read_mounts()
    return None if mountinfo is None else find_mount(Path(os.path.realpath(path)), mountinfo)


def find_mount(path: Path, mountinfo: str) -> Mount | None:
    """Find the mount of a resolved path in the text of /proc/self/mountinfo (proc(5)), or None."""
    found = None
    for line in mountinfo.splitlines():
        mounted, _, behind = line.partition(" - ")
        fields, file_system = mounted.split(), behind.split()
        if len(fields) < 5 or not file_system:
            continue
        point = Path(_unescaped(fields[4]))
        # of two mounts on one point, the later one is visible
        if path.is_relative_to(point) and (found is None or len(point.parts) >= len(found.point.parts)):
            found = Mount(point, file_system[0], _unescaped(fields[3]), _unescaped(file_system[-1]))
    return found


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), field)


def is_mounted_alone(path: Path) -> bool:
    """Return whether a file is a mount of its own, as `docker run -v /srv/oauth.db:/data/oauth.db` makes it.

    SQLite creates the -wal next to it, in the container: a new container has the file without its latest grants.
    """
    mount = mount_of(path)
    return mount is not None and mount.point == Path(os.path.realpath(path))
