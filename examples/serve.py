"""Serve examples/server.py to a person with a browser, and say what to do with it. `make serve` runs it.

MCP_OAUTH_DB, PORT and BASE_URL are as in examples/server.py. Without MCP_OAUTH_PASSWORD_HASH, there is a password for
this run alone.
"""

import logging
import os
import secrets
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look like others


def main() -> None:
    """Serve until Ctrl-C."""
    try:
        serve()
    except KeyboardInterrupt:
        print("\nStopped. Clients stay authorized: start it again, and they go on.")


def serve() -> None:
    """Serve. What keeps the server from starting is one line and an exit code."""
    from argon2 import PasswordHasher  # these take a second or two, and Ctrl-C ends them too

    from examples.server import base_url, create_server, port
    from oauth_store import OAuthStoreError

    # who registers, is let in and is refused: one line each
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("oauth_store").setLevel(logging.INFO)
    password = None
    if not os.environ.get("MCP_OAUTH_PASSWORD_HASH"):
        password = "-".join("".join(secrets.choice(LETTERS) for _ in range(4)) for _ in range(3))  # 59 bits
        os.environ["MCP_OAUTH_PASSWORD_HASH"] = PasswordHasher().hash(password)
    try:
        with listen(port()) as listener:
            server = create_server()
            print(instructions(base_url().rstrip("/"), password), flush=True)
            server.run(
                transport="http", sockets=[listener], stateless_http=True, show_banner=False, log_level="warning"
            )
    except OAuthStoreError as error:
        sys.exit(f"cannot start: {error}")


def listen(at: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1. Exits with one line where that cannot be."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", at))
        listener.listen()
    except OSError as error:
        listener.close()
        sys.exit(f"cannot start: 127.0.0.1:{at}: {error.strerror}; choose another port, as in PORT={at + 1} make serve")
    return listener


def instructions(url: str, password: str | None) -> str:
    """Return what a person has to know."""
    mcp = f"{url}/mcp"
    if password is None:
        asked = "the one that MCP_OAUTH_PASSWORD_HASH is of"
    else:
        asked = f"{password}   (of this run; for one of your own, see `oauth-store hash-password`)"
    if urlsplit(url).scheme == "https":
        claude_ai = f"Settings > Connectors > Add custom connector: {mcp}"
    else:
        claude_ai = f"""needs a public https URL that leads here, by a tunnel or a proxy to {url}.
               Start again with it, and add it under Settings > Connectors > Add custom connector:
               BASE_URL=https://wiki.example.com make serve"""
    return f"""A wiki for authorized clients is at {mcp}

Password       {asked}
Claude Code    claude mcp add --transport http wiki {mcp}
               then, in Claude Code: /mcp, wiki, Authenticate
Claude.ai      {claude_ai}
Connected apps {url}/apps shows what has access, and ends it
Database       {kept()}

Ctrl-C stops it.
"""


def kept() -> str:
    """Return where clients and tokens are kept, without the password that a URL may have in it."""
    database = os.environ.get("MCP_OAUTH_DB") or "mcp_oauth.db"
    if database == ":memory:" or "://" in database:
        return "what MCP_OAUTH_DB says"
    return f"{Path(database).resolve()}; delete it to begin anew"


if __name__ == "__main__":
    main()
