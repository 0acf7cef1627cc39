"""The commands `copy`, `backup` and `doctor`."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from oauth_store.cli.terminal import DatabaseOption, Json, print_json
from oauth_store.database import backup as backing_up
from oauth_store.database import copy as copying
from oauth_store.display import one_line
from oauth_store.doctor.finding import Finding


def copy(source: str, target: str, /, *, json: Json = False) -> None:
    """Copy all rows from one database to another, so that clients stay authorized when the server moves.

    SOURCE and TARGET are paths or URLs. TARGET must have no rows; its tables are created if they are missing. It gets
    all rows or, on any error, none; each row is read back and compared. Stop the server first: rows that it writes
    during the copy are not in TARGET.
    """
    with _progress(shown=not json) as on_progress:
        copied = asyncio.run(copying.copy(source, target, on_progress=on_progress))
    if json:
        print_json(asdict(copied))
    else:
        print(f"Copied from {copied.source} to {copied.target}, and verified:")
        for table, rows in copied.rows.items():
            print(f"{rows:>12,} {table}")
    if copied.source_changed:
        print(
            f"oauth-store: {copied.source} was written to during the copy, so a server still uses it, and the copy "
            "lacks those writes; stop the server, and copy again into an empty database",
            file=sys.stderr,
        )


def backup(file: str, /, *, database: DatabaseOption = None, json: Json = False) -> None:
    """Back up an SQLite database to FILE, which must not exist, while its server runs.

    The backup is a consistent snapshot, verified, and readable only by its owner (0600). To restore it, stop the
    server, delete the database with its -wal and -shm, and copy FILE to its place.
    """
    with _progress(shown=not json) as on_progress:
        done = backing_up.backup(database, file, on_progress=on_progress)
    if json:
        print_json(asdict(done))
    else:
        size = f"{done.size / 2**20:,.1f} MiB"
        print(f"Backed up {done.source} at schema {done.revision} to {done.file}, and verified it ({size}).")


def doctor(
    *,
    database: Annotated[
        str | None,
        Parameter(name="--database", help="A file's path or a URL. Default: $MCP_OAUTH_DB.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        Parameter(name="--url", help="Check the server from outside too: the URL that you enter in a client."),
    ] = None,
    json: Json = False,
) -> None:
    """Find problems that keep clients out, or soon will, and print the fix. Exits with 1 if there is a problem.

    The doctor changes, registers and authorizes nothing; it tries a write, and rolls it back. With --url, it sends the
    requests that a client sends before it signs in. It contacts no other host but claude.ai, for Claude's metadata
    document. With --url, and neither --database nor MCP_OAUTH_DB set, it checks only the server.
    """
    from oauth_store.doctor.examine import examine  # imports FastMCP, which no other command needs

    findings = []
    console = Console()
    try:
        for finding in examine(database, url):
            findings.append(finding)
            if not json:
                _print_finding(console, finding)
    except (KeyboardInterrupt, asyncio.CancelledError):
        if json:
            print_json({"ok": False, "findings": [asdict(finding) for finding in findings]})
        raise
    problems = [finding for finding in findings if finding.level == "problem"]
    if json:
        print_json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    if problems:
        raise SystemExit(1)


SHOWN_LENGTH = 1000
"""Maximum characters printed of a finding: a server may send 64 KiB."""
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def _print_finding(console: Console, finding: Finding) -> None:
    level = f"{finding.level:<8}", _STYLES[finding.level]
    console.print(Text.assemble(level, f" {finding.check}: {one_line(finding.found[:SHOWN_LENGTH])}"), soft_wrap=True)
    if finding.advice:
        console.print(Text(f"         -> {one_line(finding.advice[:SHOWN_LENGTH])}"), soft_wrap=True)


@contextmanager
def _progress(*, shown: bool) -> Iterator[copying.Progress]:
    """Yield a callback that draws a progress bar on a terminal, and nothing in a pipe."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bars: dict[str, int] = {}

        def on_progress(step: str, rows: int, total: int) -> None:
            if step not in bars:
                bars[step] = progress.add_task(f"{step:<10}", total=total)
            progress.advance(bars[step], rows)  # type: ignore[arg-type]  # a TaskID is an int

        yield on_progress
