"""The cost of a larger file: bytes per pair, and verifications and refreshes with up to a million rows."""

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contenders import Provider, new_provider
from benchmarks.databases import new_file
from benchmarks.steps import REFRESH, VERIFY_ANEW, Grants
from benchmarks.timing import Measure, take_turns
from oauth_store.database.models import ACCESS
from oauth_store.database.models import REFRESH as REFRESH_TOKEN
from tests.steps import RESOURCE

CLIENTS = 100
BATCH = 5_000
VERIFY, REFRESH_BY_ROWS = "verify, by number of rows", "load and exchange a refresh token, by number of rows"
BYTES_PER_PAIR = "bytes per pair, indexes included"
_INSERT = (
    "INSERT INTO oauth_tokens (token_hash, kind, paired_hash, grant_id, client_id, subject, scopes, resource,"
    " created_at, expires_at, first_used_at) VALUES (?, ?, ?, ?, ?, 'owner', 'read write', ?, ?, ?, ?)"
)


async def filled_file(directory: Path, rows: int) -> tuple[str, float]:
    """Return the path of a file with `rows` tokens, inserted pair by pair, and the bytes per pair."""
    path = await new_file(directory, f"rows-{rows}")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # nothing is measured here, and a power cut may destroy the file
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -1000000")
        connection.execute("PRAGMA wal_autocheckpoint = 100000")
        now = int(time.time())
        connection.executemany(
            "INSERT INTO oauth_clients (client_id, client_metadata, created_at, last_used_at) VALUES (?, '{}', ?, ?)",
            [(_client_id(number), now, now) for number in range(CLIENTS)],
        )
        before = _size(connection)
        for first in range(0, rows // 2, BATCH):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_INSERT, _tokens(now + first // 100, min(BATCH, rows // 2 - first)))
            connection.execute("COMMIT")
        size = _size(connection) - before
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return path, size / (rows // 2)


def _size(connection: sqlite3.Connection) -> int:
    pages, page_size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * page_size)


def _client_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"  # a UUID, as registration assigns them


def _tokens(now: int, pairs: int) -> Iterator[tuple[Any, ...]]:
    for _ in range(pairs):
        access, refresh, grant_id = random.randbytes(32), random.randbytes(32), random.randbytes(16)
        client_id = _client_id(random.randrange(CLIENTS))
        yield access, ACCESS, refresh, grant_id, client_id, RESOURCE, now, now + 3600, now
        yield refresh, REFRESH_TOKEN, access, grant_id, client_id, RESOURCE, now, now + 30 * 24 * 3600, now


async def measure_growth(directory: Path, sizes: list[int], *, rounds: int, seconds: float) -> list[Measure]:
    """Measure on files with each number of token rows, interleaved."""
    space = Measure(BYTES_PER_PAIR, "bytes")
    contenders, grants = {}, {}
    for rows in sizes:
        path, bytes_per_pair = await filled_file(directory, rows)
        space.add(label(rows), bytes_per_pair)
        contenders[label(rows)] = Provider(new_provider(path))
        grants[label(rows)] = Grants(contenders[label(rows)], seconds)
        await grants[label(rows)].prepare(used=128)
    measures = []
    for name, step in ((VERIFY, VERIFY_ANEW), (REFRESH_BY_ROWS, REFRESH)):
        turns = {rows: partial(own.turn, step, 1) for rows, own in grants.items()}
        measures.append(await take_turns(Measure(name, "us"), turns, rounds))
    for contender in contenders.values():
        await contender.close()
    return [space, *measures]


def label(rows: int) -> str:
    return f"{rows:,} rows"
