"""What the doctor sees of an SQLite file from outside: it looks at it and never opens it."""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from oauth_store.doctor.finding import Finding, ok, problem, warning

MIB = 1024 * 1024
LEAST_FREE = 16 * MIB
"""Less than this is a matter of hours."""
SPARE_FREE = 64 * MIB
"""For the -wal, beside a second file as large as the first: an upgrade, a backup."""

NETWORK_FILE_SYSTEMS = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "davfs",
    "fuse.glusterfs",
    "fuse.rclone",
    "fuse.s3fs",
    "fuse.sshfs",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
    "vboxsf",
    "virtiofs",
}
"""By their names in /proc/mounts: SQLite's locks, or the memory that its processes share, may not work there."""


def examine_files(path: Path) -> Iterator[Finding]:
    """Look at the modes and owners of a file that exists, of its -wal and -shm, and at what it stands on."""
    path = path.resolve()
    files = [file for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")) if file.exists()]
    yield from _modes(files)
    yield from _owners(files)
    yield from _directory(path.parent, files[0].stat().st_uid)
    yield from _space(path, sum(file.stat().st_size for file in files))
    mounts = Path("/proc/mounts")
    if mounts.exists():  # elsewhere than on Linux nothing tells
        yield from file_system(path, mounts.read_text())


def _modes(files: list[Path]) -> Iterator[Finding]:
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in files}
    shown = ", ".join(f"{file.name} {mode:04o}" for file, mode in modes.items())
    chmod = "run: chmod 600 " + " ".join(str(file) for file, mode in modes.items() if mode & 0o077)
    if any(mode & 0o022 for mode in modes.values()):
        yield problem("file modes", f"others than the owner may write: {shown}", chmod)
    elif any(mode & 0o044 for mode in modes.values()):
        yield warning("file modes", f"others than the owner may read: {shown}", chmod)
    else:
        yield ok("file modes", shown)


def _owners(files: list[Path]) -> Iterator[Finding]:
    owners = {file.name: _user(file.stat().st_uid) for file in files}
    if len(set(owners.values())) == 1:
        yield ok("file owner", next(iter(owners.values())))
        return
    yield problem(
        "file owner",
        ", ".join(f"{name} is {owner}'s" for name, owner in owners.items()),
        f"a process of another user has opened the file. Stop it, and run: chown {owners[files[0].name]} "
        + " ".join(map(str, files)),
    )


def _directory(directory: Path, owner: int) -> Iterator[Finding]:
    status = directory.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield problem(
            "directory",
            f"everyone may exchange the files in {directory} ({mode:04o})",
            f"run: chmod o-w {directory}",
        )
    elif not _may_write(status, owner):
        yield problem(
            "directory",
            f"the file is {_user(owner)}'s, who may not create its -wal and -shm in {directory} ({mode:04o}, "
            f"{_user(status.st_uid)}'s)",
            f"give the database a directory of its own, and run: chown {_user(owner)} DIRECTORY",
        )
    else:
        yield ok("directory", f"{directory} {mode:04o}")


def _may_write(directory: os.stat_result, user: int) -> bool:
    if user == 0:
        return True
    if directory.st_uid == user:
        return bool(directory.st_mode & stat.S_IWUSR)
    if directory.st_gid in _groups(user):
        return bool(directory.st_mode & stat.S_IWGRP)
    return bool(directory.st_mode & stat.S_IWOTH)


def _groups(user: int) -> set[int]:
    try:
        entry = pwd.getpwuid(user)
    except KeyError:  # as in a container, where a user may be a number alone
        return set()
    return {entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if entry.pw_name in group.gr_mem)}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _space(path: Path, size: int) -> Iterator[Finding]:
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    shown = f"{free // MIB:,} MiB free, the database takes {size / MIB:,.1f} MiB"
    if free < LEAST_FREE or (status.f_files and not status.f_favail):
        inodes = "" if free < LEAST_FREE else "; no file can be created (no inodes)"
        yield problem("disk space", shown + inodes, "make room now: a full disk answers clients with 503")
    elif free < size + SPARE_FREE:
        yield warning("disk space", shown, "make room: an upgrade or a backup needs as much as the database takes")
    else:
        yield ok("disk space", shown)


def file_system(path: Path, mounts: str) -> Iterator[Finding]:
    """Find the file system of a resolved path in the text of /proc/mounts."""
    point, kind = "", "unknown"
    for line in mounts.splitlines():
        fields = line.split()
        mounted = fields[1].replace(r"\040", " ")
        if len(mounted) >= len(point) and path.is_relative_to(mounted):  # of two on one point, the later one is seen
            point, kind = mounted, fields[2]
    if kind in NETWORK_FILE_SYSTEMS:
        yield problem(
            "file system",
            f"{point} is a network drive or a shared folder ({kind}), where SQLite's locks may not work",
            "move the file to a local disk (see docs/moving.md), or use PostgreSQL",
        )
    else:
        yield ok("file system", f"{kind}, on {point or '/'}")
