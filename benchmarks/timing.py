"""Rounds that take turns: the machine drifts, so what is compared runs in the same round, and ratios are per round."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Operation = Callable[[Any], Awaitable[Any]]
"""What is timed. It takes an item, and what it returns is the item of its next turn."""


@dataclass
class Samples:
    """What one contender reached in each round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def as_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "low": min(self.rounds),
            "high": max(self.rounds),
            "rounds": [float(f"{value:.4g}") for value in self.rounds],
        }


@dataclass
class Measure:
    """One thing that was measured, of several contenders, at one concurrency."""

    name: str
    unit: str
    tasks: int = 1
    contenders: dict[str, Samples] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        self.contenders.setdefault(contender, Samples()).rounds.append(value)

    def ratio(self, contender: str, reference: str) -> Samples:
        """Return the ratios of the rounds."""
        pairs = zip(self.contenders[contender].rounds, self.contenders[reference].rounds, strict=True)
        return Samples([one / other for one, other in pairs])

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "tasks": self.tasks,
            "contenders": {name: samples.as_json() for name, samples in self.contenders.items()},
        }


async def seconds_per_call(operation: Operation, items: Sequence[Any], tasks: int, turns: int = 1) -> float:
    """Run `operation` on every item `turns` times, the items dealt to so many tasks, and return seconds per call."""

    async def work(own: Sequence[Any]) -> None:
        for item in own:
            for _ in range(turns):
                item = await operation(item)

    hands = [items[number::tasks] for number in range(tasks)]
    began = time.perf_counter()
    await asyncio.gather(*(work(hand) for hand in hands))
    return (time.perf_counter() - began) / (len(items) * turns)


async def take_turns(
    measure: Measure, contenders: Mapping[str, Callable[[], Awaitable[float]]], rounds: int
) -> Measure:
    """Let each contender have its turn in every round, each time in another order, after one turn that is thrown away.

    A contender's turn returns the value of the round.
    """
    names = list(contenders)
    for name in names:
        await contenders[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measure.add(name, await contenders[name]())
    return measure
