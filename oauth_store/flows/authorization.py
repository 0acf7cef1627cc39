"""An authorization request, in a session: stored, looked up, answered. Who may answer is decided elsewhere."""

from typing import Any

from mcp.server.auth.provider import AuthorizeError
from sqlalchemy import Row, Select, Update, bindparam, insert, select, update
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import NEVER, clients, codes
from oauth_store.database.sqlite import FIRST, LATER, LATER_IF_CHANGED, SEND
from oauth_store.flows.clients import owners
from oauth_store.flows.tokens import lookup, update_one
from oauth_store.urls import is_for

insert_request = insert(codes).execution_options(**{SEND: LATER})
_is_pending = (
    codes.c.handle_hash == bindparam("b_hash"),
    codes.c.consumed_at.is_(None),
    codes.c.expires_at > bindparam("b_now"),
)
_pending: Select[Any] = (
    select(*codes.c, clients.c.client_id.label("registered_id"), clients.c.client_metadata, clients.c.last_used_at)
    .select_from(codes.outerjoin(clients, clients.c.client_id == codes.c.client_id))
    .where(*_is_pending)
    .execution_options(**{SEND: FIRST})
)
_approve = (
    update(codes)
    .where(*_is_pending)
    .values(
        code_hash=bindparam("b_code_hash"),
        subject=bindparam("b_subject"),
        approved_at=bindparam("b_now"),
        expires_at=bindparam("b_expires_at"),
    )
    .execution_options(**{SEND: LATER_IF_CHANGED})
)
_deny = (
    update(codes)
    .where(*_is_pending)
    .values(consumed_at=bindparam("b_now"))
    .execution_options(**{SEND: LATER_IF_CHANGED})
)
_mark_owners = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"))
    .values(client_metadata=bindparam("b_metadata"))
    .execution_options(**{SEND: LATER_IF_CHANGED})
)
_stamp_client = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"))
    .values(last_used_at=bindparam("b_now"))
    .execution_options(**{SEND: LATER_IF_CHANGED})
)


def pending(session: Session, handle: str, own_resource: str | None, now: int) -> Row[Any] | None:
    """Return a request to this server that may still be answered, or None.

    Its `registered_id` is null if its client is gone.
    """
    row = lookup(session, _pending, b_hash=hash_secret(handle), b_now=now)
    return row if row is not None and is_for(row.resource, own_resource) else None


def approve(
    session: Session,
    handle: str,
    code: str,
    own_resource: str | None,
    *,
    subject: str | None,
    expires_at: int,
    now: int,
) -> Row[Any]:
    """Give a request its code, and return its row. Its client is one that was used, from now on.

    Raises `AuthorizeError`.
    """
    values = {"b_code_hash": hash_secret(code), "b_subject": subject, "b_expires_at": expires_at}
    row = _answer(session, _approve, handle, own_resource, now, **values)
    if row.registered_id is None:
        raise AuthorizeError("unauthorized_client", "the client is not registered")
    if row.last_used_at == NEVER:  # one that the owner added before registrations said so
        update_one(session, _mark_owners, b_client_id=row.client_id, b_metadata=owners(row.client_metadata))
    update_one(session, _stamp_client, b_client_id=row.client_id, b_now=now)
    return row


def deny(session: Session, handle: str, own_resource: str | None, now: int) -> Row[Any]:
    """End a request, and return its row. Raises `AuthorizeError`."""
    return _answer(session, _deny, handle, own_resource, now)


def _answer(
    session: Session, answer: Update, handle: str, own_resource: str | None, now: int, **values: Any
) -> Row[Any]:
    row = pending(session, handle, own_resource, now)
    if row is None:
        raise AuthorizeError("invalid_request", "this request is unknown, expired or already answered; start again")
    update_one(session, answer, b_hash=row.handle_hash, b_now=now, **values)
    return row
