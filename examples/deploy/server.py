"""The server that the files next to this one run: `uvicorn server:app`. BASE_URL is the URL that clients use."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastmcp import FastMCP

from oauth_store import SQLAlchemyOAuthProvider

PRIVATE = ["10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
provider = SQLAlchemyOAuthProvider(
    base_url=os.environ.get("BASE_URL") or "http://127.0.0.1:8000",
    trusted_proxies=PRIVATE,  # only the platform's proxy reaches the container, and its address changes
)


@asynccontextmanager
async def lifespan(_server: FastMCP) -> AsyncIterator[None]:
    """Fail at the start, not at the first request."""
    async with provider:
        await provider.check_schema()
        yield


mcp = FastMCP("wiki", auth=provider, lifespan=lifespan)


@mcp.tool
def read_page(title: str) -> str:
    """Return the text of a wiki page."""
    return f"{title}: for authorized clients only"


app = mcp.http_app(stateless_http=True)
