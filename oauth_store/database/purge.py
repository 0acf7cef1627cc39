"""What expires: small batches are deleted now and then, after an answer was given, without anyone running anything."""

import time

from sqlalchemy import bindparam, delete, func, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from oauth_store.database.models import Client, Code, Token
from oauth_store.database.store import Database
from oauth_store.events import emit

INTERVAL_SECONDS = 60
BATCH = 100
"""Rows of each table that one purge deletes at most."""
UNUSED_CLIENT_SECONDS = 30 * 24 * 3600
"""How long a registration that never led to an approved grant is kept. One that did is never deleted by itself."""

_expired_token = Token.expires_at <= bindparam("b_now")
_expired_code = Code.expires_at <= bindparam("b_now")
_unused_client = Client.last_used_at.is_(None) & (Client.created_at <= bindparam("b_now") - UNUSED_CLIENT_SECONDS)

# Selected first and deleted by key, since DELETE ... LIMIT is not portable. Rows that a step holds are passed over.
_expired_tokens, _expired_codes, _unused_clients = (
    select(*columns).where(expired).order_by(oldest).limit(bindparam("b_batch")).with_for_update(skip_locked=True)
    for columns, expired, oldest in (
        ((Token.token_hash, Token.grant_id, Token.created_at), _expired_token, Token.expires_at),
        ((Code.handle_hash,), _expired_code, Code.expires_at),
        ((Client.client_id,), _unused_client, Client.created_at),
    )
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


async def purgeable(session: AsyncSession, now: int) -> dict[str, int]:
    """Return how many rows of each table have expired."""
    counts = {}
    for name, expired in (("tokens", _expired_token), ("codes", _expired_code), ("clients", _unused_client)):
        counts[name] = (await session.execute(select(func.count()).where(expired), {"b_now": now})).scalar_one()
    return counts


async def purge(session: AsyncSession, now: int, batch: int = BATCH) -> dict[str, int]:
    """Delete one batch of what has expired, and return how many rows of each table that were."""
    which = {"b_now": now, "b_batch": batch}
    tokens = (await session.execute(_expired_tokens, which)).all()
    if tokens:
        await session.execute(delete(Token).where(Token.token_hash.in_([token.token_hash for token in tokens])))
        # A token of a grant that has expired says that the refresh tokens that were consumed before its creation have
        # successors that were used: neither row of the state machine can need their sealed pairs any more.
        created = {token.grant_id: token.created_at for token in sorted(tokens, key=lambda token: token.created_at)}
        connection = await session.connection()
        await connection.execute(
            _wipe_replays, [{"b_grant_id": grant_id, "b_created_at": at} for grant_id, at in created.items()]
        )
    codes = (await session.execute(_expired_codes, which)).scalars().all()
    if codes:
        await session.execute(delete(Code).where(Code.handle_hash.in_(codes)))
    clients = (await session.execute(_unused_clients, which)).scalars().all()
    if clients:
        await session.execute(delete(Client).where(Client.client_id.in_(clients), Client.last_used_at.is_(None)))
    return {"tokens": len(tokens), "codes": len(codes), "clients": len(clients)}
