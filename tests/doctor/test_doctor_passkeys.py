"""What `oauth-store doctor` says about passkeys: which host they are for, and what a move of the server costs."""

import json

import pytest
from sqlalchemy import insert

from oauth_store.database.models import Client, Token
from oauth_store.doctor.examine import examine
from oauth_store.doctor.finding import Finding
from oauth_store.flows.personal import NO_EXPIRY
from tests.databases import execute
from tests.stores import token


def add(database_url: str, number: int, url: str) -> None:
    """Add the row of a passkey."""
    details = {"id": f"id {number}", "name": f"key {number}", "url": url, "transports": []}
    row = token(
        number,
        kind="passkey",
        client_id=None,
        subject="ada",
        scopes=json.dumps(details),
        expires_at=NO_EXPIRY,
        replay=b"key",
        granted_at=0,
    )
    execute(database_url, insert(Token).values(row))


def connect(database_url: str, resource: str, at: int) -> None:
    """Add the row of a token that a server issued."""
    row = token(1000 + at, client_id="abc", resource=resource, created_at=at)
    execute(database_url, insert(Token).values(row))


def about_passkeys(database_url: str, url: str | None = None) -> list[Finding]:
    """The findings about passkeys. The server need not be there."""
    return [finding for finding in examine(database_url, url) if finding.check == "passkeys"]


@pytest.fixture(autouse=True)
def client(database_url: str) -> None:
    """A client, for the tokens."""
    execute(database_url, insert(Client).values(client_id="abc", client_metadata="{}", created_at=0))


def test_without_passkeys(database_url: str) -> None:
    """Nothing is found where there are none; at an IP address, the doctor says why, and what to use instead."""
    assert about_passkeys(database_url) == []
    assert about_passkeys(database_url, "http://localhost:1/mcp") == []
    [finding] = about_passkeys(database_url, "http://127.0.0.1:1/mcp")
    assert finding.level == "ok"
    assert "there can be none" in finding.found
    assert "use http://localhost:1 as base_url" in finding.found


def test_at_home(database_url: str) -> None:
    """Passkeys of the server are fine; at another port, or another path, none of them signs in."""
    add(database_url, 1, "http://localhost:8000")
    assert [finding.found for finding in about_passkeys(database_url)] == ["1 can sign in"]
    connect(database_url, "http://localhost:8000/mcp", 5)
    assert [finding.found for finding in about_passkeys(database_url)] == ["1 can sign in at localhost"]
    for moved in ("http://localhost:1/mcp", "https://localhost:8000/mcp"):
        assert [finding.level for finding in about_passkeys(database_url, moved)] == ["warning"]


@pytest.mark.parametrize("named", [True, False], ids=["--url", "by its newest token"])
def test_after_a_move(database_url: str, named: bool) -> None:
    """Passkeys of another host are a warning that names them, and what to do."""
    add(database_url, 1, "https://old.example.com")
    add(database_url, 2, "http://localhost:1")
    connect(database_url, "https://old.example.com/mcp", 5)
    connect(database_url, "http://localhost:1/mcp", 6)
    [finding] = about_passkeys(database_url, "http://localhost:1/mcp" if named else None)
    assert finding.level == "warning"
    assert (
        finding.found
        == "1 of 2 cannot sign in at http://localhost:1/mcp: they are for https://old.example.com (key 1 of ada)"
    )
    assert str(finding.advice).startswith("set base_url to that URL again, or run `oauth-store passkey add`")


def test_a_move_to_an_address(database_url: str) -> None:
    """At an IP address no passkey works; the advice names localhost."""
    for number in range(7):
        add(database_url, number, "http://localhost:1")
    [finding] = about_passkeys(database_url, "http://127.0.0.1:1/mcp")
    assert (finding.level, "and 2 more" in finding.found) == ("warning", True)
    assert "use http://localhost:1 as base_url" in str(finding.advice)
