"""What `make demo` runs."""

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo.py"


def test_the_demo_authorizes_once_on_a_database_and_thrice_in_memory(tmp_path: Path) -> None:
    """The demo exits 0, shows the page, a lost response and a revocation, and says which server lost its client."""
    done = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    persistent, in_memory = done.stdout.split("InMemoryOAuthProvider, the same again")
    assert persistent.count("GET /authorize (PKCE S256)") == 1
    assert [line.split("/consent")[1].split()[-1] for line in persistent.splitlines() if "POST /consent" in line] == [
        "refused",
        "code",
    ]
    assert "the page asks: Allow demo to use 127.0.0.1:" in persistent
    assert persistent.count("POST /token (refresh_token)         200") == 3
    assert persistent.count("tool answered") == 4
    assert "the next call of the client       401" in persistent
    assert in_memory.count("GET /authorize (PKCE S256)          302") == 3
    answers = [re.split(r"\?\s+", line)[1].split(None, 1) for line in in_memory.splitlines() if "? " in line]
    assert answers == [["no", "yes"], ["no", "yes"], ["yes", "there is no command for it"]]
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # what it needs is in a directory of its own, and gone
