"""Clocks that tests turn."""

import time

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
