"""Many processes on one database, each with many tasks: no error of any kind, and nothing granted twice."""

import asyncio
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from oauth_store.credentials import hash_secret
from oauth_store.database.models import REFRESH, Token
from tests.chaos import Child, join_crowd, new_provider, refresh_with_tasks
from tests.databases import rows_of

PROCESSES = 4
TASKS = 8
SECONDS = float(os.environ.get("OAUTH_STORE_STRESS_SECONDS", "5"))


def kind_of(database_url: str) -> str:
    """What a figure is about."""
    return database_url.partition("://")[0] if "://" in database_url else "sqlite"


async def test_a_crowd_sees_no_error_and_no_double_grant(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 processes of 8 tasks sign in, verify, refresh, repeat and revoke: no error, and one answer to each secret.

    They also present each other's codes and refresh tokens, at once or later. OAUTH_STORE_STRESS_SECONDS says how long.
    """
    children = [Child(join_crowd, database_url, tmp_path, SECONDS, TASKS) for _ in range(PROCESSES)]
    try:
        for child in children:
            assert child.receive() == "ready"
        for child in children:
            child.pipe.send("go")
        reports: list[dict[str, Any]] = [await asyncio.to_thread(child.receive, SECONDS + 120) for child in children]
    finally:
        for child in children:
            child.kill()

    operations: Counter[str] = Counter()
    pairs: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for report in reports:
        operations.update(report["operations"])
        for presented, access_token, refresh_token in report["answers"]:
            pairs[presented].add((access_token, refresh_token))
    wrong = [line for report in reports for line in report["wrong"]]
    twice = sum(len(answers) > 1 for presented, answers in pairs.items() if presented.startswith("code_"))
    twice += await forks(database_url)
    repeated = sum(len(report["answers"]) for report in reports) - len(pairs)
    with capsys.disabled():
        print(
            f"\n{kind_of(database_url)}: {operations.total()} operations in {SECONDS:.0f} s by {PROCESSES} x {TASKS} "
            f"tasks {dict(operations)}, {repeated} repeated answers, {len(wrong)} errors, {twice} double grants"
        )
    assert wrong == []
    assert twice == 0
    assert repeated > 0, "no secret was presented twice"
    assert all(operations[step] for step in ("register", "authorize", "exchange", "refresh", "verify", "revoke"))
    await nothing_of_a_revoked_grant_lives(
        database_url, pairs, [last for report in reports for last in report["revoked"]]
    )


async def forks(database_url: str) -> int:
    """How many pairs stand beside another that was not refreshed either: each refresh consumes one for a new one."""
    async with new_provider(database_url) as provider:
        await provider.check_schema()
        newest = select(Token.grant_id).where(Token.kind == REFRESH, Token.consumed_at.is_(None))
        grants = Counter(row.grant_id for row in await rows_of(provider, newest))
    return grants.total() - len(grants)


async def nothing_of_a_revoked_grant_lives(
    database_url: str, pairs: dict[str, set[tuple[str, str]]], revoked: list[str]
) -> None:
    """Follow each revoked refresh token to what anyone got for it, before, after, or at that moment."""
    assert revoked
    dead = set(revoked)
    following = dead
    while following := {token for presented in following for pair in pairs.get(presented, ()) for token in pair} - dead:
        dead |= following
    async with new_provider(database_url) as provider:
        await provider.check_schema()
        for token in dead:
            live = select(Token).where(Token.token_hash == hash_secret(token), Token.revoked_at.is_(None))
            assert await rows_of(provider, live) == [], "a successor outlived the revocation"


async def test_refreshes_do_not_hold_up_the_loop(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """64 tasks that do nothing but refresh, in one process, leave a 1 ms ticker its turns."""
    with Child(refresh_with_tasks, database_url, SECONDS / 2, 64) as child:
        figures = await asyncio.to_thread(child.receive, SECONDS / 2 + 120)
    with capsys.disabled():
        print(
            f"\n{kind_of(database_url)}: {figures['refreshes_per_second']:.0f} refreshes/s with 64 tasks, "
            f"longest stall of the ticker {figures['longest_stall'] * 1000:.0f} ms, "
            f"p99 {figures['p99_stall'] * 1000:.1f} ms"
        )
    assert figures["refreshes_per_second"] > 0
    assert figures["longest_stall"] < 2
