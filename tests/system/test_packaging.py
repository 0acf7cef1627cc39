"""The wheel: what it holds, and that it migrates a database by itself, with no checkout in sight."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from oauth_store.database.names import VERSION_TABLE
from oauth_store.database.schema import HEAD
from tests.databases import sqlite_rows
from tests.serving import AUTHORITIES

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-deps", "--wheel-dir", str(directory))
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the wheel is installed, without what it depends on."""
    directory = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--no-deps", "--target", str(directory))
    return directory


def pip(*arguments: str) -> None:
    """Run pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != AUTHORITIES}  # it asks the real index
    subprocess.run(command, env=environment, check=True)


def run(installed: Path, directory: Path, *command: str) -> str:
    """Run a command in an empty directory, with the wheel before everything else on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    environment.pop("MCP_OAUTH_DB", None)
    return subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_the_wheel_holds_the_package_and_its_migrations(wheel: Path) -> None:
    """The wheel holds every module, the migrations with their alembic.ini, and py.typed; and nothing else."""
    expected = {str(path.relative_to(ROOT)) for path in files_in(ROOT / "oauth_store")}
    expected |= {f"oauth_store/{path.relative_to(ROOT)}" for path in files_in(ROOT / "migrations")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {*expected, "oauth_store/alembic.ini"}
    assert {
        "oauth_store/py.typed",
        "oauth_store/pages/templates/consent.html",
        "oauth_store/migrations/versions/0002_hashed.py",
    } <= held


def files_in(directory: Path) -> list[Path]:
    """The files below a directory, but for what Python compiled."""
    return [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_the_wheel_migrates_with_its_own_migrations(installed: Path, tmp_path: Path) -> None:
    """Installed from the wheel, `schema.upgrade` runs the migrations that are inside the package."""
    script = (
        "import oauth_store, sys\n"
        "from alembic.script import ScriptDirectory\n"
        "from oauth_store.database import schema\n"
        "sys.path.remove(sys.argv[1]) if sys.argv[1] in sys.path else None\n"
        "schema.upgrade('x.db')\n"
        "print(oauth_store.__file__)\n"
        "print(schema.alembic_ini())\n"
        "for revision in ScriptDirectory.from_config(schema.alembic_config()).walk_revisions():\n"
        "    print(revision.path)\n"
    )
    package = installed / "oauth_store"
    assert run(installed, tmp_path, sys.executable, "-c", script, str(ROOT)).splitlines() == [
        str(package / "__init__.py"),
        str(package / "alembic.ini"),
        str(package / "migrations/versions/0003_sessions.py"),
        str(package / "migrations/versions/0002_hashed.py"),
        str(package / "migrations/versions/0001_vs2.py"),
    ]
    assert sqlite_rows(str(tmp_path / "x.db"), f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]


def test_the_command_of_the_wheel_migrates(installed: Path, tmp_path: Path) -> None:
    """`oauth-store upgrade`, run in an empty directory, creates the default database there."""
    run(installed, tmp_path, sys.executable, str(installed / "bin" / "oauth-store"), "upgrade")
    assert [path.name for path in tmp_path.iterdir()] == ["mcp_oauth.db"]
    assert sqlite_rows(str(tmp_path / "mcp_oauth.db"), f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]


def test_a_provider_of_the_wheel_creates_its_database(installed: Path, tmp_path: Path) -> None:
    """Installed from the wheel, the provider creates an empty database at its first use."""
    script = (
        "import asyncio\n"
        "from oauth_store import SQLAlchemyOAuthProvider\n"
        "async def main():\n"
        "    async with SQLAlchemyOAuthProvider(base_url='http://127.0.0.1:8000') as provider:\n"
        "        await provider.check_schema()\n"
        "asyncio.run(main())\n"
    )
    run(installed, tmp_path, sys.executable, "-c", script)
    assert sqlite_rows(str(tmp_path / "mcp_oauth.db"), f"SELECT * FROM {VERSION_TABLE}") == [(HEAD,)]


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    """constraints-lowest.txt, under which CI runs the tests, pins each dependency at the lower bound promised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["postgresql"]]
    required += project["optional-dependencies"]["mysql"] + project["optional-dependencies"]["passkeys"]
    promised = {}
    for requirement in map(Requirement, required):
        [lower] = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        promised[requirement.name] = lower
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == promised.keys()
    wrong = {name: pinned[name] for name, lower in promised.items() if not f"{pinned[name]}.".startswith(f"{lower}.")}
    assert not wrong
