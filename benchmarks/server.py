"""Run a server process: `python -m benchmarks.server memory|<database> PORT`."""

import logging
import sys

import uvicorn
from fastmcp import FastMCP
from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from mcp.server.auth.settings import ClientRegistrationOptions

from benchmarks.contenders import UNLIMITED
from oauth_store import AutoApproval, SQLAlchemyOAuthProvider

IN_MEMORY_DATABASE = "memory"


def serve(database: str, port: int) -> None:
    """Serve one tool behind the provider of a database until the process is stopped."""
    base_url = f"http://127.0.0.1:{port}"
    if database == IN_MEMORY_DATABASE:
        registration = ClientRegistrationOptions(enabled=True, valid_scopes=["read"], default_scopes=["read"])
        auth: OAuthProvider = InMemoryOAuthProvider(base_url=base_url, client_registration_options=registration)
    else:
        auth = SQLAlchemyOAuthProvider(database, base_url=base_url, approval=AutoApproval(), rate_limits=UNLIMITED)
    mcp = FastMCP("benchmark", auth=auth)

    @mcp.tool
    def add(a: int, b: int) -> int:
        return a + b

    app = mcp.http_app(stateless_http=True, json_response=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    serve(sys.argv[1], int(sys.argv[2]))
