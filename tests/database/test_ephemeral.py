"""The warning for a file that its container, or its machine, does not keep."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oauth_store import AutoApproval, ConfigurationError, SQLAlchemyOAuthProvider
from oauth_store.database import files
from oauth_store.database.ephemeral import DOCKER, EPHEMERAL, PODMAN, find_loss
from oauth_store.database.schema import upgrade
from tests import mounts
from tests.commands import run, run_json
from tests.doctors import mounted
from tests.steps import BASE_URL

NOTHING: dict[str, str] = {}
IN_KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
IN_FLY = {"FLY_MACHINE_ID": "148e21ea7d4389"}
IN_HEROKU = {"DYNO": "web.1"}
IN_LAMBDA = {"AWS_LAMBDA_FUNCTION_NAME": "wiki"}
MEMORY, OWN, UNNAMED = "in memory", "in the container's own file system", "on a volume without a name"
EMPTY_DIR, LAYER = "in an emptyDir", "in a layer that is not kept"
PRIVATE = "in the private /tmp of a systemd unit"

LOST = {
    "Docker": (mounts.DOCKER, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, with many layers": (mounts.DOCKER_LONG, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, vfs": (mounts.DOCKER_VFS, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, btrfs": (mounts.DOCKER_BTRFS, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, zfs": (mounts.DOCKER_ZFS, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, next to a volume": (mounts.DOCKER + mounts.NAMED_VOLUME, NOTHING, [DOCKER], "/app/oauth.db", OWN),
    "Docker, a volume without a name": (
        mounts.DOCKER + mounts.ANONYMOUS_VOLUME,
        NOTHING,
        [DOCKER],
        "/data/oauth.db",
        UNNAMED,
    ),
    "Docker, the same on btrfs": (
        mounts.DOCKER_BTRFS + mounts.ANONYMOUS_VOLUME_ON_BTRFS,
        NOTHING,
        [DOCKER],
        "/data/oauth.db",
        UNNAMED,
    ),
    "Docker, a tmpfs": (mounts.DOCKER_READ_ONLY + mounts.TMPFS_MOUNT, NOTHING, [DOCKER], "/data/oauth.db", MEMORY),
    "Podman": (mounts.PODMAN, NOTHING, [PODMAN], "/app/oauth.db", OWN),
    "Podman, fuse-overlayfs": (mounts.PODMAN_FUSE, NOTHING, [PODMAN], "/app/oauth.db", OWN),
    "Podman, vfs, with a tmpfs on /run": (mounts.DOCKER_VFS, {"container": "podman"}, [], "/app/oauth.db", OWN),
    "Podman, a volume without a name": (
        mounts.PODMAN + mounts.PODMAN_ANONYMOUS,
        NOTHING,
        [PODMAN],
        "/data/oauth.db",
        UNNAMED,
    ),
    "containerd": (mounts.CONTAINERD, NOTHING, [], "/app/oauth.db", LAYER),
    "Kubernetes": (mounts.CONTAINERD + mounts.POD_FILES, IN_KUBERNETES, [], "/app/oauth.db", OWN),
    "Kubernetes, gVisor": (mounts.GVISOR, IN_KUBERNETES, [], "/app/oauth.db", OWN),
    "Kubernetes, an emptyDir": (mounts.CONTAINERD + mounts.EMPTY_DIR, IN_KUBERNETES, [], "/data/oauth.db", EMPTY_DIR),
    "Kubernetes, a part of an emptyDir": (
        mounts.CONTAINERD + mounts.EMPTY_DIR_SUBPATH,
        IN_KUBERNETES,
        [],
        "/data/oauth.db",
        EMPTY_DIR,
    ),
    "Kubernetes, an emptyDir in memory": (
        mounts.CONTAINERD + mounts.EMPTY_DIR_IN_MEMORY,
        IN_KUBERNETES,
        [],
        "/data/oauth.db",
        MEMORY,
    ),
    "Fly": (mounts.FLY, IN_FLY, [], "/app/oauth.db", OWN),
    "Fly, as it was": (mounts.FLY_BEFORE, IN_FLY, [], "/app/oauth.db", OWN),
    "Fly, next to a volume": (mounts.FLY + mounts.FLY_VOLUME, IN_FLY, [], "/app/oauth.db", OWN),
    "Render": (mounts.GVISOR, {"RENDER_SERVICE_ID": "srv-1"}, [], "/app/oauth.db", OWN),
    "Railway": (mounts.GVISOR, {"RAILWAY_REPLICA_ID": "r-1"}, [], "/app/oauth.db", OWN),
    "Cloud Run": (mounts.GVISOR, {"K_SERVICE": "wiki"}, [], "/app/oauth.db", OWN),
    "Fargate": (mounts.FLY_BEFORE, {"ECS_CONTAINER_METADATA_URI_V4": "http://x"}, [], "/app/oauth.db", OWN),
    "Heroku": (mounts.FLY_BEFORE + mounts.HEROKU_APP, IN_HEROKU, [], "/app/oauth.db", OWN),
    "Lambda": (mounts.LAMBDA, IN_LAMBDA, [], "/tmp/oauth.db", OWN),
    "Debian, /tmp in memory": (mounts.DEBIAN, NOTHING, [], "/tmp/oauth.db", MEMORY),
    "a unit with PrivateTmp=true": (mounts.PRIVATE_TMP, NOTHING, [], "/tmp/oauth.db", PRIVATE),
    "nspawn, /tmp in memory": (mounts.NSPAWN, NOTHING, [], "/tmp/oauth.db", MEMORY),
    "OpenWrt, /tmp in memory": (mounts.OPENWRT, NOTHING, [], "/tmp/oauth.db", MEMORY),
    "a live system": (mounts.LIVE, NOTHING, [], "/srv/oauth.db", LAYER),
}
KEPT = {
    "Docker, a volume": (mounts.DOCKER + mounts.NAMED_VOLUME, NOTHING, [DOCKER], "/data/oauth.db"),
    "Docker, a volume, and a root that is read-only": (
        mounts.DOCKER_READ_ONLY + mounts.NAMED_VOLUME,
        NOTHING,
        [DOCKER],
        "/data/oauth.db",
    ),
    "Docker, a volume with a long name": (
        mounts.DOCKER + mounts.LONG_NAMED_VOLUME,
        NOTHING,
        [DOCKER],
        "/data/oauth.db",
    ),
    "Docker Desktop, a volume": (mounts.DOCKER + mounts.DESKTOP_VOLUME, NOTHING, [DOCKER], "/data/oauth.db"),
    "Docker, a directory of the host": (mounts.DOCKER + mounts.BIND_MOUNT, NOTHING, [DOCKER], "/data/oauth.db"),
    "Docker Desktop, a directory of the host": (
        mounts.DOCKER + mounts.DESKTOP_BIND_MOUNT,
        NOTHING,
        [DOCKER],
        "/data/oauth.db",
    ),
    "Dokku, which has Heroku's variable": (mounts.DOCKER + mounts.BIND_MOUNT, IN_HEROKU, [DOCKER], "/data/oauth.db"),
    "Podman, a volume": (mounts.PODMAN + mounts.PODMAN_VOLUME, NOTHING, [PODMAN], "/data/oauth.db"),
    "Toolbx, the user's home": (mounts.PODMAN + mounts.TOOLBOX_HOME, NOTHING, [PODMAN], "/var/home/ada/oauth.db"),
    "Kubernetes, a claim": (mounts.CONTAINERD + mounts.CLAIM, IN_KUBERNETES, [], "/data/oauth.db"),
    "Kubernetes, a claim on the node": (mounts.CONTAINERD + mounts.CLAIM_ON_NODE, IN_KUBERNETES, [], "/data/oauth.db"),
    "Kubernetes in Docker, a claim": (mounts.CONTAINERD + mounts.INSIDE_KIND, IN_KUBERNETES, [], "/data/oauth.db"),
    "Fly, a volume": (mounts.FLY + mounts.FLY_VOLUME, IN_FLY, [], "/data/oauth.db"),
    "Lambda, a network drive": (mounts.LAMBDA, IN_LAMBDA, [], "/mnt/efs/oauth.db"),
    "LXC": (mounts.LXC, {"container": "lxc"}, [], "/srv/oauth.db"),
    "LXC, made of a Docker image": (mounts.LXC, NOTHING, [DOCKER], "/srv/oauth.db"),
    "systemd-nspawn": (mounts.NSPAWN, NOTHING, [], "/srv/oauth.db"),
    "Debian": (mounts.DEBIAN, NOTHING, [], "/var/lib/wiki/oauth.db"),
    "Debian, another disk": (mounts.DEBIAN, NOTHING, [], "/srv/oauth.db"),
    "the disk of a unit with PrivateTmp=true": (mounts.PRIVATE_TMP, NOTHING, [], "/srv/oauth.db"),
    "Debian, with a directory that begins like /tmp": (mounts.DEBIAN, NOTHING, [], "/tmpfiles/oauth.db"),
    "a machine that runs Docker": (mounts.DOCKER_HOST, NOTHING, [], "/var/lib/wiki/oauth.db"),
    "a developer's machine, with `railway run`": (mounts.DEBIAN, {"RAILWAY_ENVIRONMENT": "x"}, [], "/home/oauth.db"),
    "a variable that is empty": (mounts.DEBIAN, {"K_SERVICE": ""}, [], "/home/oauth.db"),
    "WSL": (mounts.WSL, NOTHING, [], "/home/ada/oauth.db"),
    "WSL, made of a Docker image": (mounts.WSL, NOTHING, [DOCKER], "/home/ada/oauth.db"),
    "a virtual machine, made of a Docker image": (mounts.FIRECRACKER, NOTHING, [DOCKER], "/srv/oauth.db"),
    "a live system, on its own partition": (mounts.LIVE, NOTHING, [], "/home/oauth.db"),
    "a live system that is kept": (mounts.LIVE_KEPT, NOTHING, [], "/srv/oauth.db"),
    "OpenWrt": (mounts.OPENWRT, NOTHING, [], "/srv/oauth.db"),
    "lines that are none": ("\nno mount\n1 2 - \n - ext4\n", NOTHING, [DOCKER], "/srv/oauth.db"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_is_lost(case: str) -> None:
    """The finding names the file, where it is and the mount."""
    mountinfo, environment, markers, path, place = LOST[case]
    loss = find_loss(Path(path), mountinfo, environment, markers)
    assert loss is not None
    assert re.fullmatch(
        rf"{path} is {re.escape(place)} \([\w.-]+ on /\w*\): (after|with) [a-z ]+, every client has to authorize again",
        loss.found,
    )
    assert "/data" in loss.advice


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept(case: str) -> None:
    """A volume, a disk, and a container that is a machine are no finding, whatever else looks like a container."""
    mountinfo, environment, markers, path = KEPT[case]
    assert find_loss(Path(path), mountinfo, environment, markers) is None


def test_the_message_that_troubleshooting_quotes() -> None:
    """docs/troubleshooting.md quotes the whole warning of a container without a volume."""
    loss = find_loss(Path("/app/oauth.db"), mounts.DOCKER, NOTHING, [DOCKER])
    assert loss is not None
    page = (Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md").read_text()
    assert f"\n{loss.found}; {loss.advice}. To accept this, set {EPHEMERAL}=1\n" in page


@pytest.fixture
def unsilenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the setting of the tests."""
    monkeypatch.delenv(EPHEMERAL)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A file in memory that does not exist yet."""
    directory = mounts.memory_directory()
    yield directory / "oauth.db"
    shutil.rmtree(directory)


async def start(database: object, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Open a database as a server does, use it, and return the warnings in the log."""
    caplog.clear()
    async with SQLAlchemyOAuthProvider(database, base_url=BASE_URL, approval=AutoApproval()) as provider:  # type: ignore[arg-type]
        await provider.check_schema()
        assert await provider.get_client("nobody") is None
    return [f"{record.levelname} {record.message}" for record in caplog.records if record.name == "oauth_store"]


