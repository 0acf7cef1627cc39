"""The contenders of the benchmarks still do what they are measured at: `make bench` is run too seldom to notice."""

from pathlib import Path

import pytest
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider

from benchmarks.contenders import Contender, Provider, new_provider
from benchmarks.databases import new_file
from benchmarks.plain import PlainSQLite
from tests.steps import BASE_URL, new_client


@pytest.mark.parametrize("name", ["memory", "plain", "ours"])
async def test_every_step(name: str, tmp_path: Path) -> None:
    """Each registers, signs in, verifies, refreshes and revokes; only a live token is verified."""
    contender: Contender
    if name == "memory":
        contender = Provider(InMemoryOAuthProvider(base_url=BASE_URL))
    else:
        path = await new_file(tmp_path, name)
        contender = PlainSQLite(path) if name == "plain" else Provider(new_provider(path))
    client = new_client()
    contender.client = client
    await contender.register(client)
    assert await contender.get_client(client) is not None
    token = await contender.sign_in(client)
    assert await contender.verify(token) is not None
    successor = await contender.refresh(token)
    assert await contender.verify(token) is None
    assert await contender.verify(successor) is not None
    await contender.revoke(successor)
    assert await contender.verify(successor) is None
    await contender.settle()
    await contender.close()
