"""The files of examples/deploy: they are what they say, and what they run forgets nothing."""

import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import kubernetes_validate
import pytest
import yaml
from fastmcp import Client
from sqlalchemy.engine import make_url

from examples.demo import ClientApp
from oauth_store.pages.passwords import hash_password
from tests.containers import DEPLOY, ROOT, Container, instructions, require_namespaces, value
from tests.databases import create_postgres_database, drop_postgres_database
from tests.serving import free_port

METADATA = "/.well-known/oauth-authorization-server"
PASSWORD = "correct horse"
LOST = "every client has to authorize again"
SECONDS = 60
KUBERNETES = ["1.30", ".".join(kubernetes_validate.latest_version().split(".")[:2])]
"""The first version with preStop.sleep, and the newest that is known here."""

# the store of the client outlives the client object, as a file would
pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

Run = Callable[..., Container]


def read(name: str) -> Any:
    """A file of examples/deploy."""
    text = (DEPLOY / name).read_text()
    return tomllib.loads(text) if name.endswith(".toml") else list(yaml.safe_load_all(text))


def kubernetes(kind: str) -> Any:
    """The one object of a kind in the manifest."""
    [found] = [document for document in read("kubernetes.yaml") if document["kind"] == kind]
    return found


# What the files say


def test_the_compose_file_is_valid() -> None:
    """compose.yaml is one of the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifest_is_valid(version: str) -> None:
    """Each object of kubernetes.yaml is one of Kubernetes, without a field that Kubernetes would ignore."""
    for document in read("kubernetes.yaml"):
        assert kubernetes_validate.validate(document, version, strict=True) == version


def test_the_image_installs_this_package() -> None:
    """The Dockerfile installs the package with an extra that it has, and runs as a user that is not root."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [installed] = re.findall(r"pip install \S+ '(.+)\[(.+)\]'", "\n".join(step for _, step in instructions()))
    assert installed[0] == project["name"]
    assert installed[1] in project["optional-dependencies"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", value("USER"))
    assert not {"VOLUME", "ENTRYPOINT"} & {name for name, _ in instructions()}


def settings() -> dict[str, dict[str, str]]:
    """The variables that each file sets, or asks for."""
    [render] = read("render.yaml")[0]["services"]
    [pod] = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    compose = read("compose.yaml")[0]["services"]["wiki"]
    return {
        "Dockerfile": dict(setting.split("=") for setting in value("ENV").split()),
        "compose.yaml": compose["environment"] | {"MCP_OAUTH_PASSWORD_HASH": compose["env_file"]},
        "fly.toml": read("fly.toml")["env"],
        "kubernetes.yaml": {each["name"]: each["value"] for each in pod["env"]} | kubernetes("Secret")["stringData"],
        "render.yaml": {each["key"]: str(each.get("value")) for each in render["envVars"]},
    }


def test_the_variables_exist() -> None:
    """Each variable of ours is in docs/settings.md, and the hash of the password is a secret wherever it is needed."""
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))
    for name, variables in settings().items():
        assert {variable for variable in variables if variable.startswith("MCP_")} <= documented, name
        hashed = variables.get("MCP_OAUTH_PASSWORD_HASH")
        if name != "Dockerfile":
            assert hashed or "MCP_OAUTH_PASSWORD_HASH" in (DEPLOY / name).read_text()
            assert variables["BASE_URL"].startswith("https://")


def test_the_volume_is_where_the_file_is() -> None:
    """In each file, the directory of the database is a volume with a name, and in the image the user's own."""
    assert settings()["Dockerfile"]["MCP_OAUTH_DB"] == "/data/oauth.db"
    assert "install -d -o wiki -g wiki -m 700 /data" in "\n".join(step for _, step in instructions())
    compose = read("compose.yaml")[0]
    [volume] = compose["services"]["wiki"]["volumes"]
    source, _, mounted = volume.partition(":")
    assert compose["volumes"][source]["name"]
    [mount] = read("fly.toml")["mounts"]
    [render] = read("render.yaml")[0]["services"]
    for name, directory in (
        ("compose.yaml", mounted),
        ("fly.toml", mount["destination"]),
        ("render.yaml", render["disk"]["mountPath"]),
    ):
        assert Path(settings()[name]["MCP_OAUTH_DB"]).parent == Path(directory), name
    assert settings()["kubernetes.yaml"]["MCP_OAUTH_DB"].startswith("postgresql://")


