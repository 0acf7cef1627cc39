"""Rounds in which contenders take turns: machines drift, so compared code runs in one round, with ratios per round."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Operation = Callable[[Any], Awaitable[Any]]
"""A timed operation. It takes an item and returns the item of its next turn."""
Comparison = Callable[[float, float], float]
"""The ratio of two figures, or their difference."""


@dataclass
class Samples:
    """The figures of one contender, by round."""

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
    """One measure of several contenders, with one number of tasks."""

    name: str
    unit: str
    tasks: int = 1
    contenders: dict[str, Samples] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        self.contenders.setdefault(contender, Samples()).rounds.append(value)

    def compare(self, contender: str, reference: str, by: Comparison) -> Samples:
        """Return the comparison of each round."""
        return Samples(list(map(by, self.contenders[contender].rounds, self.contenders[reference].rounds)))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "tasks": self.tasks,
            "contenders": {name: samples.as_json() for name, samples in self.contenders.items()},
        }


async def seconds_per_call(operation: Operation, items: Sequence[Any], tasks: int, turns: int = 1) -> float:
    """Run `operation` `turns` times on every item, with the items dealt to `tasks` tasks. Return seconds per call."""

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
    """Give each contender a turn in every round, in a different order each time, after a warm-up that is discarded.

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
