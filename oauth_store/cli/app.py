"""`oauth-store`: the commands for a whole database, and the exit codes and errors of all commands."""

import asyncio
import logging
import os
import sys
import time
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated, Any

from cyclopts import App
from rich.console import Console

from oauth_store.cli.browser import browser_app
from oauth_store.cli.clients import clients_app
from oauth_store.cli.grants import explain, grants, revoke
from oauth_store.cli.maintenance import backup, copy, doctor
from oauth_store.cli.passkey import passkey_app
from oauth_store.cli.password import hash_password
from oauth_store.cli.scopes import scopes
from oauth_store.cli.terminal import (
    DatabaseOption,
    Json,
    OpenStore,
    Verbose,
    Yes,
    confirm,
    counted,
    flag,
    log_events,
    opened,
    print_json,
    print_table,
    print_text,
    require_file,
)
from oauth_store.cli.token import token_app
from oauth_store.database import schema
from oauth_store.database.purge import purge as purge_batch
from oauth_store.database.purge import purgeable
from oauth_store.database.status import Inventory, as_json, take_inventory
from oauth_store.database.store import Store
from oauth_store.database.url import database_url, display_name
from oauth_store.display import ago, one_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit

PURGE_BATCH = 1000

app = App(
    name="oauth-store",
    help="List, revoke and explain the grants of a FastMCP server, and maintain its database.",
    help_epilogue="Exit codes: 0 success, 1 error or a problem was found, 2 usage error, 130 interrupted.",
    version=lambda: version("fastmcp-oauth-store"),
)
app.register_install_completion_command(
    name="--install-completion", help="Install completion of commands and options in your shell."
)
app.command(grants)
app.command(revoke)
app.command(scopes)
app.command(explain)
app.command(token_app)
app.command(passkey_app)
app.command(browser_app)
app.command(clients_app)
app.command(hash_password)
app.command(copy)
app.command(backup)
app.command(doctor)

Sql = Annotated[bool, flag("--sql", help="Print the SQL instead of running it.")]


@app.command
def status(*, database: DatabaseOption = None, json: Json = False) -> int:
    """Show the schema revision of the database, its size, and how many rows are in use.

    Exits with 1 if a server of this release cannot use the database as it is.
    """
    url = database_url(database)
    report: dict[str, Any] = {"database": display_name(url), "schema_found": None, "schema_needed": schema.HEAD}
    report["problem"] = None
    inventory: Inventory | None = None
    try:
        if require_file(url, missing_ok=True):
            with opened(database, _any_schema) as store:
                report["schema_found"], inventory = _look(store)
            if report["schema_found"] is not None:
                schema.check(report["schema_found"], report["database"])
    except OAuthStoreError as error:
        if not json:
            raise
        report["problem"] = str(error)
    if json:
        print_json({**report, **({} if inventory is None else as_json(inventory))})
    elif inventory is None:
        name = report["database"]
        if require_file(url, missing_ok=True):
            print(f"{name} has no tables yet. The server creates them at first use, or `oauth-store upgrade` does now.")
        else:
            print(f"{name} does not exist yet. The server creates it at first use, or `oauth-store upgrade` does now.")
    else:
        print(f"{report['database']} is at schema {report['schema_found']}, which this release needs.")
        _print_inventory(inventory)
    return 0 if report["problem"] is None else 1


async def _any_schema(_store: Store) -> None:
    """Accept a database at any schema."""


def _look(store: OpenStore) -> tuple[str | None, Inventory | None]:
    revision = store.revision()
    if revision != schema.HEAD:
        return None if revision == schema.EMPTY else revision, None
    return revision, store.read(take_inventory, store.store, int(time.time()))


def _print_inventory(inventory: Inventory) -> None:
    now = int(time.time())
    grants = counted(inventory.live_grants, "live grant")
    if inventory.oldest_grant_at is not None:
        oldest, newest = ago(inventory.oldest_grant_at, now), ago(inventory.newest_grant_at, now)
        grants += f" (oldest: {oldest}, newest: {newest})"
    print(f"It takes {inventory.size_bytes / 1e6:,.1f} MB and has {grants}.\n")
    rows = [
        [name, *(f"{number:,}" for number in (rows.rows, rows.live, rows.expired, rows.idle))]
        for name, rows in inventory.tables.items()
    ]
    print_table(["Table", "Rows", "Live", "Expired", "Idle"], rows, numbers=["Rows", "Live", "Expired", "Idle"])
    print_text(
        "The server deletes expired rows; `oauth-store purge` deletes them now. Idle rows are kept: clients may come "
        "back, and a second use of a code or token must be detected."
    )


