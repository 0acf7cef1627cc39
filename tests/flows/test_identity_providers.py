"""Several identity providers, some of which do not answer: each holds up only its own users (SEP-990)."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastmcp.server.auth.identity_assertion import IdentityAssertion, IdentityAssertionError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from oauth_store.flows import identity
from oauth_store.flows.identity import Identities
from tests.identities import CLIENT_ID, Company
from tests.serving import serving
from tests.steps import BASE_URL, RESOURCE


@pytest.fixture(autouse=True)
async def imported() -> None:
    """HTTP clients read files when the first one is made."""
    async with httpx2.AsyncClient():
        pass


@pytest.fixture
def hanging() -> Iterator[Company]:
    """An identity provider that takes connections, and never answers."""
    company = Company()
    with socket.create_server(("127.0.0.1", company.port)):
        yield company


@asynccontextmanager
async def dripping() -> AsyncIterator[tuple[Company, asyncio.Event]]:
    """An identity provider whose answer does not end before an event, which makes it well."""
    company, over, closed = Company(), asyncio.Event(), asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        while not closed.is_set():  # also after the event: an answer that ends as junk would be remembered
            yield b" "
            await asyncio.sleep(0.05)

    async def discovery(_: Request) -> Response:
        if over.is_set():
            return JSONResponse({"issuer": company.issuer, "jwks_uri": f"{company.issuer}/keys"})
        return StreamingResponse(drip(), media_type="application/json")

    async def keys(_: Request) -> Response:
        return JSONResponse({"keys": [company.signer.public]})

    routes = [Route("/.well-known/openid-configuration", discovery), Route("/keys", keys)]
    async with serving(Starlette(routes=routes), company.port):
        yield company, over
        closed.set()


def trusting(*companies: Company) -> Identities:
    """What a server has that trusts these identity providers."""
    return Identities(IdentityAssertion(trusted_issuers=[company.issuer for company in companies]), BASE_URL)


async def claims(identities: Identities, company: Company, **changed: Any) -> dict[str, Any]:
    """The claims of a new assertion."""
    assertion = company.sign(company.claims(BASE_URL, RESOURCE, **changed))
    return await identities.claims(assertion, CLIENT_ID, RESOURCE)


def threads() -> int:
    return sum("identities" in thread.name for thread in threading.enumerate())


async def test_one_that_hangs_holds_up_no_other(hanging: Company) -> None:
    """Users of another identity provider come in meanwhile."""
    async with Company().open() as good:
        identities = trusting(hanging, good)
        slow = asyncio.create_task(claims(identities, hanging))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert (await claims(identities, good))["iss"] == good.issuer
        assert not slow.done()
        slow.cancel()


async def test_an_answer_has_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while it is given up, for all who wait for it, although some of it arrives again and again."""
    monkeypatch.setattr(identity, "VALIDATION_SECONDS", 1)
    async with dripping() as (company, over):
        identities, started = trusting(company), time.monotonic()
        refused = await asyncio.gather(*(claims(identities, company) for _ in range(5)), return_exceptions=True)
        assert {str(error) for error in refused} == {"no answer of its issuer after 1 s"}
        assert time.monotonic() - started < 3
        over.set()
        await asyncio.sleep(1)
        monkeypatch.undo()  # on a busy machine, a good answer takes longer than a second
        assert (await claims(identities, company))["iss"] == company.issuer


async def test_only_some_may_wait(hanging: Company) -> None:
    """Further assertions of an issuer that does not answer are refused at once."""
    identities = trusting(hanging)
    waiting = [asyncio.create_task(claims(identities, hanging)) for _ in range(identity.WAITING_IDENTITIES)]
    await asyncio.sleep(0.1)
    with pytest.raises(IdentityAssertionError, match="too many"):
        await claims(identities, hanging)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("issuer", ["https://other.example", ["https://other.example"], {"a": 1}, None])
async def test_a_stranger_gets_no_thread(hanging: Company, issuer: object) -> None:
    """An issuer that the owner does not trust is refused at once."""
    before, identities = threads(), trusting(hanging)
    with pytest.raises(IdentityAssertionError, match="untrusted"):
        await claims(identities, hanging, iss=issuer)
    with pytest.raises(IdentityAssertionError):
        await identities.claims("e30.W10.x", CLIENT_ID, RESOURCE)
    assert threads() == before
