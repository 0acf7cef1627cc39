"""The documentation says what is: its programs run, and the tests, tables and names that it tells of exist."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from argon2 import PasswordHasher

import oauth_store
from oauth_store.database.models import Base
from tests.serving import free_port, wait_for_port

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
START_SECONDS = 100
STOP_SECONDS = 10


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [str(block) for block in found]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_are_python(page: Path) -> None:
    """Every block that says it is Python can be compiled."""
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@contextmanager
def running(program: str, directory: Path, port: int, **environment: str) -> Iterator[None]:
    """Run a program that serves on a port, until it answers there; and end it with SIGKILL."""
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, program], cwd=directory, env=os.environ | environment, stdout=log, stderr=log
        )
    try:
        wait_for_port(process, port, directory / "log", START_SECONDS)
        yield
    finally:
        process.kill()
        process.wait(STOP_SECONDS)


def run(command: str, directory: Path, **environment: str) -> str:
    """Run a command line to its end. Return what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=directory,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start_works(tmp_path: Path) -> None:
    """The server and the commands of the quick start do what stands there, also after a kill of the server."""
    page = ROOT / "docs" / "quick-start.md"
    [server] = blocks(page, "python")
    port = free_port()
    (tmp_path / "server.py").write_text(server.replace("8000", str(port)))
    said = [re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] for block in blocks(page, "console")]
    commands = dict(command.split("\n", 1) for block in said for command in block)
    shown = {command.replace("8000", str(port)): output for command, output in commands.items()}
    [challenge] = [command for command in shown if command.startswith("curl")]
    [export] = [command for command in shown if command.startswith("export")]
    [call] = [command for command in shown if command.startswith("fastmcp call")]
    client = {"FASTMCP_HOME": str(tmp_path / "client")}
    key = run(f'{export}; printf %s "$FASTMCP_OAUTH_ENCRYPTION_KEY"', tmp_path)
    client["FASTMCP_OAUTH_ENCRYPTION_KEY"] = key
    browser = f"{sys.executable} -c 'import sys, httpx2; httpx2.get(sys.argv[1], follow_redirects=True)' %s &"

    with running("server.py", tmp_path, port):
        assert run(challenge, tmp_path).startswith(shown[challenge].rstrip())
        assert run(call, tmp_path, BROWSER=browser, **client) == shown[call]
    assert shown["python server.py"] in (tmp_path / "log").read_text()
    with running("server.py", tmp_path, port):
        assert run(call, tmp_path, BROWSER="false", **client) == shown[call]
    grants = run("oauth-store grants", tmp_path, COLUMNS="120")
    assert without_times(grants) == without_times(shown["oauth-store grants"])


def without_times(table: str) -> str:
    """A table without what differs from run to run: its ids, its times, and the width of its columns."""
    return re.sub(r"─+|(?<=\n)[0-9a-f]{12}|\d+ \w+(?= ago)| +", " ", table)


def test_the_storage_page_names_every_column() -> None:
    """The tables of docs/storage.md have the columns of the models, in their order, and say null where it may be."""
    page = (ROOT / "docs" / "storage.md").read_text()
    described = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
        if rows:
            described[section.split("\n")[0]] = [(name, "or null" in kind) for name, kind in rows]
    actual = {name: [(c.name, bool(c.nullable)) for c in table.columns] for name, table in Base.metadata.tables.items()}
    assert described == actual


def test_the_reference_is_of_what_is_exported() -> None:
    """docs/api.md has each name of `oauth_store.__all__`, and no other."""
    page = (ROOT / "docs" / "api.md").read_text()
    assert (
        sorted(re.findall(r"^\.\. auto(?:class|exception|function):: (\w+)$", page, re.MULTILINE))
        == oauth_store.__all__
    )


PROGRAMS = [
    pytest.param(page, number, id=f"{page}-{number}")
    for page in ("README.md", "docs/coming-from.md", "docs/deploying.md")
    for number, _ in enumerate(blocks(ROOT / page, "python"))
]


