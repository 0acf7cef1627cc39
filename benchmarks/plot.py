"""Draw the picture: how long each step takes in process, and the rates over HTTP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from benchmarks.contenders import BARE_ASYNCPG, IN_MEMORY, MARIADB, PLAIN_SQLITE, POSTGRESQL, SQLITE

COLORS = {
    PLAIN_SQLITE: "#9aa5b1",
    BARE_ASYNCPG: "#cbd2d9",
    IN_MEMORY: "#f0b429",
    SQLITE: "#1a56b0",
    POSTGRESQL: "#2d8659",
    MARIADB: "#a05195",
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw bars of the medians with the spread of the rounds, for one task in process and one connection over HTTP."""
    measures = [measure for measure in result["measures"] if measure["tasks"] == 1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6.5), width_ratios=(7, 3), layout="constrained")
    _bars(left, [measure for measure in measures if measure["unit"] == "us" and IN_MEMORY in measure["contenders"]])
    left.set_xlabel("microseconds per call (log scale, less is better)")
    left.set_title("In process, one task")
    _bars(right, [measure for measure in measures if measure["unit"] == "/s"])
    right.set_xlabel("per second (log scale, more is better)")
    right.set_title("Over HTTP, one connection")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, measures: list[Mapping[str, Any]]) -> None:
    names = [name for name in COLORS if any(name in measure["contenders"] for measure in measures)]
    height = 0.85 / len(names)
    for number, name in enumerate(names):
        found = [
            (row, measure["contenders"][name]) for row, measure in enumerate(measures) if name in measure["contenders"]
        ]
        medians = [values["median"] for _, values in found]
        axes.barh(
            [row + (number - (len(names) - 1) / 2) * height for row, _ in found],
            medians,
            height,
            label=name,
            color=COLORS[name],
            xerr=[
                [median - values["low"] for median, (_, values) in zip(medians, found, strict=True)],
                [values["high"] - median for median, (_, values) in zip(medians, found, strict=True)],
            ],
            error_kw={"elinewidth": 0.8, "ecolor": "#52606d"},
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(measures)), [measure["name"] for measure in measures])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
