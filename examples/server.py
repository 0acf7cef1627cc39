"""A FastMCP server whose clients stay authorized through restarts.

    python examples/server.py

Four environment variables say the rest. MCP_OAUTH_DB names the database: a file's path or a URL, "mcp_oauth.db" if it
is unset. PORT is where to listen on 127.0.0.1. BASE_URL is the URL that clients use. MCP_OAUTH_PASSWORD_HASH, which
`oauth-store hash-password` makes, is the owner's password: without it only clients on this machine get in, and with a
public BASE_URL the server does not start.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastmcp import FastMCP

from oauth_store import OAuthStoreError, SQLAlchemyOAuthProvider


def create_server() -> FastMCP:
    """Build the server. Nothing is opened yet."""
    provider = SQLAlchemyOAuthProvider(base_url=base_url())

    @asynccontextmanager
    async def lifespan(_server: FastMCP) -> AsyncIterator[None]:
        async with provider:  # closes its connections at the end
            await provider.check_schema()  # optional: a wrong schema stops the start, not the first request
            yield

    mcp = FastMCP("wiki", auth=provider, lifespan=lifespan)

    @mcp.tool
    def read_page(title: str) -> str:
        """Return the text of a wiki page."""
        return f"{title}: for authorized clients only"

    return mcp


def base_url() -> str:
    """Return the URL that clients use."""
    return os.environ.get("BASE_URL") or f"http://127.0.0.1:{port()}"


def port() -> int:
    """Return where to listen. Exits with one line where PORT is no port."""
    found = os.environ.get("PORT") or "8000"
    if not found.isdecimal() or not 0 < int(found) < 65536:
        sys.exit(f"cannot start: PORT is {found!r}; expected a number from 1 to 65535")
    return int(found)


def main() -> None:
    """Serve until stopped. What keeps the server from starting is one line and an exit code."""
    try:
        # stateless_http: up to protocol 2025-11-25, an MCP session lives in the memory of one process. A client whose
        # session is lost in a restart gets "Session not found", which its user takes for a lost login.
        create_server().run(transport="http", host="127.0.0.1", port=port(), stateless_http=True, show_banner=False)
    except OAuthStoreError as error:
        sys.exit(f"cannot start: {error}")


if __name__ == "__main__":
    main()
