"""Measure everything and write docs/benchmarks/: `python -m benchmarks [--quick]`."""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider

from benchmarks import plot, report
from benchmarks.contenders import (
    BARE_ASYNCPG,
    IN_MEMORY,
    PLAIN_SQLITE,
    POSTGRESQL,
    SQLITE,
    BareAsyncpg,
    Contender,
    Provider,
    new_provider,
)
from benchmarks.databases import new_file, server_databases
from benchmarks.growth import measure_growth
from benchmarks.http import measure_http
from benchmarks.memory import measure_memory
from benchmarks.plain import PlainSQLite
from benchmarks.stall import measure_stalls
from benchmarks.startup import measure_start_up
from benchmarks.steps import measure_steps
from benchmarks.timing import Measure
from tests.counting import count_steps
from tests.steps import BASE_URL

DIRECTORY = Path(__file__).parent.parent / "docs" / "benchmarks"


async def measure(directory: Path, *, quick: bool) -> dict[str, Any]:
    """Measure everything in files of `directory`, and on the available database servers."""
    began = time.monotonic()
    rounds, seconds = (3, 0.01) if quick else (7, 0.06)
    measures: list[Measure] = []
    async with server_databases() as urls:
        contenders: dict[str, Contender] = {
            IN_MEMORY: Provider(InMemoryOAuthProvider(base_url=BASE_URL)),
            PLAIN_SQLITE: PlainSQLite(await new_file(directory, "plain")),
            SQLITE: Provider(new_provider(await new_file(directory, "ours"))),
            **{name: Provider(new_provider(url)) for name, url in urls.items()},
            BARE_ASYNCPG: await BareAsyncpg.connect(urls[POSTGRESQL]),
        }
        _say("steps in process")
        measures += await measure_steps(
            contenders,
            rounds=rounds,
            seconds=seconds,
            used=64 if quick else 256,
            tasks=(1,) if quick else (1, 16, 64),
        )
        _say("event loop stalls")
        stalled = {name: contenders[name] for name in (IN_MEMORY, SQLITE, POSTGRESQL)}
        measures += await measure_stalls(stalled, rounds=rounds, seconds=10 * seconds)
        for contender in contenders.values():
            await contender.close()
        _say("over HTTP")
        databases = {SQLITE: str(directory / "http.db")}
        if not quick:
            databases[POSTGRESQL] = urls[POSTGRESQL]
        found, client_share = await measure_http(databases, rounds=rounds, seconds=0.3 if quick else 1)
        measures += found
        _say("statements and hops")
        costs = {
            SQLITE: await count_steps(str(directory / "costs.db")),
            POSTGRESQL: await count_steps(urls[POSTGRESQL]),
        }
    _say("files of up to a million rows" if not quick else "files of up to 200,000 rows")
    sizes = [1_000, 200_000] if quick else [1_000, 200_000, 1_000_000]
    measures += await measure_growth(directory, sizes, rounds=rounds, seconds=seconds)
    _say("process start")
    measures.append(await measure_start_up(rounds=2 if quick else 9))
    _say("memory")
    measures += await measure_memory(directory, rounds=2 if quick else rounds)
    return report.as_json(
        measures,
        costs,
        mode="quick" if quick else "full",
        date=time.strftime("%Y-%m-%d"),
        seconds=time.monotonic() - began,
        rounds=rounds,
        busiest_client=client_share,
    )


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def main() -> None:
    """Write figures.json, figures.md and figures.png, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run fewer and shorter rounds, in under a minute")
    parser.add_argument(
        "--output", type=Path, help="output directory (default: docs/benchmarks, or build/benchmarks with --quick)"
    )
    options = parser.parse_args()
    output = options.output or (Path("build") / "benchmarks" if options.quick else DIRECTORY)
    logging.getLogger("oauth_store").setLevel(logging.WARNING)  # the default of a server
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(measure(Path(directory), quick=options.quick))
    output.mkdir(parents=True, exist_ok=True)
    (output / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    tables = report.as_markdown(result)
    (output / "figures.md").write_text(tables)
    plot.draw(result, output / "figures.png")
    print(tables)


if __name__ == "__main__":
    main()
