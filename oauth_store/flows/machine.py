"""Give a machine an access token for its secret, without a refresh token (RFC 6749, section 4.4).

A machine is a confidential client that the owner added by hand for this alone. All its tokens at one server belong to
one grant, which is live for the lifetime of a refresh token after the latest of them. Once it is revoked, the next
token begins a new one: only removing the client keeps the machine out.

As in every grant, the scopes are in the row of a live refresh token, here one of no secret. The newest access token
cannot keep them: its client may have asked for fewer (section 3.3), and an hour later it is gone, with what the owner
has removed. Each new token updates that row, as a refresh does: a change of scopes or a revocation needs it too.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcp.server.auth.provider import TokenError
from mcp.shared.auth import InvalidScopeError, OAuthToken
from sqlalchemy import Row, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import mint_grant_id
from oauth_store.database.models import REFRESH, clients, tokens
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret
from oauth_store.flows.clients import OFFLINE_ACCESS, StoredClient, authenticate, get_client
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import Pair, issue, names_of, target_of, update_one
from oauth_store.urls import same_resource

_is_client = clients.c.client_id == bindparam("b_client_id")
_lock_client = update(clients).where(_is_client).values(client_metadata=clients.c.client_metadata)
_is_live = (tokens.c.revoked_at.is_(None), tokens.c.expires_at > bindparam("b_now"))
_live_grants = (
    select(tokens)
    .where(
        tokens.c.client_id == bindparam("b_client_id"),
        tokens.c.kind == REFRESH,
        tokens.c.paired_hash.is_(None),  # of no secret
        tokens.c.consumed_at.is_(None),
        *_is_live,
    )
    .order_by(tokens.c.created_at.desc(), tokens.c.token_hash)
)
_continue = (
    update(tokens)
    # with the scopes that were read: where the owner changes them meanwhile, the step begins again
    .where(tokens.c.token_hash == bindparam("b_hash"), *_is_live, tokens.c.scopes == bindparam("b_granted"))
    .values(first_used_at=bindparam("b_now"), expires_at=bindparam("b_expires_at"))
)


@dataclass(frozen=True, slots=True, repr=False)
class PresentedSecret:
    """A machine's request for an access token."""

    client_id: str
    secret: Secret
    scope: str = ""
    resource: str | None = None


async def grant(issuer: Issuer, machine: PresentedSecret) -> OAuthToken:
    """Issue an access token in one step. Raises `TokenError`, or `AuthenticationError` for a wrong secret."""
    try:
        issued = await issuer.store.write(_grant_to_machine, issuer, machine, int(time.time()))
    except IntegrityError as error:
        raise TokenError("invalid_client", "the client is no longer registered") from error
    issuer.after_commit()
    return issued


def _grant_to_machine(session: Session, issuer: Issuer, machine: PresentedSecret, now: int) -> OAuthToken:
    """Issue an access token of the machine's live grant, or of a new one."""
    client = _admitted(session, issuer, machine)
    resource = target_of(issuer, machine.resource)
    row = _live_grant(session, issuer, client, resource, now) or _begun(session, issuer, client, resource, now)
    scopes = _narrowed(issuer, client, row.scopes.split(), machine.scope)
    expires_at = now + issuer.refresh_expiry_seconds
    update_one(session, _continue, b_hash=row.token_hash, b_granted=row.scopes, b_now=now, b_expires_at=expires_at)
    emit_after_commit(session, "tokens_issued", **names_of(row))
    pair = Pair.mint(with_refresh_token=False)
    return issue(session, issuer, pair, row, scopes, now, granted_at=row.created_at)


def _admitted(session: Session, issuer: Issuer, machine: PresentedSecret) -> StoredClient:
    """Return the machine. Raises `AuthenticationError`, or `TokenError` for any other client, whatever it says."""
    client = authenticate(get_client(session, issuer.scopes, machine.client_id), machine.secret)
    if not client.is_machine or client.secret_hash is None:
        raise TokenError(
            "unauthorized_client", "the owner of this server did not add the client for client_credentials"
        )
    return client


def _live_grant(
    session: Session, issuer: Issuer, client: StoredClient, resource: str | None, now: int
) -> Row[Any] | None:
    """Return the row that keeps the latest live grant of a machine at a server, or None."""
    rows = session.execute(_live_grants, {"b_client_id": client.client_id, "b_now": now})
    return next((row for row in rows.all() if _is_for(issuer, row.resource, resource)), None)


def _is_for(issuer: Issuer, granted: str | None, resource: str | None) -> bool:
    """Return whether a grant is for a resource. One without is for this server's own."""
    if granted is None or resource is None:
        return issuer.is_own(resource or granted)
    return same_resource(granted, resource)


def _begun(session: Session, issuer: Issuer, client: StoredClient, resource: str | None, now: int) -> Row[Any]:
    """Return the row of a new grant with all scopes that the machine can have.

    Of several first tokens at once, one begins the grant, and the others find it: they take turns at the client's row.
    """
    update_one(session, _lock_client, b_client_id=client.client_id)
    row = _live_grant(session, issuer, client, resource, now)
    if row is not None:
        return row
    try:
        scopes = client.validate_scope(None) or ()
    except InvalidScopeError as error:
        raise TokenError("invalid_scope", error.message) from error
    values = {
        "token_hash": secrets.token_bytes(32),  # of no secret
        "kind": REFRESH,
        "grant_id": mint_grant_id(),
        "client_id": client.client_id,
        "resource": resource,
        "scopes": " ".join(scopes),
        "created_at": now,
        "expires_at": now + issuer.refresh_expiry_seconds,
    }
    session.execute(insert(tokens), values)
    return session.execute(select(tokens).where(tokens.c.token_hash == values["token_hash"])).one()


def _narrowed(issuer: Issuer, client: StoredClient, granted: Sequence[str], request: str) -> list[str]:
    """Return the scopes of an access token: those of the grant that were asked for, and the required ones.

    A scope that the owner has not named for the machine, or that the server no longer has, is never among them. SDKs
    ask for all scopes of the server: those that the machine cannot have are left out. Raises `TokenError` if none is
    left.
    """
    required = issuer.scopes.required
    offered = client.offered if client.scope or issuer.scopes.valid is not None else granted
    having = [scope for scope in granted if scope in offered]
    having = [scope for scope in dict.fromkeys([*having, *required]) if scope != OFFLINE_ACCESS]
    asked = set(request.split()) - {OFFLINE_ACCESS}
    kept = [scope for scope in having if scope in asked] if asked else having
    if (asked or granted) and not kept:
        raise TokenError("invalid_scope", "the owner of this server has granted the client none of these scopes")
    return list(dict.fromkeys([*kept, *required]))
