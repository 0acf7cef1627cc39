"""Fill an empty database with the rows of a busy server, for measurements on a large one.

    python -m benchmarks.fill large.db --grants 100000

Every client has ten grants of its own. Of a hundred grants, 20 are new; 50 were refreshed, and keep the consumed pair
with its sealed successor; 10 were revoked, 10 have expired, and 10 are idle: only the refresh token is live. The
database also has codes, sessions and clients that were never approved. At the end it prints a secret of each kind.
"""

import argparse
import asyncio
import itertools
import json
import random
import secrets
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Table, insert
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint, mint_grant_id
from oauth_store.database import schema
from oauth_store.database.models import ACCESS, REFRESH, SESSION, clients, codes, tokens
from oauth_store.database.store import Store
from oauth_store.sealing import seal

GRANTS_PER_CLIENT = 10
ROWS_PER_TRANSACTION = 20_000
HOUR, DAY = 3600, 24 * 3600
RESOURCE = "https://wiki.example.com/mcp"
APPLICATIONS = [
    ("Claude", "https://claude.ai/api/mcp/auth_callback"),
    ("Claude Code (wiki)", "http://localhost/callback"),
    ("ChatGPT", "https://chatgpt.com/connector_platform_oauth_redirect"),
    ("Visual Studio Code", "http://127.0.0.1:33418/"),
    ("Cursor", "cursor://anysphere.cursor-retrieval/oauth/callback"),
]
SUBJECTS = ["ada", "grace", "alan", "edsger", "barbara", None]

Row = tuple[Table, dict[str, Any]]
samples: dict[str, str] = {}


