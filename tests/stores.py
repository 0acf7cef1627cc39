"""A store with everything in it that a database may see in another way, and whether another one is as whole."""

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from oauth_store.credentials import hash_secret
from oauth_store.database.models import Base, Client, Code, Token
from oauth_store.database.schema import upgrade
from tests.databases import execute, sqlite_rows

BIG = 2**62
EMOJI = "\U0001f680"


def token(number: int = 0, **values: Any) -> dict[str, Any]:
    """A row of a token: the bare minimum, and what is given."""
    return {
        "token_hash": hash_secret(f"token {number}"),
        "kind": "access_token",
        "grant_id": secrets.token_bytes(16),
        "client_id": "abc",
        "scopes": "",
        "created_at": 1,
        "expires_at": 2,
        **values,
    }


def fill(path: str, tokens: int = 10) -> None:
    """Make a store with everything in it that a database may see in another way."""
    upgrade(path)
    ids = ["abc", "ABC", "\u00e9", "e\u0301", "https://claude.ai/oauth/mcp.json", EMOJI * 512, "trailing "]
    clients = [
        {
            "client_id": client_id,
            "client_metadata": json.dumps({"client_name": f"'\"\\ {EMOJI} %s :x \u202e"}, ensure_ascii=False),
            "created_at": number,
            "client_secret_hash": bytes(range(32)) if number % 2 else None,
            "last_used_at": BIG if number % 3 else None,
        }
        for number, client_id in enumerate(ids)
    ] + [{"client_id": "long", "client_metadata": EMOJI * 8192, "created_at": 0}]
    approved: dict[str, Any] = {"approved_at": 0, "consumed_at": BIG}
    asked: dict[str, Any] = {
        "code_hash": b" " * 32,
        "browser_hash": b"\xff" * 32,
        "state": f" {EMOJI}\n\t ",
        "subject": "",
    }
    codes = [
        {
            "handle_hash": bytes([number]) * 32,
            "client_id": "no client of ours",
            "grant_id": b"\x00" * 16,
            "redirect_uri": "cursor://x",
            "redirect_uri_provided_explicitly": explicitly,
            "code_challenge": "",
            "scopes": " ",
            "created_at": 0,
            "expires_at": -1,
            **more,
        }
        for number, (explicitly, more) in enumerate([(True, approved), (False, asked)])
    ]
    rows = [
        token(-1, token_hash=b"\x00" * 32),
        token(-2, token_hash=b"\xff" * 32, client_id=None, kind="session", subject="ada "),
        token(-3, token_hash=b" " * 31, resource="", granted_at=BIG, revoked_at=3, revoked_reason="\u00e4" * 64),
        token(-4, token_hash=b" " * 32, replay=b"\x00\xff' \x1a" * 100, consumed_at=5, first_used_at=0),
        token(-5, token_hash=b"\x01" * 32, kind="assertion"),
        *(token(number, paired_hash=os.urandom(32)) for number in range(tokens - 5)),
    ]
    every = {column.name for column in Base.metadata.tables["oauth_tokens"].columns}
    assert every == {name for row in rows for name in row}, "a new column wants a value here"
    execute(path, *(insert(Client).values(row) for row in clients), *(insert(Code).values(row) for row in codes))
    execute(path, *(insert(Token).values(row) for row in rows))


def dump(path: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every value of every table of a file, with the type that SQLite stores it with."""
    dumped = {}
    for (name,) in sqlite_rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        columns = [row[1] for row in sqlite_rows(path, f"PRAGMA table_info({name})")]
        values = ", ".join(f'"{column}", typeof("{column}")' for column in columns)
        dumped[name] = sorted(sqlite_rows(path, f"SELECT {values} FROM {name}"), key=repr)
    return dumped


def registrations(journal: Path) -> set[str]:
    """The clients whose registration was acknowledged."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    answered = {entry["number"] for entry in entries if "answer" in entry}
    steps = [entry for entry in entries if entry.get("step") == "register" and entry["number"] in answered]
    return {json.loads(entry["client"])["client_id"] for entry in steps}


def await_registration(journal: Path, known: int, seconds: float = 60) -> None:
    """Wait until more clients are acknowledged than are known. Raises if that takes longer: the server stands still."""
    deadline = time.monotonic() + seconds
    while len(registrations(journal)) <= known:
        assert time.monotonic() < deadline, "the server stands still"
        time.sleep(0.05)


def check_whole(path: str) -> None:
    """Nothing refers to what is not there."""
    lonely = "SELECT count(*) FROM oauth_tokens t WHERE NOT EXISTS (SELECT 1 FROM oauth_tokens p WHERE {})"
    assert sqlite_rows(path, lonely.format("p.token_hash = t.paired_hash AND p.paired_hash = t.token_hash")) == [(0,)]
    assert sqlite_rows(path, "SELECT count(*) > 0 FROM oauth_tokens") == [(1,)]
    assert sqlite_rows(path, "PRAGMA foreign_key_check") == []
    assert sqlite_rows(path, "PRAGMA integrity_check") == [("ok",)]
