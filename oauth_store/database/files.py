"""An SQLite file as the system sees it: its kind, and the mount that it is on."""

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("oauth_store")

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


def mount_of(path: Path) -> Mount | None:
    """Return the mount that a path is on, or None if the system does not list its mounts. Raises `OSError`."""
    try:
        mountinfo = os.fsdecode(MOUNTS.read_bytes())
    except FileNotFoundError:
        return None
    return find_mount(Path(os.path.realpath(path)), mountinfo)


def find_mount(path: Path, mountinfo: str) -> Mount | None:
    """Find the mount of a resolved path in the text of /proc/self/mountinfo (proc(5)), or None."""
    found = None
    for line in mountinfo.splitlines():
        mounted, separator, file_system = line.partition(" - ")
        if not separator:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda escaped: chr(int(escaped[1], 8)), mounted.split()[4]))
        # of two mounts on one point, the later one is visible
        if path.is_relative_to(point) and (found is None or len(point.parts) >= len(found.point.parts)):
            found = Mount(point, file_system.split()[0])
    return found


def is_mounted_alone(path: Path) -> bool:
    """Return whether a file is a mount of its own, as `docker run -v /srv/oauth.db:/data/oauth.db` makes it.

    SQLite creates the -wal next to it, in the container: a new container has the file without its latest grants.
    """
    mount = mount_of(path)
    return mount is not None and mount.point == Path(os.path.realpath(path))


def warn_of_mounted_file(path: str) -> None:
    """Log a warning if a file is a mount of its own. Blocks while it reads /proc/self/mountinfo."""
    try:
        alone = is_mounted_alone(Path(path))
    except OSError:  # the file can be used, wherever it is
        return
    if alone:
        logger.warning(
            "%s is mounted alone: its -wal, which has the latest grants, stays in the container and is lost with it; "
            "mount the directory of the file instead",
            path,
        )
