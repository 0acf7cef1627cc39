"""Serve examples/server.py for your browser, and print how to connect to it. `make serve` runs it.

MCP_OAUTH_DB, PORT and BASE_URL are as in examples/server.py. Without MCP_OAUTH_PASSWORD_HASH, it makes up a password
that is valid for this run only.
"""

import logging
import os
import secrets
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # no characters that are easy to confuse


def main() -> None:
    """Serve until Ctrl-C."""
    try:
        serve()
    except KeyboardInterrupt:
        print("\nStopped. Clients stay authorized: start it again, and they keep working.")


def serve() -> None:
    """Serve. An error at the start is one line and an exit code."""
    from argon2 import PasswordHasher  # these imports take a second or two; here Ctrl-C stops them cleanly

    from examples.server import base_url, create_server, port
    from oauth_store import OAuthStoreError

    # log each registration, approval and refusal in one line
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
    """Return a socket that listens on 127.0.0.1. Exits with one line if it cannot listen."""
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
    """Return the instructions to print."""
    mcp = f"{url}/mcp"
    if password is None:
        asked = "the password whose hash is in MCP_OAUTH_PASSWORD_HASH"
    else:
        asked = f"{password}   (for this run; to choose your own, run `oauth-store hash-password`)"
    if urlsplit(url).scheme == "https":
        claude_ai = f"Settings > Connectors > Add custom connector: {mcp}"
    else:
        claude_ai = f"""needs a public https URL, from a tunnel or a proxy to {url}.
               Start again with that URL, then add it under Settings > Connectors > Add custom connector:
               BASE_URL=https://wiki.example.com make serve"""
    return f"""A wiki for authorized clients is at {mcp}

Password       {asked}
Claude Code    claude mcp add --transport http wiki {mcp}
               then, in Claude Code: /mcp, wiki, Authenticate
Claude.ai      {claude_ai}
Connected apps {url}/apps lists the apps that have access, and revokes them
Database       {kept()}

Ctrl-C stops it.
"""


def kept() -> str:
    """Return where the server keeps clients and tokens, without the password of a URL."""
    database = os.environ.get("MCP_OAUTH_DB") or "mcp_oauth.db"
    if database == ":memory:" or "://" in database:
        return "the one in MCP_OAUTH_DB"
    return f"{Path(database).resolve()}; delete it to start over"


if __name__ == "__main__":
    main()