def test_the_ports_agree() -> None:
    """Each file leads to the port that the image listens on, and asks there for its health."""
    port = value("EXPOSE")
    compose = read("compose.yaml")[0]["services"]["wiki"]
    fly = read("fly.toml")["http_service"]
    [pod] = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    [exposed] = pod["ports"]
    [service] = kubernetes("Service")["spec"]["ports"]
    [render] = read("render.yaml")[0]["services"]
    assert f"--port {port} " in value("CMD")
    assert " ".join(pod["command"]) in value("CMD")
    assert compose["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f":{port}{METADATA}" in compose["healthcheck"]["test"][-1]
    assert str(fly["internal_port"]) == str(exposed["containerPort"]) == settings()["render.yaml"]["PORT"] == port
    assert service["targetPort"] == exposed["name"]
    checks = [fly["checks"][0]["path"], render["healthCheckPath"]]
    for probe in ("readinessProbe", "livenessProbe"):
        assert pod[probe]["httpGet"]["port"] == exposed["name"]
        checks.append(pod[probe]["httpGet"]["path"])
    assert set(checks) == {METADATA}


def test_they_confine_the_server() -> None:
    """Compose and Kubernetes run it with a root that is read-only, without capabilities, and as no root."""
    compose = read("compose.yaml")[0]["services"]["wiki"]
    assert compose["read_only"] is True
    assert compose["cap_drop"] == ["ALL"]
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert [mount.partition(":")[0] for mount in compose["tmpfs"]] == ["/tmp"]
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == value("USER")
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]


