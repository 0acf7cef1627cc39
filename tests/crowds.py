"""Many flows at once on a provider in this process, and what may not be half done."""

import asyncio
import secrets

import pytest
from sqlalchemy import insert
from sqlalchemy.orm import Session

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.models import clients
from tests.steps import refresh, registered, sign_in
from tests.workers import present_for_revocation, present_refresh_token

CROWD = 24
NAME = 'Ada\'s \\ "wiki" \U0001f680'
"""A client's name with what drivers escape, and a character that takes four bytes."""


async def flow(provider: SQLAlchemyOAuthProvider) -> None:
    """Register, authorize, approve, exchange, verify, refresh and revoke, and check what each step left."""
    client = await registered(provider, client_name=NAME)
    assert client.client_name == NAME
    token = await sign_in(provider, client)
    assert await provider.verify_token(token.access_token) is not None
    refreshed = await refresh(provider, client, token)
    assert await provider.verify_token(refreshed.access_token) is not None
    assert await present_for_revocation(provider, client, str(refreshed.refresh_token))
    assert await provider.verify_token(refreshed.access_token) is None


async def check_crowd(provider: SQLAlchemyOAuthProvider) -> None:
    """Each of 24 flows at once succeeds, 24 refreshes at once get one pair, and a step that fails leaves nothing."""
    await asyncio.gather(*(flow(provider) for _ in range(CROWD)))
    client = await registered(provider)
    token = await sign_in(provider, client)
    present = [present_refresh_token(provider, client, token.refresh_token) for _ in range(CROWD)]
    assert len({answer.access_token for answer in await asyncio.gather(*present)}) == 1
    await check_nothing_half_done(provider)


async def check_nothing_half_done(provider: SQLAlchemyOAuthProvider) -> None:
    """A step that fails after it wrote leaves no row, neither at once nor with the COMMIT of the next step."""
    half = f"half-done-{secrets.token_hex(8)}"

    def fail(session: Session) -> None:
        session.execute(insert(clients), {"client_id": half, "client_metadata": "{}", "created_at": 1})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await provider._store.write(fail)
    assert await provider.get_client(half) is None
    await registered(provider, client_id=f"after-{half}")
    assert await provider.get_client(half) is None
