"""What expires: small batches are deleted now and then, after an answer was given, without anyone running anything."""

import asyncio
import time

from sqlalchemy import bindparam, delete, func, null, select, update
from sqlalchemy.orm import Session

from oauth_store.database.models import Client, Code, Token, is_expired, is_unused
from oauth_store.database.store import Store
from oauth_store.events import emit_after_commit

INTERVAL_SECONDS = 60
BATCH = 100
"""Rows of each table that one purge deletes at most."""
_expired_token, _expired_code = is_expired(Token, bindparam("b_now")), is_expired(Code, bindparam("b_now"))
_unused_client = is_unused(bindparam("b_now"))

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

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: float | None = None

    def nudge(self) -> None:
        """Start a purge if the last one is a minute ago, or left something. Costs nothing otherwise."""
        now = time.time()
        if self._last is None:  # the first step has better things to do
            self._last = now
        if self._last <= now < self._last + INTERVAL_SECONDS:
            return
        self._last = now
        self._store.keep(asyncio.create_task(self._purge()))

    async def _purge(self) -> None:
        deleted = await self._store.write(_purge, int(time.time()))
        if max(deleted.values()) == BATCH:
            self._last = 0.0  # there is more: the next step purges again


def _purge(session: Session, now: int) -> dict[str, int]:
    deleted = purge(session, now)
    if any(deleted.values()):
        emit_after_commit(session, "purged", **deleted)
    return deleted


def purgeable(session: Session, now: int) -> dict[str, int]:
    """Return how many rows of each table have expired."""
    counts = {}
    for name, expired in (("tokens", _expired_token), ("codes", _expired_code), ("clients", _unused_client)):
        counts[name] = session.execute(select(func.count()).where(expired), {"b_now": now}).scalar_one()
    return counts


def purge(session: Session, now: int, batch: int = BATCH) -> dict[str, int]:
    """Delete one batch of what has expired, and return how many rows of each table that were."""
    which = {"b_now": now, "b_batch": batch}
    tokens = session.execute(_expired_tokens, which).all()
    if tokens:
        session.execute(delete(Token).where(Token.token_hash.in_([token.token_hash for token in tokens])))
        # A token of a grant that has expired says that the refresh tokens that were consumed before its creation have
        # successors that were used: neither row of the state machine can need their sealed pairs any more.
        created = {token.grant_id: token.created_at for token in sorted(tokens, key=lambda token: token.created_at)}
        connection = session.connection()
        connection.execute(
            _wipe_replays, [{"b_grant_id": grant_id, "b_created_at": at} for grant_id, at in created.items()]
        )
    codes = session.execute(_expired_codes, which).scalars().all()
    if codes:
        session.execute(delete(Code).where(Code.handle_hash.in_(codes)))
    clients = session.execute(_unused_clients, which).scalars().all()
    if clients:
        session.execute(delete(Client).where(Client.client_id.in_(clients), Client.last_used_at.is_(None)))
    return {"tokens": len(tokens), "codes": len(codes), "clients": len(clients)}
