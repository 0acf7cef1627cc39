"""The doctor's checks of an SQLite file from outside, without opening it."""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from oauth_store.database.files import Mount, is_mounted_alone, mount_of
from oauth_store.doctor.finding import Finding, examined, ok, problem, warning

MIB = 1024 * 1024
LEAST_FREE = 16 * MIB
"""With less than this, the disk may be full within hours."""
SPARE_FREE = 64 * MIB
"""Room for the -wal, in addition to a second file as large as the first, for an upgrade or a backup."""
TRIED_BYTES = 64 * 1024

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
"""As named in /proc/self/mountinfo: SQLite's locks, or its shared memory, may not work there."""


def examine_files(path: Path) -> Iterator[Finding]:
    """Check the modes and owners of an existing file, its -wal and its -shm, and its directory, disk and mount."""
    path = Path(os.path.realpath(path))
    for check, examination in (
        ("file modes", _modes),
        ("file owner", _owners),
        ("directory", _directory),
        ("disk space", _space),
        ("file system", _file_system),
        ("mount", _mount),
    ):
        yield from examined(check, examination, path)


def _files(path: Path) -> dict[Path, os.stat_result]:
    """Return the status of a file, and of its -wal and -shm if they exist. Raises `OSError`."""
    files = {path: path.stat()}
    for beside in (Path(f"{path}-wal"), Path(f"{path}-shm")):
        try:
            files[beside] = beside.stat()
        except FileNotFoundError:  # SQLite makes and deletes them
            continue
    return files


def _modes(path: Path) -> Iterator[Finding]:
    modes = {file: stat.S_IMODE(status.st_mode) for file, status in _files(path).items()}
    shown = ", ".join(f"{file.name} {mode:04o}" for file, mode in modes.items())
    chmod = "run: chmod 600 " + " ".join(str(file) for file, mode in modes.items() if mode & 0o077)
    if any(mode & 0o022 for mode in modes.values()):
        yield problem("file modes", f"other users may write: {shown}", chmod)
    elif any(mode & 0o044 for mode in modes.values()):
        yield warning("file modes", f"other users may read: {shown}", chmod)
    else:
        yield ok("file modes", shown)


def _owners(path: Path) -> Iterator[Finding]:
    owners = {file: _user(status.st_uid) for file, status in _files(path).items()}
    if len(set(owners.values())) == 1:
        yield ok("file owner", owners[path])
        return
    yield problem(
        "file owner",
        ", ".join(f"{file.name} belongs to {owner}" for file, owner in owners.items()),
        f"another user's process has opened the file. Stop it, and run: chown {owners[path]} "
        + " ".join(map(str, owners)),
    )


def _directory(path: Path) -> Iterator[Finding]:
    owner, directory = path.stat().st_uid, path.parent
    status = directory.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield problem(
            "directory",
            f"any user may replace the files in {directory} ({mode:04o})",
            f"run: chmod o-w {directory}",
        )
    elif not _may_write(status, owner):
        yield problem(
            "directory",
            f"the file belongs to {_user(owner)}, who may not create its -wal and -shm in {directory} ({mode:04o}, "
            f"owned by {_user(status.st_uid)})",
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
    except KeyError:  # as in a container, where a user may have only a number
        return set()
    return {entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if entry.pw_name in group.gr_mem)}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _space(path: Path) -> Iterator[Finding]:
    size = sum(file.st_size for file in _files(path).values())
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    shown = f"{free // MIB:,} MiB free, the database takes {size / MIB:,.1f} MiB"
    if free < LEAST_FREE or (status.f_files and not status.f_favail):
        inodes = "" if free < LEAST_FREE else "; no inodes are left, so no file can be created"
        yield problem("disk space", shown + inodes, "make room now: on a full disk, clients get 503")
        return
    _try_to_write(path.parent)
    if free < size + SPARE_FREE:
        yield warning("disk space", shown, "make room: an upgrade or a backup needs as much space as the database")
    else:
        yield ok("disk space", shown)


def _try_to_write(directory: Path) -> None:
    """Write to an unnamed file. Raises `OSError` for what no number shows: a quota, a read-only disk."""
    try:
        with TemporaryFile(dir=directory) as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except PermissionError:  # this user may not write; the server's user may be able to
        return


def _file_system(path: Path) -> Iterator[Finding]:
    mount = mount_of(path)
    if mount is not None:  # None on anything but Linux
        yield file_system(mount)


def file_system(mount: Mount) -> Finding:
    """Check the mount that a file is on."""
    if mount.kind in NETWORK_FILE_SYSTEMS:
        return problem(
            "file system",
            f"{mount.point} is a network drive or a shared folder ({mount.kind}), where SQLite's locks may not work",
            "move the file to a local disk (see docs/moving.md), or use PostgreSQL",
        )
    return ok("file system", f"{mount.kind}, on {mount.point}")


def _mount(path: Path) -> Iterator[Finding]:
    if is_mounted_alone(path):
        yield warning(
            "mount",
            f"{path} is mounted alone: its -wal, which has the latest grants, stays in the container and is lost with "
            "it",
            "mount the directory of the file instead",
        )
