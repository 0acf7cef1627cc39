"""The commands `copy` and `backup`, as an operator types them."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oauth_store import backup as backing_up
from oauth_store import copying

DatabaseOption = Annotated[
    str | None,
    Parameter(name="--database", help="A file's path or a URL. Default: $MCP_OAUTH_DB.", show_default=False),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]


def copy(source: str, target: str, /, *, json: Json = False) -> None:
    """Copy everything from one database to another: clients stay authorized when their server moves.

    SOURCE and TARGET are paths or URLs. TARGET gets its schema where it has none, and must hold no rows. It gets all
    rows, or on any error none, and each is read back and compared. Stop the server first: what it writes during the
    copy is not in TARGET.
    """
    with _progress(shown=not json) as on_progress:
        copied = asyncio.run(copying.copy(source, target, on_progress=on_progress))
    if json:
        _print_json(asdict(copied))
    else:
        print(f"Copied and verified from {copied.source} to {copied.target}:")
        for table, rows in copied.rows.items():
            print(f"{rows:>12,} {table}")
    if copied.source_changed:
        print(
            f"oauth-store: {copied.source} was written to during the copy, so a server still uses it. What it wrote is "
            "not in the copy: stop it, and copy again into an empty database.",
            file=sys.stderr,
        )


def backup(file: str, /, *, database: DatabaseOption = None, json: Json = False) -> None:
    """Copy an SQLite database to FILE, which must not exist, while its server goes on.

    The copy is of one moment, is checked, and is readable by its owner alone (0600). To restore it, stop the server,
    delete the database with its -wal and -shm, and copy FILE into its place.
    """
    with _progress(shown=not json) as on_progress:
        done = backing_up.backup(database, file, on_progress=on_progress)
    if json:
        _print_json(asdict(done))
    else:
        print(f"{done.source} at schema {done.revision} is in {done.file}, checked ({done.size / 2**20:,.1f} MiB).")


@contextmanager
def _progress(*, shown: bool) -> Iterator[copying.Progress]:
    """Yield what draws a bar on a terminal, and nothing into a pipe."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bars: dict[str, int] = {}

        def on_progress(step: str, rows: int, total: int) -> None:
            if step not in bars:
                bars[step] = progress.add_task(f"{step:<10}", total=total)
            progress.advance(bars[step], rows)  # type: ignore[arg-type]  # a TaskID is an int

        yield on_progress


def _print_json(value: object) -> None:
    print(dumps(value, indent=2))
