"""A real server moves to another database, and a real client goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_a_client_goes_on_when_its_server_moves(empty_database_url: str) -> None:
    """From SQLite to each other database and back: one authorization, and a refresh on /token after each move."""
    if "://" not in empty_database_url:
        pytest.skip("that is where it comes from")
    done = subprocess.run(
        [sys.executable, "-m", "examples.move", empty_database_url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("GET /authorize (PKCE S256)") == 1
    assert done.stdout.count("POST /register") == 1
    assert done.stdout.count("oauth-store copy") == 2
    assert done.stdout.count("POST /token (refresh_token)         200") == 2
    assert done.stdout.count("tool answered") == 5
    assert "4 oauth_tokens" in done.stdout
    assert done.stdout.endswith("Authorizations: 1, the one at the beginning\n")
