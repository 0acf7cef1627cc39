"""The scopes of a live grant, which its owner changes: they count from the next call on, and every refresh keeps them.

A grant's scopes are in the row of its live refresh token. An access token may have fewer, because its client asked for
fewer (RFC 6749, section 6).
"""

import re
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, bindparam, insert, select, update
from sqlalchemy.orm import Session

from oauth_store.database.models import ACCESS, REFRESH, SCOPES, is_live, tokens
from oauth_store.display import ago, one_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit_after_commit
from oauth_store.flows.connected import BATCH, LiveGrant, live_grants

KEEP_CHANGE_SECONDS = 365 * 24 * 3600
"""How long the record of a change is kept."""

_is_of_grant = (tokens.c.grant_id == bindparam("b_grant_id"), tokens.c.kind == bindparam("b_kind"))
_lock = update(tokens).where(*_is_of_grant, is_live(bindparam("b_now"))).values(scopes=tokens.c.scopes)
_live_tokens = select(tokens).where(*_is_of_grant, is_live(bindparam("b_now")))
_set_scopes = update(tokens).where(tokens.c.token_hash == bindparam("b_hash")).values(scopes=bindparam("b_scopes"))
_changes = (
    select(tokens.c.grant_id, tokens.c.scopes, tokens.c.created_at, tokens.c.revoked_reason)
    .where(tokens.c.grant_id.in_(bindparam("b_grant_ids", expanding=True)), tokens.c.kind == SCOPES)
    .order_by(tokens.c.created_at, tokens.c.token_hash)
)


@dataclass(frozen=True, slots=True)
class ScopeChange:
    """A change of a grant's scopes."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    at: int
    by: str
    """The person, and the page or the program, in at most 64 characters."""

    def in_words(self, now: int) -> str:
        """Return for instance "write removed 3 h ago by owner, on the page of apps"."""
        changed = ((self.added, "added"), (self.removed, "removed"))
        parts = [f"{' '.join(scopes)} {verb}" for scopes, verb in changed if scopes]
        return f"{', '.join(parts)} {ago(self.at, now)} by {one_line(self.by)}"


def change_scopes(
    session: Session,
    grant_id: bytes,
    *,
    add: Collection[str] = (),
    remove: Collection[str] | None = (),
    subject: str | None = None,
    resources: Collection[str] | None = None,
    by: str,
    now: int,
) -> tuple[LiveGrant, ScopeChange] | None:
    """Change the scopes of a live grant of a subject and a server. `remove=None` removes all that are not added.

    Return the grant as it was, and the change; None if no such grant is live. Scopes that are added are added to the
    access token too: the client need not refresh. Raises `OAuthStoreError` if no scope would be left.
    """
    listed, _ = live_grants(session, subject=subject, grant_id=grant_id, resources=resources, now=now)
    row = _locked(session, grant_id, now) if listed else None
    if row is None:
        return None
    before = row.scopes.split()
    after = scopes_after(before, add, remove)
    change = ScopeChange(
        added=tuple(scope for scope in after if scope not in before),
        removed=tuple(scope for scope in before if scope not in after),
        at=now,
        by=by[:64],
    )
    if change.removed and not after:  # also where another change took the others meanwhile
        raise OAuthStoreError("a grant needs at least one scope; to end it, revoke it")
    if change.added or change.removed:
        _store(session, row, after, change)
    return listed[0], change


def scopes_after(before: Collection[str], add: Collection[str], remove: Collection[str] | None) -> list[str]:
    """Return the scopes that a change leaves: see `change_scopes`."""
    kept = [scope for scope in before if scope in add or (remove is not None and scope not in remove)]
    return list(dict.fromkeys([*kept, *add]))


def _locked(session: Session, grant_id: bytes, now: int) -> Row[Any] | None:
    """Return the row of a grant's live refresh token, or of its access token if it has no other, and keep it as it is.

    A refresh needs that row: one that is under way ends first, and its successor is the row to lock; one that comes
    later finds that its scopes have changed, and reads them again.
    """
    for kind in (REFRESH, ACCESS):
        values = {"b_grant_id": grant_id, "b_kind": kind, "b_now": now}
        while True:
            locked = session.connection().execute(_lock, values).rowcount
            row: Row[Any] | None = session.execute(_live_tokens, values).first()
            if row is None:
                break
            if locked:
                return row
    return None


def _store(session: Session, row: Row[Any], after: Sequence[str], change: ScopeChange) -> None:
    of_grant = {"b_grant_id": row.grant_id, "b_now": change.at}
    if row.kind == REFRESH:
        session.execute(_set_scopes, {"b_hash": row.token_hash, "b_scopes": " ".join(after)})
    for access in session.execute(_live_tokens, {**of_grant, "b_kind": ACCESS}).all():
        scopes = [scope for scope in access.scopes.split() if scope in after]
        scopes += [scope for scope in change.added if scope not in scopes]
        session.execute(_set_scopes, {"b_hash": access.token_hash, "b_scopes": " ".join(scopes)})
    record = {
        # of no secret, and in their order: several may be of one second
        "token_hash": time.time_ns().to_bytes(8, "big") + secrets.token_bytes(24),
        "kind": SCOPES,
        "grant_id": row.grant_id,
        "client_id": row.client_id,
        "subject": row.subject,
        "resource": row.resource,
        "scopes": " ".join([*(f"+{scope}" for scope in change.added), *(f"-{scope}" for scope in change.removed)]),
        "created_at": change.at,
        "expires_at": change.at + KEEP_CHANGE_SECONDS,
        "revoked_reason": change.by,
    }
    session.execute(insert(tokens), record)
    emit_after_commit(
        session,
        "scopes_changed",
        grant_id=row.grant_id,
        client_id=row.client_id,
        subject=row.subject,
        added=" ".join(change.added) or None,
        removed=" ".join(change.removed) or None,
        by=change.by,
    )


def changes_of(session: Session, grant_ids: Sequence[bytes]) -> dict[bytes, list[ScopeChange]]:
    """Return the changes of the scopes of some grants in the last year, the oldest first; of those that had any."""
    changes: dict[bytes, list[ScopeChange]] = {}
    for start in range(0, len(grant_ids), BATCH):
        for row in session.execute(_changes, {"b_grant_ids": grant_ids[start : start + BATCH]}):
            words = row.scopes.split()
            added, removed = (tuple(word[1:] for word in words if word[0] == sign) for sign in "+-")
            change = ScopeChange(added, removed, row.created_at, str(row.revoked_reason))
            changes.setdefault(row.grant_id, []).append(change)
    return changes


def check_scopes(scopes: Iterable[str]) -> None:
    """Raise `OAuthStoreError` for a word that cannot be a scope."""
    for scope in scopes:
        if not is_scope(scope):
            raise OAuthStoreError(f'{one_line(scope)!r} is not a scope; use printable ASCII without spaces, " and \\')


def is_scope(text: str) -> bool:
    """Return whether a word can be a scope (RFC 6749, section 3.3)."""
    return re.fullmatch(r"[!#-\[\]-~]+", text) is not None
