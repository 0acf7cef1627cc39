"""What /proc/self/mountinfo reads in containers, on platforms and on machines."""

import os
from pathlib import Path

import pytest

from oauth_store.database.files import mount_of

ID = "c1a5e4b7" * 8
"""Of a container, a layer or a volume without a name."""
POD = "/var/lib/kubelet/pods/0a5f7c62-93c2-4d9c-8a3e-3f1d6a2b9e10"

_PSEUDO = """\
1402 1400 0:77 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
1403 1400 0:78 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64
1404 1403 0:79 / /dev/pts rw,nosuid,noexec,relatime - devpts devpts rw,gid=5,mode=620,ptmxmode=666
1405 1400 0:80 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro
1406 1403 0:81 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k,inode64
"""
_ETC = f"""\
1407 1400 8:1 /var/lib/docker/containers/{ID}/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/sda1 rw
1408 1400 8:1 /var/lib/docker/containers/{ID}/hostname /etc/hostname rw,relatime - ext4 /dev/sda1 rw
1409 1400 8:1 /var/lib/docker/containers/{ID}/hosts /etc/hosts rw,relatime - ext4 /dev/sda1 rw
"""


def _overlay(directory: str) -> str:
    return (
        f"1400 1200 0:76 / / rw,relatime master:310 - overlay overlay rw,lowerdir={directory}/l/QX:{directory}/l/7K,"
        f"upperdir={directory}/{ID}/diff,workdir={directory}/{ID}/work\n"
    )


# Docker

DOCKER = _overlay("/var/lib/docker/overlay2") + _PSEUDO + _ETC
DOCKER_LONG = (  # with so many layers, Docker names them from their directory
    f"1400 1200 0:76 / / rw,relatime - overlay overlay rw,lowerdir=l/QX:l/7K,upperdir={ID}/diff,workdir={ID}/work\n"
    + _PSEUDO
    + _ETC
)
DOCKER_VFS = f"1400 1200 8:1 /var/lib/docker/vfs/dir/{ID} / rw,relatime - ext4 /dev/sda1 rw\n" + _PSEUDO + _ETC
DOCKER_BTRFS = (
    f"1400 1200 0:31 /@/var/lib/docker/btrfs/subvolumes/{ID} / rw,relatime - btrfs /dev/sda2 rw,subvolid=291\n"
    + _PSEUDO
    + _ETC
)
DOCKER_ZFS = f"1400 1200 0:52 / / rw,noatime - zfs rpool/docker/{ID} rw,xattr,noacl\n" + _PSEUDO + _ETC
DOCKER_READ_ONLY = DOCKER.replace("/ / rw,relatime master", "/ / ro,relatime master")
NAMED_VOLUME = "1410 1400 8:1 /var/lib/docker/volumes/wiki/_data /data rw,relatime master:1 - ext4 /dev/sda1 rw\n"
LONG_NAMED_VOLUME = NAMED_VOLUME.replace("wiki", f"wiki-{ID}")
DESKTOP_VOLUME = "1410 1400 254:1 /docker/volumes/wiki/_data /data rw,relatime master:26 - ext4 /dev/vda1 rw,discard\n"
ANONYMOUS_VOLUME = NAMED_VOLUME.replace("wiki", ID)
ANONYMOUS_VOLUME_ON_BTRFS = (
    f"1410 1400 0:31 /@/var/lib/docker/volumes/{ID}/_data /data rw,relatime - btrfs /dev/sda2 rw,subvol=/@\n"
)
BIND_MOUNT = "1410 1400 8:1 /srv/wiki /data rw,relatime - ext4 /dev/sda1 rw\n"
DESKTOP_BIND_MOUNT = (
    "1410 1400 0:44 /Users/ada/wiki /data rw,nosuid,nodev,relatime - fakeowner /run/host_mark/Users rw\n"
)
TMPFS_MOUNT = "1410 1400 0:90 / /data rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,size=65536k\n"
INSIDE_KIND = f"1410 1400 8:1 /var/lib/docker/volumes/{ID}/_data/local-path/pvc-7 /data rw - ext4 /dev/sda1 rw\n"

