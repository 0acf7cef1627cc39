"""Shared by the commands: their options, the database, output, questions and errors."""

import asyncio
import getpass
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from cyclopts import Parameter
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from oauth_store.database import schema
from oauth_store.database.files import file_kind
from oauth_store.database.store import Store
from oauth_store.database.url import is_memory
from oauth_store.display import one_line
from oauth_store.errors import ConfigurationError, DatabaseUnavailable, OAuthStoreError, SchemaError

P = ParamSpec("P")
T = TypeVar("T")

DatabaseOption = Annotated[
    str | None,
    Parameter(
        name="--database",
        help="A file's path or a URL. Default: $MCP_OAUTH_DB, else mcp_oauth.db in the working directory.",
        show_default=False,
    ),
]


def flag(*names: str, **options: Any) -> Parameter:
    """Return an option that is off by default."""
    return Parameter(name=names, negative="", show_default=False, **options)


Json = Annotated[bool, flag("--json", help="Print one JSON document, for scripts.")]
Yes = Annotated[bool, flag("--yes", "-y", help="Do not ask for confirmation.")]
Verbose = Annotated[bool, flag("--verbose", "-v", help="Log each event to standard error.")]
Limit = Annotated[int, Parameter(name="--limit", help="Maximum rows to show, or 0 for all.")]

LIMIT = 50
LINE = 100
"""Maximum columns of a paragraph."""
MANY = 1000
"""Maximum rows to lay out as a table that fits the terminal."""
_NARROW = 60
"""On a terminal with fewer columns, each value of a table is on a line of its own."""


async def require(store: Store) -> None:
    """Raise `OAuthStoreError` unless a database exists and is at the schema of this release. Creates nothing."""
    require_file(store.url)
    revision = await schema.state(store)
    if revision == schema.EMPTY:
        raise SchemaError(f"{store.display_name} is empty; {_NAME_IT}, or run `oauth-store upgrade`")
    schema.check(revision, store.display_name)


class OpenStore:
    """A database that is open for a command, which runs its steps one after the other."""

    def __init__(self, store: Store, runner: asyncio.Runner) -> None:
        self.store = store
        self._runner = runner

    def revision(self) -> str:
        """Return the schema revision of the database: see `schema.state`."""
        return self._runner.run(schema.state(self.store))

    def read(self, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step that reads: see `Store.read`."""
        return self._runner.run(self.store.read(step, *args, **kwargs))

    def write(self, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step that writes: see `Store.write`."""
        return self._runner.run(self.store.write(step, *args, **kwargs))


@contextmanager
def opened(setting: str | None, check: Callable[[Store], Awaitable[None]] = require) -> Iterator[OpenStore]:
    """Open a database for a command, if `check` accepts it. Raises `OAuthStoreError`."""
    store = Store(setting, check)
    with asyncio.Runner() as runner:
        try:
            runner.run(store.open())
            yield OpenStore(store, runner)
        finally:
            runner.run(store.close())


_NAME_IT = "name the server's database with --database or MCP_OAUTH_DB"


def require_file(url: URL, *, missing_ok: bool = False) -> bool:
    """Return whether a database exists, as far as can be seen from outside. Opens and creates nothing.

    Raises `OAuthStoreError` for anything that cannot be the database of a server.
    """
    if is_memory(url):
        raise ConfigurationError(f"an in-memory database exists only inside its server; {_NAME_IT}")
    if url.get_backend_name() != "sqlite":
        return True
    path = Path(str(url.database))
    try:
        kind = file_kind(path.stat().st_mode)
    except FileNotFoundError:
        if missing_ok:
            return False
        raise SchemaError(f"{path} does not exist; {_NAME_IT}, or run `oauth-store upgrade` to create it") from None
    except OSError as error:
        advice = _AS_ITS_USER if isinstance(error, PermissionError) else _NAME_IT
        raise DatabaseUnavailable(f"{path} cannot be accessed: {os.strerror(error.errno or 0)}; {advice}") from error
    if kind != "a file":
        raise SchemaError(f"{path} is {kind}; {_NAME_IT}")
    if not os.access(path, os.R_OK):
        raise DatabaseUnavailable(f"{path} is not readable by {operator()}; {_AS_ITS_USER}")
    return True


_AS_ITS_USER = "run this as the server's user"


def operator() -> str:
    """Return the name of the user who runs this command, even with sudo."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in many containers
        return f"user {os.getuid()}"


def log_events() -> None:
    """Log the events of this command to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("oauth_store")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, in ASCII, so that no control character of a client reaches the terminal."""
    print(dumps(document, indent=2))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> None:
    """Print rows as a table that fits the terminal, or, in a pipe or a file, each row on one line.

    The `whole` columns are never broken, so that they can be copied. Markup is not interpreted, and control characters
    are removed.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal and console.width < _NARROW:
        for row in rows:
            width = max(map(len, columns))
            for column, value in zip(columns, row, strict=True):
                print(f"{column:<{width}}  {one_line(value)}")
            print()
        return
    lines = [[one_line(value) for value in row] for row in rows]
    if not console.is_terminal or len(rows) > MANY:
        _print_lines(columns, lines, numbers)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, no_wrap=column in whole, overflow="fold", justify=justify)
    for row in lines:
        table.add_row(*map(Text, row))
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _print_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
    """Print each row on one line. Rich takes half a minute for 100,000."""
    lengths = [[cell_len(value) for value in row] for row in (columns, *rows)]
    widths = [max(column) for column in zip(*lengths, strict=True)]
    right = [column in numbers for column in columns]
    for row, taken in zip((columns, *rows), lengths, strict=True):
        padding = [" " * (width - length) for width, length in zip(widths, taken, strict=True)]
        cells = [
            pad + value if to_right else value + pad for value, pad, to_right in zip(row, padding, right, strict=True)
        ]
        print("   ".join(cells).rstrip())
        if row is columns:
            print("─" * (sum(widths) + 3 * len(widths) - 3))


def print_text(text: str) -> None:
    """Print a paragraph wrapped to the terminal, or, in a pipe or a file, on one line."""
    print()
    wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    print(textwrap.fill(one_line(text), max(20, min(wide, LINE))) if wide != sys.maxsize else one_line(text))


def print_more(number: int, noun: str, how: str) -> None:
    """Print how many more rows there are, and how to see them."""
    if number > 0:
        print(f"\nAnd {counted(number, f'more {noun}')}; {how}.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask on standard error, unless `yes`. Raises `OAuthStoreError` unless the answer is yes."""
    if yes:
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not (answer.endswith("\n") and sys.stdin.isatty()):
        print(file=sys.stderr)
    if not answer:
        raise OAuthStoreError("no answer, so nothing was changed; pass --yes in scripts")
    if answer.strip().lower() not in ("y", "yes"):
        raise OAuthStoreError("nothing was changed")


class _OfServer(Protocol):
    @property
    def resource(self) -> str | None: ...


Row = TypeVar("Row", bound=_OfServer)


def print_by_server(listed: Sequence[Row], print_rows: Callable[[list[Row]], None]) -> None:
    """Print rows in tables, each under the server of its rows if there are several servers."""
    servers = dict.fromkeys(row.resource for row in listed)
    for place, server in enumerate(servers):
        if len(servers) > 1:
            print(f"{chr(10) if place else ''}{one_line(server or 'no server named')}")
        print_rows([row for row in listed if row.resource == server])


def counted(number: int, noun: str) -> str:
    """Return "1 grant", "2 grants"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