@app.command
def purge(
    *,
    database: DatabaseOption = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Count the rows, but delete nothing.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Delete expired rows, and registrations that were not approved within 30 days.

    A server does this automatically, a little at a time. Nothing that can still be used is deleted.
    """
    if verbose:
        log_events()
    with opened(database) as store:
        deleted = store.read(purgeable, int(time.time())) if dry_run else _purge(store)
    if json:
        print_json({**deleted, "dry_run": dry_run})
    else:
        counts = ", ".join(counted(number, name.removesuffix("s")) for name, number in deleted.items())
        print(f"{'Would delete' if dry_run else 'Deleted'}: {counts}.")


def _purge(store: OpenStore) -> dict[str, int]:
    deleted = {"tokens": 0, "codes": 0, "clients": 0}
    try:
        while any(batched := store.write(purge_batch, int(time.time()), PURGE_BATCH)):
            deleted = {name: number + batched[name] for name, number in deleted.items()}
            if max(batched.values()) < PURGE_BATCH:
                break
    finally:
        if any(deleted.values()):
            emit("purged", **deleted)
    return deleted


@app.command
def upgrade(
    revision: str = "head", /, *, database: DatabaseOption = None, sql: Sql = False, json: Json = False
) -> None:
    """Migrate the database to the schema of this release, or to REVISION.

    After you install a new release, run it first, and then restart the server. For a VS-2 database, stop its server
    before.
    """
    with redirect_stdout(sys.stderr) if json else nullcontext():  # migrations may print messages
        output = schema.upgrade(database, revision, sql=sql)
    _print_migrated(database, schema.HEAD if revision == "head" else revision, output, sql=sql, json=json)


@app.command
def downgrade(
    revision: str,
    /,
    *,
    database: DatabaseOption = None,
    sql: Sql = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Migrate the database down to REVISION.

    Below 0002 this deletes all tokens: revision 0001 (VS-2) stores them in plain text, and only hashes are left.
    """
    confirm(f"Migrate the database down to {one_line(revision)}? Below 0002, this deletes all tokens.", yes=sql or yes)
    with redirect_stdout(sys.stderr) if json else nullcontext():
        output = schema.downgrade(database, revision, sql=sql)
    _print_migrated(database, revision, output, sql=sql, json=json)


def _print_migrated(setting: str | None, revision: str, output: str, *, sql: bool, json: bool) -> None:
    if json:
        result = {"sql": output} if sql else {"schema_found": revision}
        print_json({"database": display_name(database_url(setting)), **result})
    else:
        print(output if sql else f"The database is at schema {revision}.")


@app.command(name="alembic-ini")
def alembic_ini(*, json: Json = False) -> None:
    """Print the path of alembic.ini, for `alembic -c`."""
    if json:
        print_json({"alembic_ini": str(schema.alembic_ini())})
    else:
        print(schema.alembic_ini())


def main() -> None:
    """Run the command line. Errors are one line on standard error, with exit code 1."""
    logging.getLogger("oauth_store").addHandler(logging.NullHandler())  # an error is printed once, by the line below
    _open_streams()
    try:
        code = app(error_console=Console(stderr=True), result_action="return_value")
        sys.stdout.flush()
    except OAuthStoreError as error:
        sys.exit(f"oauth-store: {one_line(str(error))}")
    except (KeyboardInterrupt, asyncio.CancelledError, EOFError):  # of SIGINT, asyncio.run() may leave the second
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe: exit as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:  # from the output only: database errors are explained
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"oauth-store: cannot write the output: {error.strerror}")
    sys.exit(code)


def _open_streams() -> None:
    """Replace closed streams, and keep characters that a terminal cannot show from stopping a command."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (open until the process ends)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (the same)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (the same)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