# Podman, with no root of its own

_PODMAN = "/home/ada/.local/share/containers/storage"
PODMAN = _overlay(f"{_PODMAN}/overlay") + _PSEUDO
PODMAN_FUSE = "1400 1200 0:76 / / rw,nodev - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=0,group_id=0\n" + _PSEUDO
PODMAN_VOLUME = f"1410 1400 8:3 {_PODMAN}/volumes/wiki/_data /data rw,nosuid,nodev,relatime - ext4 /dev/sda3 rw\n"
PODMAN_ANONYMOUS = PODMAN_VOLUME.replace("wiki", ID)
TOOLBOX_HOME = "1410 1400 0:33 /home /var/home rw,relatime master:91 - btrfs /dev/nvme0n1p3 rw,subvol=/home\n"

# containerd, and Kubernetes, with containerd

CONTAINERD = _overlay("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots") + _PSEUDO
POD_FILES = (
    f"1411 1400 8:1 {POD}/etc-hosts /etc/hosts rw,relatime - ext4 /dev/sda1 rw\n"
    "1412 1400 0:95 / /run/secrets/kubernetes.io/serviceaccount ro,relatime - tmpfs tmpfs rw,size=131072k\n"
)
EMPTY_DIR = f"1413 1400 8:1 {POD}/volumes/kubernetes.io~empty-dir/data /data rw,relatime - ext4 /dev/sda1 rw\n"
EMPTY_DIR_SUBPATH = EMPTY_DIR.replace("empty-dir/data", "empty-dir/data/wiki")
EMPTY_DIR_IN_MEMORY = "1413 1400 0:96 / /data rw,relatime - tmpfs tmpfs rw,size=131072k\n"
CLAIM = "1413 1400 259:4 / /data rw,relatime - ext4 /dev/nvme2n1 rw\n"
CLAIM_ON_NODE = "1413 1400 8:1 /var/lib/rancher/k3s/storage/pvc-7f_wiki_data /data rw,relatime - ext4 /dev/sda1 rw\n"
GVISOR = "1 0 0:1 / / rw - 9p none rw,trans=fd,rfdno=4,wfdno=4\n2 1 0:2 / /proc rw - proc none rw\n"

# Platforms

FLY = "28 1 0:24 / / rw,relatime - overlay overlay rw,lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work\n"
FLY_BEFORE = "28 1 254:16 / / rw,relatime - ext4 /dev/vdb rw\n30 28 0:20 / /run rw,nosuid,nodev - tmpfs run rw\n"
FLY_VOLUME = "31 28 254:32 / /data rw,relatime - ext4 /dev/vdc rw\n"
HEROKU_APP = "40 28 254:48 / /app rw,nosuid,relatime - ext4 /dev/vdd rw\n"
LAMBDA = (
    "28 1 0:24 / / ro,nosuid,nodev,relatime - overlay overlay rw,lowerdir=/tmp/es1:/tmp/es2\n"
    "29 28 254:16 / /tmp rw,relatime - ext4 /dev/vdb rw\n"
    "30 28 0:25 / /mnt/efs rw,relatime - nfs4 127.0.0.1:/ rw,vers=4.1\n"
)

# Containers that are machines

LXC = """\
900 850 0:61 / / rw,noatime - zfs rpool/data/subvol-101-disk-0 rw,xattr,posixacl,casesensitive
901 900 0:62 / /dev rw,relatime - tmpfs none rw,size=492k,mode=755,uid=100000,gid=100000,inode64
902 900 0:63 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
903 902 0:40 /proc/cpuinfo /proc/cpuinfo rw,nosuid,nodev,relatime - fuse.lxcfs lxcfs rw,user_id=0,group_id=0
904 900 0:64 / /run rw,nosuid,nodev - tmpfs tmpfs rw,mode=755
"""
NSPAWN = """\
900 850 8:2 /var/lib/machines/wiki / rw,relatime shared:400 - ext4 /dev/sda2 rw
901 900 0:70 / /tmp rw,nosuid,nodev shared:401 - tmpfs tmpfs rw,nr_inodes=1048576
902 900 0:24 /systemd/resolve/stub-resolv.conf /etc/resolv.conf ro,nosuid,nodev - tmpfs tmpfs rw,mode=755
"""

