"""Measure how long the event loop stalls: a ticker of 1 ms, while 64 tasks refresh."""

import asyncio
import time
from collections.abc import Mapping

from mcp.shared.auth import OAuthToken

from benchmarks.contenders import Contender
from benchmarks.timing import Measure
from tests.steps import new_client

TICK_SECONDS = 0.001
TASKS = 64
STALL_P99, STALL_MAX = "ticker lateness, p99", "ticker lateness, max"
IDLE = "idle loop"


async def measure_stalls(contenders: Mapping[str, Contender], *, rounds: int, seconds: float) -> list[Measure]:
    """Measure how late the ticks are, in milliseconds. `IDLE` shows the machine's own delays, on an idle loop."""
    p99, worst = Measure(STALL_P99, "ms", TASKS), Measure(STALL_MAX, "ms", TASKS)
    chains = {}
    for name, contender in contenders.items():
        contender.client = new_client()
        await contender.register(contender.client)
        chains[name] = [[await contender.sign_in(contender.client)] for _ in range(TASKS)]
    for number in range(rounds + 1):
        for name in [IDLE, *contenders]:
            ends = time.perf_counter() + seconds
            refreshes = [_refresh_until(ends, contenders[name], chain) for chain in chains.get(name, [])]
            ticks = asyncio.create_task(_tick_until(ends))
            await asyncio.gather(ticks, *refreshes)
            late = sorted(ticks.result())
            if number:  # the first round warms up
                p99.add(name, late[len(late) * 99 // 100] * 1e3)
                worst.add(name, late[-1] * 1e3)
    return [p99, worst]


async def _tick_until(ends: float) -> list[float]:
    late = []
    while (now := time.perf_counter()) < ends:
        await asyncio.sleep(TICK_SECONDS)
        late.append(time.perf_counter() - now - TICK_SECONDS)
    return late


async def _refresh_until(ends: float, contender: Contender, chain: list[OAuthToken]) -> None:
    while time.perf_counter() < ends:
        chain[0] = await contender.refresh(chain[0])
        await asyncio.sleep(0)  # like a server between two requests; InMemoryOAuthProvider never waits
