"""Move a server from SQLite to another database and back, under a client that keeps working.

    python -m examples.move postgresql://user:password@host/an_empty_database

It starts a real server in its own process, connects a real client over HTTP, runs `oauth-store copy`, and prints every
OAuth request of the client. Exits 1 if the client had to authorize again.
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
    """Move the server there and back."""
    if len(sys.argv) != 2:
        sys.exit("expected the URL of an empty database: python -m examples.move postgresql://user:password@host/name")
    warnings.filterwarnings("ignore", message="Using in-memory token storage")  # only the server moves
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
    """Return how often the client had to authorize."""
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
            say("  the client reconnects with its stored tokens")
            await app.call_tool()
            say("  the client reconnects without its access token, so it has to refresh")
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
    """Run `oauth-store copy`, and show its output."""
    say(f"  oauth-store copy {shown(source)} {shown(target)}")
    command = [sys.executable, "-m", "oauth_store", "copy", source, target]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"oauth-store copy failed: {done.stderr}")
    for line in done.stdout.splitlines()[1:]:
        say(f"    {line.strip()}")


def shown(database: str) -> str:
    """Return the file's name, or the URL without its password."""
    return display_name(database_url(database)) if "://" in database else Path(database).name


if __name__ == "__main__":
    main()