@pytest.mark.usefixtures("unsilenced")
async def test_one_warning_at_the_start(in_memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server whose file is in memory logs one warning: the file, its mount, the fix, and the variable."""
    [warned] = await start(in_memory, caplog)
    assert warned == (
        f"WARNING {in_memory} is in memory (tmpfs on /dev/shm): after a restart, every client has to authorize again; "
        "keep it on a volume or a disk, for example one that is mounted on /data, and set MCP_OAUTH_DB=/data/oauth.db; "
        "where there is none, use PostgreSQL. To accept this, set MCP_OAUTH_EPHEMERAL=1"
    )


@pytest.mark.usefixtures("unsilenced")
async def test_the_target_of_a_link_counts(in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link on a disk to a file in memory is a file in memory."""
    (tmp_path / "oauth.db").symlink_to(in_memory)
    [warned] = await start(tmp_path / "oauth.db", caplog)
    assert f"{in_memory} is in memory" in warned


@pytest.mark.usefixtures("unsilenced")
async def test_the_variable_silences_it(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MCP_OAUTH_EPHEMERAL=1 accepts the loss; an empty value is none."""
    monkeypatch.setenv(EPHEMERAL, "1")
    assert await start(in_memory, caplog) == []
    monkeypatch.setenv(EPHEMERAL, "")
    assert len(await start(in_memory, caplog)) == 1


@pytest.mark.usefixtures("unsilenced")
async def test_nothing_for_memory_and_servers(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """`:memory:` says what it is, and a database server keeps its own files."""
    assert await start(":memory:", caplog) == []
    if not database_url.endswith("oauth.db"):
        assert await start(database_url, caplog) == []


@pytest.mark.usefixtures("unsilenced")
async def test_nothing_without_a_list_of_mounts(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system has no list of mounts, as on macOS, the server starts, and logs nothing."""
    monkeypatch.setattr(files, "MOUNTS", Path("/proc/none/mountinfo"))
    assert await start(in_memory, caplog) == []


@pytest.mark.parametrize("value", ["0", "true", "1 "])
@pytest.mark.parametrize("database", [":memory:", "postgresql://127.0.0.1/wiki"])
def test_another_value_is_an_error(value: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider refuses any other value at construction, in one line."""
    monkeypatch.setenv(EPHEMERAL, value)
    with pytest.raises(ConfigurationError, match=f"^{EPHEMERAL} is '{value}'; set it to 1, or remove it$"):
        SQLAlchemyOAuthProvider(database, base_url=BASE_URL, approval=AutoApproval())


def test_the_doctor(in_memory: Path) -> None:
    """The doctor warns too, also before the file exists; the variable makes it `ok`, and a wrong value a problem."""
    before = run("doctor", database=str(in_memory), MCP_OAUTH_EPHEMERAL="")
    upgrade(str(in_memory))
    after = run("doctor", database=str(in_memory), MCP_OAUTH_EPHEMERAL="")
    for answer in (before, after):
        assert answer.returncode == 0
        assert f"warning  persistence: {in_memory} is in memory (tmpfs on /dev/shm): after a restart" in answer.stdout
        assert "-> keep it on a volume" in answer.stdout
        assert "set MCP_OAUTH_EPHEMERAL=1" in answer.stdout
    assert [found["level"] for found in findings(in_memory)] == ["ok"]
    wrong = run("doctor", database=str(in_memory), MCP_OAUTH_EPHEMERAL="yes")
    assert wrong.returncode == 1
    assert "problem  persistence: MCP_OAUTH_EPHEMERAL is 'yes'; set it to 1, or remove it" in wrong.stdout


def findings(path: Path) -> list[dict[str, str]]:
    """What the doctor finds about whether a file is kept."""
    document = run_json("doctor", database=str(path))
    return [found for found in document["findings"] if found["check"] == "persistence"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.usefixtures("unsilenced")
async def test_a_real_layer(in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An overlay whose changes are in memory is a warning; one whose changes are on a disk is none."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
        (in_memory.parent / name).mkdir()
    for changes, warnings in ((in_memory.parent, 1), (tmp_path, 0)):
        if "tmpfs" in subprocess.run(["stat", "-fc", "%T", changes], capture_output=True, text=True, check=True).stdout:
            assert warnings == 1 or pytest.skip("the tests' own directory is in memory")
        options = f"lowerdir={tmp_path}/lower,upperdir={changes}/upper,workdir={changes}/work"
        with mounted("-t", "overlay", "-o", options, "overlay", tmp_path / "merged") as merged:
            assert len(await start(merged / "oauth.db", caplog)) == warnings
