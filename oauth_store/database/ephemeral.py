"""An SQLite file that its container or its machine does not keep."""

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from oauth_store.database.files import Mount, find_mount, is_mounted_alone, read_mounts
from oauth_store.errors import ConfigurationError

logger = logging.getLogger("oauth_store")

EPHEMERAL = "MCP_OAUTH_EPHEMERAL"

MEMORY = {"ramfs", "rootfs", "tmpfs"}
LAYERS = {"aufs", "fuse-overlayfs", "fuse.fuse-overlayfs", "overlay", "overlayfs"}
"""File systems that show a read-only one and keep the changes elsewhere."""

DOCKER, PODMAN = "/.dockerenv", "/run/.containerenv"
PLATFORMS = {
    "AWS_LAMBDA_FUNCTION_NAME": ("/tmp",),  # noqa: S108 (the only directory there that can be written)
    "DYNO": ("/", "/app", "/tmp"),  # noqa: S108 (Heroku; Dokku sets it too, and mounts volumes elsewhere)
    "ECS_CONTAINER_METADATA_URI_V4": ("/",),
    "FLY_MACHINE_ID": ("/",),
    "KUBERNETES_SERVICE_HOST": ("/",),
    "K_SERVICE": ("/",),  # Cloud Run
    "RAILWAY_REPLICA_ID": ("/",),  # `railway run` sets RAILWAY_ENVIRONMENT on the developer's machine too
    "RENDER_SERVICE_ID": ("/",),  # RENDER alone is a name that others may use
}
"""Variables that a platform sets in each container, and the mounts there that end with it, whatever their kind."""

ANONYMOUS_VOLUME = re.compile(r"/volumes/[0-9a-f]{64}/_data$")
EMPTY_DIR = "/kubernetes.io~empty-dir/"
PRIVATE_TMP = "/systemd-private-"
"""A directory that systemd makes for the /tmp of one unit, and deletes when the unit stops (systemd.exec(5))."""

_KEEP = (
    "keep it on a volume or a disk, for example one that is mounted on /data, and set MCP_OAUTH_DB=/data/oauth.db; "
    "where there is none, use PostgreSQL"
)


@dataclass(frozen=True, slots=True)
class Loss:
    """What becomes of a file, and how to keep it."""

    found: str
    advice: str


def is_intended() -> bool:
    """Return whether the owner accepts that the database is lost. The only place that reads MCP_OAUTH_EPHEMERAL.

    Raises `ConfigurationError` for a value that it cannot have.
    """
    value = os.environ.get(EPHEMERAL) or None
    if value not in ("1", None):
        raise ConfigurationError(f"{EPHEMERAL} is {value!r}; set it to 1, or remove it")
    return value is not None


def warn_of_loss(path: str) -> None:
    """Log one warning if a file, or the -wal next to it, is lost with its container. Blocks: it reads /proc.

    Raises `ConfigurationError` as `is_intended` does.
    """
    intended = is_intended()
    try:
        alone, loss = is_mounted_alone(Path(path)), loss_of(Path(path))
    except OSError:  # the file can be used, wherever it is
        return
    if alone:
        logger.warning(
            "%s is mounted alone: its -wal, which has the latest grants, stays in the container and is lost with it; "
            "mount the directory of the file instead",
            path,
        )
    elif loss is not None and not intended:
        logger.warning("%s; %s. To accept this, set %s=1", loss.found, loss.advice, EPHEMERAL)


def loss_of(path: Path) -> Loss | None:
    """Return how a file will be lost, or None if nothing shows that it will. Raises `OSError`."""
    mountinfo = read_mounts()
    if mountinfo is None:
        return None
    markers = [marker for marker in (DOCKER, PODMAN) if os.path.exists(marker)]
    return find_loss(Path(os.path.realpath(path)), mountinfo, os.environ, markers)


def find_loss(path: Path, mountinfo: str, environment: Mapping[str, str], markers: Collection[str]) -> Loss | None:
    """Find how the file at a resolved path will be lost, or None.

    `mountinfo` is the text of /proc/self/mountinfo, and `markers` are those of `DOCKER` and `PODMAN` that exist.
    """
    mount = find_mount(path, mountinfo)
    if mount is None:
        return None
    own = _own_mounts(mountinfo, environment, markers)
    if mount.kind in MEMORY:
        place, event, advice = "in memory", "after a restart", _KEEP
    elif EMPTY_DIR in mount.root:
        place, event = "in an emptyDir", "with the next pod"
        advice = f"mount a persistentVolumeClaim on {mount.point} instead, or use PostgreSQL"
    elif ANONYMOUS_VOLUME.search(mount.root):
        place, event = "on a volume without a name", "with the next container"
        advice = f"give the volume a name, as in: docker run -v wiki:{mount.point}"
    elif PRIVATE_TMP in mount.root:
        place, event, advice = "in the private /tmp of a systemd unit", "after a restart", _KEEP
    elif str(mount.point) in own or (own and mount.kind in LAYERS):
        place, event, advice = "in the container's own file system", "with the next container", _KEEP
    elif mount.kind in LAYERS and not _is_kept(mount, mountinfo):
        place, event, advice = "in a layer that is not kept", "after a restart or with the next container", _KEEP
    else:
        return None
    where = f"{mount.kind} on {mount.point}"
    return Loss(f"{path} is {place} ({where}): {event}, every client has to authorize again", advice)


def _own_mounts(mountinfo: str, environment: Mapping[str, str], markers: Collection[str]) -> set[str]:
    """Return where a container's own file systems are mounted: nowhere on a machine, nor in LXC, which keeps its root.

    A root that was exported from Docker has its marker too: in WSL, in LXC, in a virtual machine. Only in Docker is
    /etc/hostname a mount.
    """
    own = {point for name, points in PLATFORMS.items() if environment.get(name) for point in points}
    named = find_mount(Path("/etc/hostname"), mountinfo)
    in_docker = DOCKER in markers and named is not None and str(named.point) == "/etc/hostname"
    if in_docker or PODMAN in markers or environment.get("container") == "podman":  # a tmpfs on /run hides the marker
        own.add("/")
    return own


def _is_kept(layer: Mount, mountinfo: str) -> bool:
    """Return whether a layer's changes are on a disk that this process sees, as on OpenWrt. A container does not."""
    upper = re.search(r"(?:^|,)upperdir=(/[^,]*)", layer.options)
    disk = find_mount(Path(upper[1]), mountinfo) if upper else None
    return disk is not None and disk.kind not in MEMORY | LAYERS
