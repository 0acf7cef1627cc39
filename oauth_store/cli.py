"""`oauth-store`: what an operator runs."""

import asyncio
import getpass
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from oauth_store import schema
from oauth_store.database import Database
from oauth_store.errors import OAuthStoreError

SHORTEST_PASSWORD = 8
"""Characters of a password that `hash-password` takes."""

app = App(
    name="oauth-store",
    help="The OAuth store of a FastMCP server: its schema, and what stands in it.",
    version_flags=["--version"],
)

DatabaseOption = Annotated[
    str | None,
    Parameter(
        name="--database",
        help="A file's path or a URL. Default: $MCP_OAUTH_DB, else mcp_oauth.db in the working directory.",
        show_default=False,
    ),
]
Sql = Annotated[bool, Parameter(name="--sql", negative="", help="Print the SQL instead of running it.")]


@app.command
def upgrade(revision: str = "head", /, *, database: DatabaseOption = None, sql: Sql = False) -> None:
    """Migrate the database to the schema of this release, or to REVISION.

    Run it before the new release is deployed. A VS-2 database wants its server stopped first.
    """
    output = schema.upgrade(database, revision, sql=sql)
    print(output if sql else f"The database is at schema {schema.HEAD if revision == 'head' else revision}.")


@app.command
def downgrade(
    revision: str,
    /,
    *,
    database: DatabaseOption = None,
    sql: Sql = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative="", help="Do not ask.")] = False,
) -> None:
    """Migrate the database down to REVISION. All tokens are lost: 0001, VS-2's schema, would need them in clear."""
    if not (sql or yes) and input("All clients will have to be authorized again. Go on? [y/N] ").lower() != "y":
        raise SystemExit("nothing was changed")
    output = schema.downgrade(database, revision, sql=sql)
    print(output if sql else f"The database is at schema {revision}.")


@app.command
def status(*, database: DatabaseOption = None) -> None:
    """Tell which schema the database is at, and which one this release needs. Exits with 1 unless it can be used."""
    target = Database(database, schema.prepare)
    if target.sqlite and not target.memory and not Path(str(target.url.database)).exists():
        print(f"{target.display_name} does not exist yet; it is created at first use, or by `oauth-store upgrade`.")
        return
    revision = asyncio.run(_state(target))
    if revision == schema.EMPTY:
        print(f"{target.display_name} is empty; its schema is created at first use, or by `oauth-store upgrade`.")
        return
    schema.check(revision, target.display_name)
    print(f"{target.display_name} is at schema {revision}, which this release needs.")


async def _state(database: Database) -> str:
    try:
        return await schema.state(database)
    finally:
        await database.aclose()


@app.command(name="alembic-ini")
def alembic_ini() -> None:
    """Print the path of alembic.ini, for `alembic -c`."""
    print(schema.alembic_ini())


@app.command(name="hash-password")
def hash_password(*arguments: Annotated[str, Parameter(show=False)]) -> None:
    """Ask for a password, and print its hash: what MCP_OAUTH_PASSWORD_HASH is set to.

    Where standard input is no terminal, the password is its first line.
    """
    from oauth_store import sign_in  # what it needs, no other command does

    if arguments:
        raise SystemExit(
            "oauth-store: a password as an argument stays in the shell's history, and every process can read it; "
            "run `oauth-store hash-password` alone, and type it when asked"
        )
    try:
        password = _typed_password() if sys.stdin.isatty() else _piped_password()
        password.encode()  # a terminal of another encoding gives what is no text
    except UnicodeError:
        raise SystemExit("oauth-store: the password is not text in UTF-8") from None
    length = len(password)
    if not length:
        raise SystemExit("oauth-store: the password is empty; type one, or send one line to standard input")
    if not SHORTEST_PASSWORD <= length <= sign_in.PASSWORD_LENGTH:
        raise SystemExit(
            f"oauth-store: the password has {length} characters; expected {SHORTEST_PASSWORD} to "
            f"{sign_in.PASSWORD_LENGTH}. Anyone who finds the server may guess: take four random words, say"
        )
    if any(unicodedata.category(one) == "Cc" for one in password):
        raise SystemExit(
            "oauth-store: the password has a control character, such as of an arrow key, which the sign-in page "
            "cannot take; type it again"
        )
    print("Set MCP_OAUTH_PASSWORD_HASH to this (in single quotes, where a shell reads it):", file=sys.stderr)
    print(sign_in.hash_password(password))


def _typed_password() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # it would go on, and show what is typed
        try:
            password = getpass.getpass("Password: ")
            if getpass.getpass("Once more: ") != password:
                raise SystemExit("oauth-store: that is not the same password twice; run it again")
        except getpass.GetPassWarning:
            raise SystemExit("oauth-store: this terminal would show the password; use another one") from None
    return password


def _piped_password() -> str:
    return sys.stdin.buffer.readline().decode().rstrip("\r\n")


def main() -> None:
    """Run the command line. Errors are one line on standard error, with exit code 1."""
    try:
        app(error_console=Console(stderr=True))
    except OAuthStoreError as error:
        print(f"oauth-store: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, EOFError):
        raise SystemExit(130) from None
