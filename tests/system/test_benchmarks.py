"""The contenders of the benchmarks still do what they are measured at: `make bench` is run too seldom to notice."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider

from benchmarks import load
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


def test_a_connection_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the HTTP benchmarks does not report the rate of the connections that are left."""

    def lost(connection: load.Connection) -> Iterator[None]:
        yield
        raise ConnectionError("the server closed the connection")

    monkeypatch.setitem(load.KINDS, "lost", lost)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConnectionError, match="closed"):
        load.load("lost", 0.1, 2, [server.getsockname()[1]])
