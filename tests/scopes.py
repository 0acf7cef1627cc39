"""A wiki whose tools need scopes, and what its pages and its clients show of them."""

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastmcp import FastMCP
from fastmcp.server.auth import require_scopes

from tests.sites import site
from tests.steps import registration_options

SCOPES = ("read", "write", "admin")
WORDS = {
    "read": "read every page",
    "write": "write pages",
    "admin": "delete pages, for good",
}
TITLES = {
    "read": ("Read page", "Search", "List pages", "Recent changes", "Show history", "Download file", "Read comments"),
    "write": ("Edit page", "Add page", "Upload file", "Write comment"),
    "admin": ("Delete page", "Restore backup"),
}


def add_tools(mcp: FastMCP[None]) -> None:
    """Tools that need scopes, one of them of a server that is mounted."""

    @mcp.tool(auth=require_scopes("read"), annotations={"readOnlyHint": True})
    def read_page() -> str:
        return "a page"

    @mcp.tool(auth=require_scopes("read", "write"))
    def edit_page() -> str:
        return "edited"

    inner: FastMCP[None] = FastMCP("inner")

    @inner.tool(auth=[require_scopes("admin")], annotations={"destructiveHint": True})
    def drop_all() -> str:
        return "dropped"

    mcp.mount(inner, namespace="inner")


def add_many_tools(mcp: FastMCP[None]) -> None:
    """The tools of a grown wiki, which its pages show."""
    hints = {"read": {"readOnlyHint": True}, "write": {}, "admin": {"destructiveHint": True}}
    for scope, titles in TITLES.items():
        for title in titles:
            name = title.lower().replace(" ", "_")
            mcp.tool(lambda: "done", name=name, title=title, auth=require_scopes(scope), annotations=hints[scope])


def wiki_on(database: str | Path, **settings: Any) -> Any:
    """A site with three scopes and the tools that need them."""
    options = {"client_registration_options": registration_options(*SCOPES), "tools": add_tools, **settings}
    return site(database, **options)


def serve_wiki(pipe: Connection, database: str, port: int, password_hash: str) -> None:
    """Serve the wiki in a process of its own until it is killed, and say when it listens.

    Its `password_hash` is the test's: with another one, a session would be over.
    """

    async def serve() -> None:
        async with wiki_on(database, port=port, approval={"password_hash": password_hash}):
            pipe.send("listens")
            await asyncio.Event().wait()

    asyncio.run(serve())
