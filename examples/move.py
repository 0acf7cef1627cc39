"""A client that goes on working while its server moves from SQLite to another database, and back.

    python -m examples.move postgresql://user:password@host/an_empty_database

A real server in a process of its own, a real client over HTTP, `oauth-store copy` in between, and every OAuth request
that the client sends. Exits 1 if the client had to be authorized again.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from examples.demo import REFRESH, SERVER, ClientApp, DemoError, Server, clean_environment, say
from oauth_store.database.url import database_url, display_name


def main() -> None:
    """Move there and back."""
    if len(sys.argv) != 2:
        sys.exit("give the URL of an empty database: python examples/move.py postgresql://user:password@host/name")
    warnings.filterwarnings("ignore", message="Using in-memory token storage")  # it is not the client that moves
    os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    with tempfile.TemporaryDirectory() as directory:
        try:
            authorizations = asyncio.run(move(Path(directory), sys.argv[1]))
        except DemoError as error:
            sys.exit(f"the demonstration failed: {error}")
    say("")
    say(f"Authorizations: {authorizations}, the one at the beginning")
    if authorizations != 1:
        sys.exit("the move lost an authorization")


async def move(directory: Path, elsewhere: str) -> int:
    """Return how often the client had to be authorized."""
    first, last = str(directory / "oauth.db"), str(directory / "back.db")
    server = Server([str(SERVER)], directory / "server.log", {"MCP_OAUTH_DB": first})
    app = ClientApp(server.url)
    try:
        serve(server, first)
        say("  a client connects for the first time")
        await app.call_tool()
        for source, target in ((first, elsewhere), (elsewhere, last)):
            server.kill()
            say("  server stopped")
            copy(source, target)
            serve(server, target)
            say("  the client comes back with the tokens that it stored")
            await app.call_tool()
            say("  the client comes back without its access token: it has to refresh")
            await app.keep(refresh_token=True)
            refreshes = app.requests.count(REFRESH)
            await app.call_tool()
            if app.requests.count(REFRESH) != refreshes + 1:
                raise DemoError("the client did not refresh")
        return app.authorizations
    finally:
        server.kill()


def serve(server: Server, database: str) -> None:
    """Start the server on a database."""
    server.environment["MCP_OAUTH_DB"] = database
    server.start()
    say(f"  server started on {shown(database)}")


def copy(source: str, target: str) -> None:
    """Run `oauth-store copy`, and show what it prints."""
    say(f"  oauth-store copy {shown(source)} {shown(target)}")
    command = [sys.executable, "-m", "oauth_store", "copy", source, target]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"oauth-store copy failed: {done.stderr}")
    for line in done.stdout.splitlines()[1:]:
        say(f"    {line.strip()}")


def shown(database: str) -> str:
    """Return the name of a file, or a URL without its password."""
    return display_name(database_url(database)) if "://" in database else Path(database).name


if __name__ == "__main__":
    main()
