"""Clocks that tests turn."""

import asyncio
import time
from collections.abc import Callable

import time_machine

Clock = time_machine.Traveller


def turned(seconds: float) -> time_machine.travel:
    """A clock that goes on from so many seconds ahead; or, below zero, ago."""
    return time_machine.travel(time.time() + seconds)


def stopped(seconds: int = 0) -> time_machine.travel:
    """A clock that stands still at a full second, so many ahead, until the test moves it."""
    return stopped_at(int(time.time()) + seconds)


def stopped_at(second: int) -> time_machine.travel:
    """A clock that stands still at this second."""
    return time_machine.travel(second, tick=False)


def away(seconds: int) -> Callable[[], int]:
    """A time that is so many seconds away from the call."""
    return lambda: int(time.time()) + seconds


async def until(holds: Callable[[], bool]) -> None:
    """Wait, a minute at most, until something holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (it has no event)
            await asyncio.sleep(0.01)
