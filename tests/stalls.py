"""A server in a process of its own that knows how long its event loop was held up, in processor time of its thread.

Processor time, since a machine that others use too stalls everything now and then, and none of that is ours.
"""

import asyncio
import gc
import logging
import time
from multiprocessing.connection import Connection

from starlette.requests import Request
from starlette.responses import JSONResponse

from oauth_store import PasswordApproval, SQLAlchemyOAuthProvider
from tests.chaos import NO_LIMITS
from tests.deployments import wiki
from tests.serving import serving
from tests.sites import USERS


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
        trusted_proxies=["127.0.0.1", "10.0.0.0/8", "fe80::/10"],
    )
    mcp = wiki(provider)
    longest = 0.0

    @mcp.custom_route("/longest", methods=["GET"])
    async def state(_request: Request) -> JSONResponse:
        nonlocal longest
        seconds, longest = longest, 0.0
        return JSONResponse(seconds)

    async with provider, serving(mcp.http_app(stateless_http=True, json_response=True), port):
        await provider.check_schema()
        gc.collect()
        gc.freeze()  # a full collection of all that FastMCP imports takes 130 ms, whatever a server is asked for
        pipe.send("serves")
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest = max(longest, now - last)
            last = now
