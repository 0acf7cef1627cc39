"""`oauth-store scopes` on the command line, on every database."""

import re

import pytest

from tests.commands import run, run_json
from tests.house import House
from tests.workers import settle


async def scopes_of(house: House, access_token: str) -> list[str]:
    """What the server lets a token do at its next call."""
    verified = await house.provider.verify_token(access_token)
    await settle(house.provider)  # a command would wait for the row, and this loop for the command
    assert verified is not None
    return verified.scopes


class TestScopes:
    async def test_they_are_shown(self, house: House, database_url: str) -> None:
        """Without an option nothing changes."""
        grant_id = await house.grant_id(await house.grant("ada"))
        shown = run("scopes", grant_id[:6], database=database_url)
        assert (shown.returncode, shown.stdout) == (0, f"Test client ({grant_id[:12]}) can use read write.\n")
        assert run_json("scopes", grant_id, database=database_url) == {
            "grant_id": grant_id,
            "client_id": "client-of-the-house",
            "scopes": ["read", "write"],
            "added": [],
            "removed": [],
            "scope_changes": [],
        }

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--remove", "write"], "read"),
            (["--add", "admin", "--add", "audit"], "read write admin audit"),
            (["--add", "admin", "--remove", "read", "--remove", "write"], "admin"),
            (["--set", "write admin"], "write admin"),
            (["--set", "write read"], "read write"),
        ],
    )
    async def test_they_are_changed(self, house: House, database_url: str, options: list[str], expected: str) -> None:
        """The server knows at the next call; `grants` and `explain` show what changed, when and by whom."""
        token = await house.grant("ada")
        grant_id = await house.grant_id(token)
        changed = run("scopes", grant_id, *options, "--yes", database=database_url, SUDO_USER="ada")
        assert (changed.returncode, changed.stderr) == (0, "")
        assert changed.stdout.splitlines()[0] == f"Test client ({grant_id[:12]}) can now use {expected}."
        assert await scopes_of(house, token.access_token) == expected.split()
        (grant,) = run_json("grants", database=database_url)["grants"]
        explained = run_json("explain", database=database_url, answer=token.access_token)
        assert grant["scopes"] == explained["scopes"] == expected.split()
        assert grant["scope_changes"] == explained["scope_changes"]
        if expected == "read write":
            assert grant["scope_changes"] == []
            return
        (change,) = grant["scope_changes"]
        assert set(change["added"]) == set(expected.split()) - {"read", "write"}
        assert set(change["removed"]) == {"read", "write"} - set(expected.split())
        assert change["by"] == "ada, with oauth-store"
        words = re.compile(rf"  {grant_id[:12]}  .*(added|removed) \d+ s ago by ada, with oauth-store\n")
        assert words.search(run("grants", database=database_url).stdout)
        assert (
            "s ago by ada, with oauth-store" in run("explain", database=database_url, answer=token.access_token).stdout
        )

    async def test_a_question_first(self, house: House, database_url: str) -> None:
        """It asks before it changes anything, and no answer, or no, changes nothing."""
        token = await house.grant("ada")
        grant_id = await house.grant_id(token)
        for answer in ("", "n\n"):
            asked = run("scopes", grant_id, "--remove", "write", database=database_url, answer=answer)
            assert asked.returncode == 1
            assert f"Test client ({grant_id[:12]}): change read write to read? [y/N]" in asked.stderr
            assert await scopes_of(house, token.access_token) == ["read", "write"]
        assert run("scopes", grant_id, "--remove", "write", database=database_url, answer="y\n").returncode == 0
        assert await scopes_of(house, token.access_token) == ["read"]

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--set", "read", "--add", "write"], "--set names all scopes; pass it without --add and --remove"),
            (["--set", " "], "--set names no scope; to end the grant, use `oauth-store revoke`"),
            (["--remove", "read", "--remove", "write"], "a grant needs at least one scope; to end it, revoke it"),
            (["--add", 'a"b'], "is not a scope; use printable ASCII"),
            (["--add", "é"], "is not a scope; use printable ASCII"),
            (["--add", "x", "--remove", "x"], "x cannot be added and removed at once"),
        ],
    )
    async def test_what_cannot_be_done(
        self, house: House, database_url: str, options: list[str], complaint: str
    ) -> None:
        """One line, exit code 1, and nothing has changed."""
        token = await house.grant("ada")
        refused = run("scopes", await house.grant_id(token), *options, "--yes", database=database_url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert complaint in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert await scopes_of(house, token.access_token) == ["read", "write"]

    async def test_a_grant_that_is_not_live(self, house: House, database_url: str) -> None:
        """An unknown id, and a grant that has ended, are one line each."""
        token = await house.grant("ada")
        grant_id = await house.grant_id(token)
        assert run("revoke", grant_id, "--yes", database=database_url).returncode == 0
        for named, complaint in ((grant_id, "is not live; see"), ("123456", "no grant begins with 123456")):
            refused = run("scopes", named, "--add", "x", "--yes", database=database_url)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert complaint in refused.stderr