# Machines

DEBIAN = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
23 22 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
24 22 0:23 / /run rw,nosuid,nodev,noexec,relatime shared:5 - tmpfs tmpfs rw,size=814820k,mode=755
25 22 0:25 / /tmp rw,nosuid,nodev shared:6 - tmpfs tmpfs rw,nr_inodes=1048576,inode64
26 22 8:2 / /srv rw,relatime shared:9 - xfs /dev/sda2 rw
"""
PRIVATE_TMP = DEBIAN + (
    "70 22 8:1 /tmp/systemd-private-5b0f6f2c8d0e4b7e9a3c1d2e4f5a6b7c-wiki.service-Qh3kLm/tmp /tmp rw,relatime "
    "shared:80 master:1 - ext4 /dev/sda1 rw\n"
)
DOCKER_HOST = (
    DEBIAN
    + f"60 22 0:50 / /var/lib/docker/overlay2/{ID}/merged rw,relatime shared:70 - overlay overlay rw,lowerdir="
    + f"/var/lib/docker/overlay2/l/QX,upperdir=/var/lib/docker/overlay2/{ID}/diff,workdir=/w\n"
)
WSL = """\
95 80 0:26 / /mnt/wsl rw,relatime shared:1 - tmpfs none rw
96 97 0:28 / /usr/lib/wsl/drivers ro,nosuid,nodev,noatime - 9p drivers ro,aname=drivers;fmask=222,trans=fd,rfd=8
97 80 8:48 / / rw,relatime - ext4 /dev/sdd rw,discard,errors=remount-ro,data=ordered
98 97 0:33 / /mnt/wslg rw,relatime shared:2 - tmpfs none rw
99 97 0:2 /init /init ro - rootfs rootfs rw,size=8101876k,nr_inodes=2025469
100 97 0:36 / /run rw,nosuid,nodev - tmpfs none rw,mode=755
101 97 0:70 / /mnt/c rw,noatime - 9p C:\\134 rw,dirsync,aname=drvfs;path=C:\\;uid=1000;gid=1000,trans=fd,rfd=5
"""
FIRECRACKER = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n25 27 0:23 / /dev/shm rw - tmpfs tmpfs rw\n"
LIVE = """\
27 1 0:25 / / rw,noatime - overlay overlay rw,lowerdir=/run/live/rootfs/fs.squashfs/,upperdir=/run/live/overlay/rw
28 27 0:24 / /run rw,nosuid,nodev - tmpfs tmpfs rw,mode=755
29 28 0:26 / /run/live/overlay rw,noatime - tmpfs tmpfs rw,mode=755
30 28 8:18 / /run/live/persistence/sdb2 rw,noatime - ext4 /dev/sdb2 rw
31 27 8:18 /home /home rw,noatime - ext4 /dev/sdb2 rw
"""
LIVE_KEPT = LIVE.replace("upperdir=/run/live/overlay/rw", "upperdir=/run/live/persistence/sdb2/rw")
OPENWRT = """\
12 1 31:5 / /rom ro,relatime - squashfs /dev/root ro
17 1 0:14 / /overlay rw,noatime - ubifs /dev/ubi0_1 rw,assert=read-only
18 1 0:17 / / rw,noatime - overlay overlayfs:/overlay rw,lowerdir=/,upperdir=/overlay/upper,workdir=/overlay/work
19 18 0:15 / /tmp rw,nosuid,nodev,noatime - tmpfs tmpfs rw
"""


def memory_directory() -> Path:
    """A directory in memory, of this process. Skips where there is none."""
    shared = Path("/dev/shm")
    mount = mount_of(shared)
    if mount is None or mount.kind != "tmpfs":
        pytest.skip("/dev/shm is not in memory here")
    directory = shared / f"oauth_store_test_{os.getpid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