@pytest.mark.parametrize(("page", "number"), PROGRAMS)
def test_programs_run(page: str, number: int, tmp_path: Path) -> None:
    """Each Python block of these pages is a whole program: it runs, and one that serves refuses who has no token."""
    program = blocks(ROOT / page, "python")[number]
    (tmp_path / "program.py").write_text(program)
    password_hash = PasswordHasher(1, 8, 1).hash("a password")
    environment = {"MCP_OAUTH_PASSWORD_HASH": password_hash, "MCP_OAUTH_DB": str(tmp_path / "oauth.db")}
    if ".run(" not in program:
        assert run(f"{sys.executable} program.py", tmp_path, **environment) == ""
        return
    port = free_port()
    with running("program.py", tmp_path, port, FASTMCP_PORT=str(port), **environment):
        assert httpx2.post(f"http://127.0.0.1:{port}/mcp", json={}, timeout=60).status_code == 401


def modules_of_the_tests() -> list[Path]:
    """The modules of tests/, helpers too."""
    return [path for path in (ROOT / "tests").rglob("*.py") if "node_modules" not in path.parts]


@functools.cache
def defined_tests() -> set[str]:
    """The ids of all tests and test classes, as in `tests/test_x.py::TestY::test_z`."""
    ids = set()
    for path in modules_of_the_tests():
        name = name_of(path)
        ids.add(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                ids |= {f"{name}::{node.name}::{one.name}" for one in node.body if hasattr(one, "name")}
            if hasattr(node, "name"):
                ids.add(f"{name}::{node.name}")
    return ids


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_are_named_exist(page: Path) -> None:
    """Whatever a page calls a test, by its id, its file or its name alone, is one."""
    ids = defined_tests()
    known = ids | {part for one in ids for part in one.split("::")[1:]} | {one.removeprefix("tests/") for one in ids}
    named = set(re.findall(r"`((?:tests/)?(?:\w+/)*test_\w+\.py(?:::\w+)*|(?:::)?[Tt]est_?\w+)`", page.read_text()))
    assert {one for one in named if one.removeprefix("::") not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_elsewhere_are_urls(page: Path) -> None:
    """Each link that leaves the repository is an https URL with a host; Sphinx sees to all others."""
    links = re.findall(r"\]\((\w+:[^)\s]*)\)|<(https?:[^>\s]*)>", page.read_text())
    for link in (one or other for one, other in links):
        assert urlsplit(link).scheme == "https", link
        assert re.fullmatch(r"([\w-]+\.)+[a-z]+", urlsplit(link).netloc), link


def test_imports_point_one_way() -> None:
    """A module imports from its own line of docs/architecture.md and those above: hidden and late imports count too."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| (`[^|]*`) \|", page.partition("## The rooms")[2].partition("## ")[0], re.MULTILINE)
    line_of = {room: number for number, line in enumerate(table) for room in re.findall(r"`(\w+)`", line)}
    package = ROOT / "oauth_store"
    modules = [path for path in package.rglob("*.py") if path.parent != package or not path.stem.startswith("__")]
    assert {room_of(path) for path in modules} == set(line_of)
    wrong = [
        f"{path.relative_to(package)} imports {room}"
        for path in modules
        for room in rooms_imported(path)
        if line_of[room] > line_of[room_of(path)] or {room, room_of(path)} == {"server", "pages"}
    ]
    assert wrong == []
    assert len(table) == 7


def room_of(path: Path) -> str:
    """The folder of a module, or itself where it stands in none."""
    return path.relative_to(ROOT / "oauth_store").with_suffix("").parts[0]


def rooms_imported(path: Path) -> Iterator[str]:
    """The rooms that a module imports from, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("oauth_store."))


def test_no_test_module_is_imported() -> None:
    """What several modules of the tests use is in a helper module: none imports tests or a conftest, late neither."""
    wrong = []
    for path in modules_of_the_tests():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        tests = [name for name in sorted(imported) if re.fullmatch(r"tests\.(\w+\.)*(test_\w+|conftest)", name)]
        wrong += [f"{name_of(path)} imports {name}" for name in tests]
    assert wrong == []


def test_alembic_is_imported_in_one_module_and_late() -> None:
    """A server at the right schema starts without Alembic."""
    program = "import sys, oauth_store; print([name for name in sys.modules if name.startswith('alembic')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
    sources = [*(ROOT / "oauth_store").rglob("*.py")]
    importing = [
        path.name for path in sources if re.search(r"^\s*(from|import) alembic", path.read_text(), re.MULTILINE)
    ]
    assert importing == ["schema.py"]
