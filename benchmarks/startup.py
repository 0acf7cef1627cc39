"""Measure how much importing the package and building a provider adds to the start of a process."""

import asyncio
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.contenders import IN_MEMORY, SQLITE
from benchmarks.timing import Measure, take_turns

START_UP = "start of a process"
SQLALCHEMY_ALONE = "InMemoryOAuthProvider, and importing SQLAlchemy"
_IN_MEMORY = """
import fastmcp
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
InMemoryOAuthProvider(base_url="http://127.0.0.1:8000")
"""
PROGRAMS = {
    IN_MEMORY: _IN_MEMORY,
    SQLITE: """
import fastmcp
from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
SQLAlchemyOAuthProvider("oauth.db", base_url="http://127.0.0.1:8000", approval=AutoApproval())
""",
    SQLALCHEMY_ALONE: f"{_IN_MEMORY}\nimport aiosqlite, sqlalchemy.ext.asyncio, sqlalchemy.dialects.sqlite.aiosqlite",
}


async def measure_start_up(*, rounds: int) -> Measure:
    """Measure processes that start, import, build a provider and end."""
    with tempfile.TemporaryDirectory() as directory:
        turns = {name: partial(_start, program, Path(directory)) for name, program in PROGRAMS.items()}
        return await take_turns(Measure(START_UP, "ms"), turns, rounds)


async def _start(program: str, directory: Path) -> float:
    began = time.perf_counter()
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=True, cwd=directory)
    return (time.perf_counter() - began) * 1e3