def test_one_machine_or_one_database() -> None:
    """With a file there is one server; three replicas share PostgreSQL, and upgrade it before they start."""
    deployment = kubernetes("Deployment")["spec"]
    [upgrade] = deployment["template"]["spec"]["initContainers"]
    assert deployment["replicas"] == 3
    assert deployment["selector"]["matchLabels"] == kubernetes("Service")["spec"]["selector"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert upgrade["command"] == ["oauth-store", "upgrade"]
    assert upgrade["envFrom"] == [{"secretRef": {"name": kubernetes("Secret")["metadata"]["name"]}}]
    assert "fly deploy --ha=false" in (DEPLOY / "fly.toml").read_text()
    assert read("fly.toml")["http_service"]["force_https"] is True


def test_they_wait_longer_than_the_server() -> None:
    """Each waits for the server's own end before it kills it."""
    [graceful] = map(int, re.findall(r"--timeout-graceful-shutdown (\d+)", value("CMD")))
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    slept = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert int(read("compose.yaml")[0]["services"]["wiki"]["stop_grace_period"].rstrip("s")) > graceful
    assert int(read("fly.toml")["kill_timeout"].rstrip("s")) > graceful
    assert pod["terminationGracePeriodSeconds"] > graceful + slept


# What the files run


@pytest.fixture
def port() -> int:
    """The port of the container."""
    return free_port()


@pytest.fixture
def run(tmp_path: Path, port: int) -> Iterator[Run]:
    """Start containers, one after the other; afterwards all of them are gone."""
    (tmp_path / "probe").mkdir()
    require_namespaces(tmp_path / "probe")
    containers: list[Container] = []

    password_hash = hash_password(PASSWORD)

    def start(*arguments: Any, at: int = port, **options: Any) -> Container:
        options |= {"MCP_OAUTH_PASSWORD_HASH": password_hash, "BASE_URL": f"http://127.0.0.1:{port}"}
        containers.append(Container(tmp_path / f"container-{len(containers)}", at, *arguments, **options))
        return containers[-1]

    yield start
    for container in containers:
        container.kill()


async def test_the_next_container_knows_every_client(run: Run, port: int, tmp_path: Path) -> None:
    """With a volume, a client stays authorized through a kill -9 and a new container, and no warning is in the log."""
    volume = tmp_path / "volume"
    volume.mkdir()
    app = ClientApp(f"http://127.0.0.1:{port}/mcp", PASSWORD)
    first = run(volume)
    first.wait()
    await app.call_tool()
    first.kill()
    second = run(volume)
    second.wait()
    await app.call_tool()
    await app.keep(refresh_token=True)
    await app.call_tool()
    assert app.authorizations == 1
    assert {f"{path.stat().st_uid}:{path.stat().st_gid}" for path in (volume, *volume.iterdir())} == {value("USER")}
    assert LOST not in first.log.read_text() + second.log.read_text()


@pytest.mark.parametrize(
    ("database", "read_only", "place"),
    [
        ("/tmp/oauth.db", True, "/tmp/oauth.db is in memory (tmpfs on /tmp): after a restart"),
        (
            "/data/oauth.db",
            False,
            "/data/oauth.db is in the container's own file system (overlay on /): with the next container",
        ),
    ],
    ids=["in memory", "without a volume"],
)
async def test_the_next_container_knows_nobody(database: str, read_only: bool, place: str, run: Run, port: int) -> None:
    """In memory, or with the volume forgotten, the log warns, and in the next container the client starts anew."""
    app = ClientApp(f"http://127.0.0.1:{port}/mcp", PASSWORD)
    first = run(read_only=read_only, MCP_OAUTH_DB=database)
    first.wait()
    await app.call_tool()
    assert f"WARNING oauth_store {place}, {LOST}; keep it on a volume" in first.log.read_text()
    assert first.log.read_text().count(LOST) == 1
    first.kill()
    second = run(read_only=read_only, MCP_OAUTH_DB=database, MCP_OAUTH_EPHEMERAL="1")
    second.wait()
    await app.call_tool()
    assert app.authorizations == 2
    assert LOST not in second.log.read_text()


@pytest.fixture
async def empty_postgresql(postgres_server: str) -> AsyncIterator[str]:
    """A database that nothing was ever done to."""
    url = await create_postgres_database(postgres_server)
    yield url
    await drop_postgres_database(postgres_server, url)


async def test_three_replicas_share_one_database(run: Run, port: int, empty_postgresql: str) -> None:
    """Three containers that start at once on an empty PostgreSQL upgrade it once, and know each other's clients."""
    database = make_url(empty_postgresql)
    directory, socket = database.query.get("host"), None
    if directory is not None:  # no other user can enter it
        socket = Path(str(directory)) / ".s.PGSQL.5432"
        database = database.update_query_dict({"host": "/tmp"})
    replicas = [
        run(at=at, socket=socket, MCP_OAUTH_DB=database.render_as_string(hide_password=False))
        for at in (port, free_port(), free_port())
    ]
    for replica in replicas:
        replica.wait()
    app = ClientApp(f"http://127.0.0.1:{port}/mcp", PASSWORD)
    await app.call_tool()
    token = (await app.tokens()).access_token
    for replica in replicas:
        async with Client(f"http://127.0.0.1:{replica.port}/mcp", auth=token) as client:
            await client.call_tool("read_page", {"title": "Home"})
        assert LOST not in replica.log.read_text()


def test_a_forgotten_volume_is_an_error_where_the_root_is_read_only(run: Run) -> None:
    """With a root that is read-only, a server without its volume does not start, and says why."""
    container = run()
    assert container.process.wait(SECONDS) != 0
    assert "cannot create /data/oauth.db: Read-only file system" in container.log.read_text()


def test_the_health_check(run: Run, port: int, tmp_path: Path) -> None:
    """The check of compose.yaml succeeds while the server runs, by any name of its host, and fails after its end."""
    volume = tmp_path / "volume"
    volume.mkdir()
    [_, _, option, program] = read("compose.yaml")[0]["services"]["wiki"]["healthcheck"]["test"]
    check = [sys.executable, option, program.replace(":8000/", f":{port}/")]
    container = run(volume)
    container.wait()
    assert subprocess.run(check, timeout=SECONDS, check=False).returncode == 0
    asked = httpx2.get(f"http://127.0.0.1:{port}{METADATA}", headers={"host": f"10.244.1.7:{port}"}, timeout=SECONDS)
    assert asked.status_code == 200  # as Kubernetes asks
    container.kill()
    assert subprocess.run(check, capture_output=True, timeout=SECONDS, check=False).returncode != 0
