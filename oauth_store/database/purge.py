"""Delete expired rows in small batches, now and then, after a response, without any command or job."""

import asyncio
import time

from sqlalchemy import BigInteger, BindParameter, bindparam, delete, exists, func, null, select, update
from sqlalchemy.orm import Session

from oauth_store.database.models import KEEP_EXPIRED_SECONDS, Client, Code, Token, is_expired, is_unused
from oauth_store.database.store import Store
from oauth_store.events import emit_after_commit

INTERVAL_SECONDS = 60
BATCH = 100
"""The most rows of each table that one purge deletes."""
BELIEVED_AFTER_SECONDS = 3600
"""How old rows have to be to vouch for a clock: one that is ahead for a moment writes younger ones."""
_now: BindParameter[int] = bindparam("b_now", type_=BigInteger)  # an integer of PostgreSQL ends in 2038
_expired_token, _expired_code = is_expired(Token, _now), is_expired(Code, _now)
_unused_client = is_unused(_now)

# Selected first and deleted by key, since DELETE ... LIMIT is not portable. Rows that a step has locked are skipped.
_expired_tokens, _expired_codes, _unused_clients = (
    select(*columns).where(expired).order_by(oldest).limit(bindparam("b_batch")).with_for_update(skip_locked=True)
    for columns, expired, oldest in (
        ((Token.token_hash, Token.grant_id, Token.created_at), _expired_token, Token.expires_at),
        ((Code.handle_hash,), _expired_code, Code.expires_at),
        ((Client.client_id,), _unused_client, Client.created_at),
    )
)
# No index has `created_at` of tokens and codes. Rows created after a time also expire after it, which has an index.
_from: BindParameter[int] = bindparam("b_from")
_to: BindParameter[int] = bindparam("b_to")
_witnesses = select(
    exists().where(Token.expires_at > _from, Token.created_at.between(_from, _to))
    | exists().where(Code.expires_at > _from, Code.created_at.between(_from, _to))
    | exists().where(Client.last_used_at.is_(None), Client.created_at.between(_from, _to))
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
    """Deletes expired rows, off the path of the request that triggers it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: float | None = None

    def nudge(self) -> None:
        """Start a purge if the last one was a minute ago, or left something. Costs nothing otherwise."""
        now = time.time()
        if self._last is None:  # the first step should not wait for a purge
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
    if not is_believed(session, now):
        return {"tokens": 0, "codes": 0, "clients": 0}
    deleted = purge(session, now)
    if any(deleted.values()):
        emit_after_commit(session, "purged", **deleted)
    return deleted


def is_believed(session: Session, now: int) -> bool:
    """Return whether a clock fits this database: whether a row is between an hour and a week old by it.

    A clock that jumps ahead by less than a week deletes no refresh token that works: `is_expired` keeps it for a week.
    If it jumps further, all rows are older by it, except those written meanwhile, which are younger. After a long time
    without use, the purge waits for an hour of use.
    """
    between = {"b_from": now - KEEP_EXPIRED_SECONDS, "b_to": now - BELIEVED_AFTER_SECONDS}
    return bool(session.execute(_witnesses, between).scalar_one())


def purgeable(session: Session, now: int) -> dict[str, int]:
    """Return the number of expired rows of each table."""
    counts = {}
    for name, expired in (("tokens", _expired_token), ("codes", _expired_code), ("clients", _unused_client)):
        counts[name] = session.execute(select(func.count()).where(expired), {"b_now": now}).scalar_one()
    return counts


def purge(session: Session, now: int, batch: int = BATCH) -> dict[str, int]:
    """Delete one batch of expired rows, and return how many of each table it had."""
    which = {"b_now": now, "b_batch": batch}
    tokens = session.execute(_expired_tokens, which).all()
    if tokens:
        session.execute(delete(Token).where(Token.token_hash.in_([token.token_hash for token in tokens])))
        # An expired token of a grant shows that the refresh tokens consumed before its creation have successors that
        # were used: no replay can need their sealed pairs any more.
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
