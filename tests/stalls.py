"""A server in a process of its own that knows how long its event loop was held up, in processor time of its thread.

Processor time, since a machine that others use too stalls everything now and then, and none of that is ours.
"""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
from fastmcp import FastMCP
from starlette.requests import Request
from starlette.responses import JSONResponse

from oauth_store import PasswordApproval, SQLAlchemyOAuthProvider
from tests.chaos import NO_LIMITS
from tests.pages import USERS


def serve_and_tick(pipe: Connection, database: str, port: int) -> None:
    """Serve with a password and no limits, until killed; /longest has the longest stall since it was last asked."""
    logging.disable(logging.CRITICAL)
    asyncio.run(_serve_and_tick(pipe, database, port))


async def _serve_and_tick(pipe: Connection, database: str, port: int) -> None:
    provider = SQLAlchemyOAuthProvider(
        database,
        base_url=f"http://127.0.0.1:{port}",
        approval=PasswordApproval(users=USERS),
        rate_limits=NO_LIMITS,
    )
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest = max(longest, now - last)
            last = now

    @asynccontextmanager
    async def lifespan(_server: FastMCP) -> AsyncIterator[None]:
        ticker = asyncio.create_task(tick())
        async with provider:
            await provider.check_schema()
            gc.collect()
            gc.freeze()  # a full collection of all that FastMCP imports takes 130 ms, whatever a server is asked for
            pipe.send("serves")
            yield
        ticker.cancel()

    mcp: FastMCP[Any] = FastMCP("stalls", auth=provider, lifespan=lifespan)

    @mcp.tool
    def read_page(title: str) -> str:
        return f"{title}: for authorized clients only"

    @mcp.custom_route("/longest", methods=["GET"])
    async def state(_request: Request) -> JSONResponse:
        nonlocal longest
        seconds, longest = longest, 0.0
        return JSONResponse(seconds)

    app = mcp.http_app(stateless_http=True, json_response=True)
    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False)).serve()
