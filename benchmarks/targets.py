"""The targets: bounds for the medians of a run, most of them for ratios or differences taken per round."""

import operator
from dataclasses import dataclass

from benchmarks import growth, http, memory, stall, startup, steps
from benchmarks.contenders import BARE_ASYNCPG, IN_MEMORY, PLAIN_SQLITE, POSTGRESQL, SQLITE
from benchmarks.timing import Comparison, Measure, Samples


@dataclass(frozen=True)
class Target:
    """A bound for one contender's figure, or for how it compares with another contender's: by default, the ratio."""

    what: str
    measure: str
    contender: str
    bound: float
    reference: str | None = None
    tasks: int = 1
    at_least: bool = False
    by: Comparison = operator.truediv
    aim: float | None = None

    def found(self, measures: list[Measure]) -> Samples | None:
        """Return the figures of the rounds, or None if this was not measured."""
        for measure in measures:
            if measure.name == self.measure and measure.tasks == self.tasks and self.contender in measure.contenders:
                if self.reference is None:
                    return measure.contenders[self.contender]
                if self.reference in measure.contenders:
                    return measure.compare(self.contender, self.reference, self.by)
        return None

    def reached(self, found: Samples) -> bool:
        return found.median >= self.bound if self.at_least else found.median <= self.bound

    @property
    def bound_text(self) -> str:
        aim = f" (aim {self.aim:g})" if self.aim is not None else ""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}{aim}"


SMALL, LARGE = growth.label(1_000), growth.label(1_000_000)
TARGETS = (
    Target(
        "tools/call per second over HTTP, 1 connection, SQLite against InMemoryOAuthProvider",
        http.CALLS,
        SQLITE,
        0.95,
        IN_MEMORY,
        at_least=True,
    ),
    Target("the same, 16 connections", http.CALLS, SQLITE, 0.97, IN_MEMORY, tasks=16, at_least=True),
    Target("verify a token seen before, SQLite against plain sqlite3", steps.VERIFY_AGAIN, SQLITE, 1, PLAIN_SQLITE),
    Target(
        "verify a token not seen before, SQLite against plain sqlite3",
        steps.VERIFY_ANEW,
        SQLITE,
        50,
        PLAIN_SQLITE,
        aim=20,
    ),
    Target(
        "load and exchange a refresh token, SQLite against plain sqlite3, both synchronous=FULL",
        steps.REFRESH,
        SQLITE,
        10,
        PLAIN_SQLITE,
        aim=6,
    ),
    Target(
        "flows per second over HTTP, 1 connection, SQLite against InMemoryOAuthProvider",
        http.FLOWS,
        SQLITE,
        0.25,
        IN_MEMORY,
        at_least=True,
    ),
    Target(
        "refreshes per second over HTTP, 1 connection, SQLite against InMemoryOAuthProvider",
        http.REFRESHES,
        SQLITE,
        0.25,
        IN_MEMORY,
        at_least=True,
    ),
    Target(
        "lateness of a 1 ms ticker while 64 tasks refresh, p99 in ms, SQLite",
        stall.STALL_P99,
        SQLITE,
        5,
        tasks=stall.TASKS,
    ),
    Target("the same, the latest tick", stall.STALL_MAX, SQLITE, 25, tasks=stall.TASKS),
    Target("verify at 1,000,000 rows against 1,000, SQLite", growth.VERIFY, LARGE, 1.5, SMALL),
    Target(
        "load and exchange a refresh token at 1,000,000 rows against 1,000, SQLite",
        growth.REFRESH_BY_ROWS,
        LARGE,
        1.5,
        SMALL,
    ),
    Target(
        "bytes per pair at 100,000 pairs, indexes included, SQLite", growth.BYTES_PER_PAIR, growth.label(200_000), 700
    ),
    Target(
        "refreshes per second of two workers on one SQLite file against one",
        http.WORKERS,
        http.TWO_WORKERS,
        1.5,
        http.ONE_WORKER,
        tasks=8,
        at_least=True,
    ),
    Target(
        "verify on PostgreSQL against one bare asyncpg round trip of its select",
        steps.VERIFY_ANEW,
        POSTGRESQL,
        4,
        BARE_ASYNCPG,
        aim=2.5,
    ),
    Target("start of a process, against one with InMemoryOAuthProvider", startup.START_UP, SQLITE, 1.1, IN_MEMORY),
    Target(
        "start of a process, against one with InMemoryOAuthProvider that imports SQLAlchemy",
        startup.START_UP,
        SQLITE,
        1.05,
        startup.SQLALCHEMY_ALONE,
    ),
    Target(
        "memory of a server with one client, MiB more than with InMemoryOAuthProvider",
        memory.MEMORY,
        SQLITE,
        25,
        IN_MEMORY,
        by=operator.sub,
    ),
)
