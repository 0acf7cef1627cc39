"""What expires: small batches are deleted now and then, after an answer was given, without anyone running anything."""

import time

from sqlalchemy import bindparam, delete, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from oauth_store.database import Database
from oauth_store.events import emit
from oauth_store.models import Client, Code, Token

INTERVAL_SECONDS = 60
BATCH = 100
"""Rows of each table that one purge deletes at most."""
UNUSED_CLIENT_SECONDS = 30 * 24 * 3600
"""How long a registration that never led to an approved grant is kept. One that did is never deleted by itself."""

# Selected first and deleted by key, since DELETE ... LIMIT is not portable. Rows that a step holds are passed over.
_expired_tokens = (
    select(Token.token_hash, Token.grant_id, Token.created_at)
    .where(Token.expires_at <= bindparam("b_now"))
    .order_by(Token.expires_at)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
_expired_codes = (
    select(Code.handle_hash)
    .where(Code.expires_at <= bindparam("b_now"))
    .order_by(Code.expires_at)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
_unused_clients = (
    select(Client.client_id)
    .where(Client.last_used_at.is_(None), Client.created_at <= bindparam("b_now") - UNUSED_CLIENT_SECONDS)
    .order_by(Client.created_at)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
_wipe_replays = (
    update(Token.__table__)  # type: ignore[arg-type]  # a Table, which takes many sets of values at once
    .where(
        Token.grant_id == bindparam("b_grant_id"),
        Token.consumed_at < bindparam("b_created_at"),
        Token.replay.is_not(None),
    )
    .values(replay=null())
)


class Purger:
    """Deletes what has expired, off the path of the request that triggers it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last: float | None = None

    def nudge(self) -> None:
        """Start a purge if the last one is a minute ago, or left something. Costs nothing otherwise."""
        now = time.time()
        if self._last is None:  # the first step has better things to do
            self._last = now
        if self._last <= now < self._last + INTERVAL_SECONDS:
            return
        self._last = now
        self._database.start(self._purge, "purge")

    async def _purge(self) -> None:
        async with self._database.write() as session:
            deleted = await purge(session, int(time.time()))
        if max(deleted.values()) == BATCH:
            self._last = 0.0  # there is more: the next step goes on
        if any(deleted.values()):
            emit("purged", **deleted)


async def purge(session: AsyncSession, now: int) -> dict[str, int]:
    """Delete one batch of what has expired, and return how many rows of each table that were."""
    tokens = (await session.execute(_expired_tokens, {"b_now": now})).all()
    if tokens:
        await session.execute(delete(Token).where(Token.token_hash.in_([token.token_hash for token in tokens])))
        # A token of a grant that has expired says that the refresh tokens that were consumed before its creation have
        # successors that were used: neither row of the state machine can need their sealed pairs any more.
        created = {token.grant_id: token.created_at for token in sorted(tokens, key=lambda token: token.created_at)}
        connection = await session.connection()
        await connection.execute(
            _wipe_replays, [{"b_grant_id": grant_id, "b_created_at": at} for grant_id, at in created.items()]
        )
    codes = (await session.execute(_expired_codes, {"b_now": now})).scalars().all()
    if codes:
        await session.execute(delete(Code).where(Code.handle_hash.in_(codes)))
    clients = (await session.execute(_unused_clients, {"b_now": now})).scalars().all()
    if clients:
        await session.execute(delete(Client).where(Client.client_id.in_(clients), Client.last_used_at.is_(None)))
    return {"tokens": len(tokens), "codes": len(codes), "clients": len(clients)}
