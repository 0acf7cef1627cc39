"""A server that is loaded once and forked for each worker: a real `gunicorn --preload`."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

from tests.serving import free_port
from tests.steps import REDIRECT_URI, authorization_request, pkce, query_of, token_request

APPLICATION = """
import asyncio, os
from fastmcp import FastMCP
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from oauth_store import AutoApproval, SQLAlchemyOAuthProvider

provider = SQLAlchemyOAuthProvider(base_url=os.environ["BASE_URL"], approval=AutoApproval())
asyncio.run(provider.check_schema())  # rather now than at the first request
mcp = FastMCP("wiki", auth=provider)


@mcp.custom_route("/worker", methods=["GET"])
async def worker(_request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(os.getpid()))


app = mcp.http_app(stateless_http=True, json_response=True)
"""


async def test_workers_of_a_preloaded_server_serve(database_url: str, tmp_path: Path) -> None:
    """The provider opened its database before gunicorn forked: each worker lets clients in, and knows their tokens."""
    (tmp_path / "wiki.py").write_text(APPLICATION)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"127.0.0.1:{port}"]
    command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--pythonpath", str(tmp_path), "wiki:app"]
    environment = os.environ | {"MCP_OAUTH_DB": database_url, "BASE_URL": url}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        workers: set[str] = set()
        async with asyncio.timeout(60):
            while len(workers) < 2:
                assert process.poll() is None
                try:
                    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
                        workers.add((await http.get("/worker")).text)
                        await _sign_in_and_call(http)
                except httpx2.ConnectError:
                    await asyncio.sleep(0.05)  # it does not listen yet
    except BaseException as error:
        error.add_note((tmp_path / "log").read_text())
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed, printed
    assert "never" not in printed, printed


async def _sign_in_and_call(http: httpx2.AsyncClient) -> None:
    registered = await http.post(
        "/register", json={"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}
    )
    client_id = registered.json()["client_id"]
    verifier, challenge = pkce()
    answer = await http.get("/authorize", params=authorization_request(client_id, code_challenge=challenge))
    code = query_of(answer.headers["location"])["code"]
    pair = (await http.post("/token", data=token_request(code, verifier, client_id=client_id))).json()
    called = await http.post(
        "/mcp",
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        headers={"Authorization": f"Bearer {pair['access_token']}", "Accept": "application/json, text/event-stream"},
    )
    assert called.status_code == 200, called.text
