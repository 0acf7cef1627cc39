"""A FastMCP server whose clients stay authorized through restarts.

    python examples/server.py

Four environment variables configure it. MCP_OAUTH_DB is the database: a file's path or a URL, by default
"mcp_oauth.db". PORT is the port on 127.0.0.1, by default 8000. BASE_URL is the URL that clients use.
MCP_OAUTH_PASSWORD_HASH is the hash of the owner's password, from `oauth-store hash-password`. Without it only clients
on this machine get in, and with a public BASE_URL the server refuses to start.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastmcp import FastMCP

from oauth_store import OAuthStoreError, SQLAlchemyOAuthProvider


def create_server() -> FastMCP:
    """Build the server. Nothing is opened yet."""
    asks = bool(os.environ.get("MCP_OAUTH_PASSWORD_HASH"))
    # device_authorization: programs on machines without a browser show a code, which the owner types at /device
    provider = SQLAlchemyOAuthProvider(base_url=base_url(), device_authorization=asks)

    @asynccontextmanager
    async def lifespan(_server: FastMCP) -> AsyncIterator[None]:
        async with provider:  # closes its connections at the end
            await provider.check_schema()  # optional: fail at the start on a wrong schema, not at the first request
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
    """Return the port to listen on. Exits with one line if PORT is not a port."""
    found = os.environ.get("PORT") or "8000"
    if not found.isdecimal() or not 0 < int(found) < 65536:
        sys.exit(f"cannot start: PORT is {found!r}; expected a number from 1 to 65535")
    return int(found)


def main() -> None:
    """Serve until stopped. An error at the start is one line and an exit code."""
    try:
        # stateless_http: up to protocol 2025-11-25, an MCP session lives in the memory of one process. After a restart
        # the client gets "Session not found", which users mistake for a lost login.
        create_server().run(transport="http", host="127.0.0.1", port=port(), stateless_http=True, show_banner=False)
    except OAuthStoreError as error:
        sys.exit(f"cannot start: {error}")


if __name__ == "__main__":
    main()