def client_rows(number: int, now: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield client ids with their rows, and unused clients with an empty id."""
    for index in range(number):
        client_id, (name, redirect_uri) = f"{random.getrandbits(128):032x}", APPLICATIONS[index % len(APPLICATIONS)]
        secret = mint("secret") if index % 10 == 0 else None
        metadata = {
            "client_id": client_id,
            "client_name": name,
            "redirect_uris": [redirect_uri],
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "token_endpoint_auth_method": "client_secret_post" if secret else "none",
            "scope": "read write",
        }
        if secret:
            samples["client secret"] = secret
        row = {
            "client_id": client_id,
            "client_metadata": json.dumps(metadata),
            "client_secret_hash": hash_secret(secret) if secret else None,
            "created_at": now - random.randrange(200 * DAY, 300 * DAY),
            "last_used_at": now - random.randrange(200 * DAY),
        }
        yield client_id, [(clients, row)]
        if index % 5 == 0:
            age = random.randrange(60 * DAY)
            unused = {**row, "client_id": f"{random.getrandbits(128):032x}", "client_secret_hash": None}
            yield "", [(clients, {**unused, "created_at": now - age, "last_used_at": None})]


def pair(grant: dict[str, Any], at: int, label: str, **more: Any) -> tuple[str, str, list[Row]]:
    """Return an access and a refresh token, and their rows."""
    access, refresh = mint("access"), mint("refresh")
    samples[f"{label} access token"], samples[f"{label} refresh token"] = access, refresh
    hashes = hash_secret(access), hash_secret(refresh)
    common = {
        "first_used_at": None,
        "consumed_at": None,
        "revoked_at": None,
        "revoked_reason": None,
        "replay": None,
        **grant,
        "created_at": at,
        **more,
    }
    return (
        access,
        refresh,
        [
            (tokens, {**common, "token_hash": hashes[0], "kind": ACCESS, "paired_hash": hashes[1]}
             | {"expires_at": at + HOUR, "replay": None}),
            (tokens, {**common, "token_hash": hashes[1], "kind": REFRESH, "paired_hash": hashes[0]}
             | {"expires_at": at + 30 * DAY}),
        ],
    )  # fmt: skip


def grant_rows(client_id: str, index: int, now: int) -> list[Row]:
    """Return the rows of one grant."""
    grant = {
        "grant_id": mint_grant_id(),
        "client_id": client_id,
        "subject": random.choice(SUBJECTS),
        "scopes": random.choice(["read", "read write", "read write offline_access"]),
        "resource": RESOURCE,
        "granted_at": None,
    }
    kind = index % 100
    recent = now - random.randrange(1, HOUR - 60)
    if kind < 20:
        return pair(grant, recent, "live")[2]
    if kind < 70:
        first = recent - random.randrange(HOUR, 20 * DAY)
        refreshed = {**grant, "granted_at": first}
        new_access, new_refresh, successor = pair(refreshed, recent, "refreshed", first_used_at=recent + 1)
        _, old_refresh, consumed = pair(grant, first, "rotated", consumed_at=recent, first_used_at=first)
        consumed[1][1]["replay"] = seal(old_refresh, new_access, new_refresh)
        return [*consumed, *successor]
    if kind < 80:
        reason = random.choice(["revoked by the client", "reuse detected", "revoked on the page by owner"])
        at = now - random.randrange(DAY, 20 * DAY)
        return pair(grant, at, "revoked", revoked_at=at + HOUR // 2, revoked_reason=reason)[2]
    if kind < 90:
        return pair(grant, now - random.randrange(31 * DAY, 60 * DAY), "expired")[2]
    return pair(grant, now - random.randrange(DAY, 29 * DAY), "idle")[2]


def other_rows(client_id: str, now: int) -> list[Row]:
    """Return a pending authorization request, a used code, and a session."""
    handle, code, session = mint("request"), mint("code"), mint("session")
    samples.update({"request": handle, "used code": code, "session": session})
    at = now - random.randrange(500)
    request = {
        "browser_hash": None,
        "client_id": client_id,
        "subject": None,
        "redirect_uri": "https://claude.ai/api/mcp/auth_callback",
        "redirect_uri_provided_explicitly": True,
        "code_challenge": secrets.token_urlsafe(32),
        "scopes": "read",
        "resource": RESOURCE,
        "state": None,
        "created_at": at,
        "expires_at": at + 600,
    }
    unanswered = {"handle_hash": hash_secret(handle), "code_hash": None, "approved_at": None, "consumed_at": None}
    used = {
        "handle_hash": secrets.token_bytes(32),
        "code_hash": hash_secret(code),
        "approved_at": at,
        "consumed_at": at,
    }
    signed_in = {
        "token_hash": hash_secret(session),
        "kind": SESSION,
        "grant_id": mint_grant_id(),
        "scopes": "",
        "subject": "owner",
        "created_at": at,
        "expires_at": at + 15 * 60,
    }
    unset = dict.fromkeys(column.name for column in tokens.c)
    return [
        (codes, {**request, **unanswered, "grant_id": mint_grant_id()}),
        (codes, {**request, **used, "grant_id": mint_grant_id()}),
        (tokens, {**unset, **signed_in}),
    ]


def all_rows(grants: int, now: int) -> Iterator[Row]:
    """Yield the rows of a whole database."""
    indexes = iter(range(grants))
    for client_id, rows in client_rows(-(-grants // GRANTS_PER_CLIENT), now):
        yield from rows
        if client_id:
            for index in itertools.islice(indexes, GRANTS_PER_CLIENT):
                yield from grant_rows(client_id, index, now)
            if random.random() < 0.1:
                yield from other_rows(client_id, now)


def insert_rows(session: Session, batch: list[Row]) -> None:
    """Insert rows of any of the three tables."""
    for table in (clients, codes, tokens):
        chosen = [values for where, values in batch if where is table]
        if chosen:
            session.connection().execute(insert(table), chosen)


async def fill(database_url: str, grants: int) -> int:
    """Migrate an empty database, fill it, and return the number of rows."""
    store = Store(database_url, schema.prepare)
    rows, total = all_rows(grants, int(time.time())), 0
    try:
        while batch := list(itertools.islice(rows, ROWS_PER_TRANSACTION)):
            total += len(batch)
            await store.write(insert_rows, batch)
    finally:
        await store.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", help="the path of a file, or a URL")
    parser.add_argument("--grants", type=int, default=100_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    total = asyncio.run(fill(arguments.database, arguments.grants))
    print(f"{total:,} rows of {arguments.grants:,} grants in {time.monotonic() - started:.0f} s")
    for name, secret in samples.items():
        print(f"{name + ':':25}{secret}")


if __name__ == "__main__":
    main()
