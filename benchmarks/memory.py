"""Measure the memory of a server process that one client uses."""

from functools import partial
from pathlib import Path

from benchmarks.contenders import IN_MEMORY, SQLITE
from benchmarks.http import load, serving
from benchmarks.timing import Measure, take_turns

MEMORY = "memory of a server with one client"
# Unlike benchmarks.server, each imports its own provider alone.
_PROGRAM = """
import sys
import uvicorn
from fastmcp import FastMCP
{imported}
url = f"http://127.0.0.1:{{sys.argv[-1]}}"
mcp = FastMCP("benchmark", auth={provider})
@mcp.tool
def add(a: int, b: int) -> int:
    return a + b
app = mcp.http_app(stateless_http=True, json_response=True)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[-1]), log_level="warning", access_log=False)
"""
_PROVIDERS = {
    IN_MEMORY: (
        "from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider\n"
        "from mcp.server.auth.settings import ClientRegistrationOptions",
        "InMemoryOAuthProvider(base_url=url, client_registration_options=ClientRegistrationOptions(enabled=True))",
    ),
    SQLITE: (
        "from oauth_store import AutoApproval, SQLAlchemyOAuthProvider",
        "SQLAlchemyOAuthProvider(sys.argv[1], base_url=url, approval=AutoApproval())",
    ),
}


async def measure_memory(directory: Path, *, rounds: int) -> list[Measure]:
    """Measure servers that let a client in and serve its calls. Nothing is measured where there is no Linux."""
    if not Path("/proc/self/smaps_rollup").exists():
        return []
    path = str(directory / "memory.db")
    turns = {
        name: partial(_serve, _PROGRAM.format(imported=imported, provider=provider), path)
        for name, (imported, provider) in _PROVIDERS.items()
    }
    return [await take_turns(Measure(MEMORY, "MiB"), turns, rounds)]


async def _serve(program: str, path: str) -> float:
    with serving("-c", program, path) as process:
        await load("call", 0.5, 1, process.port)
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
