"""The measures as JSON and as Markdown tables."""

import importlib.metadata
import os
import platform
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.targets import TARGETS
from benchmarks.timing import Measure
from tests.counting import Cost

PACKAGES = ("fastmcp", "mcp", "sqlalchemy", "aiosqlite", "asyncpg", "asyncmy", "cryptography", "pydantic", "uvicorn")


def as_json(measures: list[Measure], costs: Mapping[str, Mapping[str, Cost]], **run: Any) -> dict[str, Any]:
    """Return all measures, the machine and the run."""
    return {
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "run": run,
        "targets": [
            {
                "what": target.what,
                "bound": target.bound_text,
                **found.as_json(),
                "reached": target.reached(found),
            }
            for target in TARGETS
            if (found := target.found(measures)) is not None
        ],
        "measures": [measure.as_json() for measure in measures],
        "costs": {
            database: {step: [cost.statements, cost.transactions, cost.hops] for step, cost in steps.items()}
            for database, steps in costs.items()
        },
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return tables of the targets, all measures, and the statements, transactions and hops of each step."""
    machine, run = result["machine"], result["run"]
    lines = [
        "# Benchmark figures",
        "",
        f"{run['mode'].capitalize()} run of {run['date']}, {run['seconds']:.0f} s: {machine['processors']} processors "
        f"(load {machine['load_average']:.1f} at the end), Python {machine['python']}, SQLite {machine['sqlite']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        + f". The HTTP client took at most {run['busiest_client']:.0%} of one processor.",
        "",
        "## Targets",
        "",
        *_table(
            ("measure", "target", "median", "low to high", "reached"),
            (
                (
                    target["what"],
                    target["bound"],
                    _number(target["median"]),
                    f"{_number(target['low'])} to {_number(target['high'])}",
                    "yes" if target["reached"] else "**no**",
                )
                for target in result["targets"]
            ),
        ),
        "",
        "## All measures",
        "",
        *_figures(result["measures"]),
        "",
        "## Database work per step",
        "",
        *_costs(result["costs"]),
    ]
    return "\n".join(lines) + "\n"


def _figures(measures: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    return _table(
        ("measure", "tasks", "unit", "medians (low to high)"),
        (
            (
                measure["name"],
                str(measure["tasks"]),
                measure["unit"],
                "<br>".join(
                    f"{name}: {_number(values['median'])} ({_number(values['low'])} to {_number(values['high'])})"
                    for name, values in measure["contenders"].items()
                ),
            )
            for measure in measures
        ),
    )


def _costs(costs: Mapping[str, Mapping[str, list[int]]]) -> Iterable[str]:
    databases = list(costs)
    return _table(
        ("step", *(f"{database}: statements / transactions / hops" for database in databases)),
        (
            (step, *(" / ".join(map(str, costs[database][step])) for database in databases))
            for step in costs[databases[0]]
        ),
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
