"""Revocation: a client ends its grant with any token of it (RFC 7009)."""

import time

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import ACCESS, REFRESH, tokens
from oauth_store.events import emit_after_commit
from oauth_store.flows.assertions import Secret, check_unused, spend
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.tokens import lookup

_token_by_hash = select(tokens).where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind.in_((ACCESS, REFRESH)))


async def revoke(issuer: Issuer, client_id: str, token: str, secret: Secret = None) -> None:
    """End the grant of a token of a client, whether the token is live, consumed or expired.

    An unknown token counts as revoked (RFC 7009, section 2.2). `secret` is what the client has authenticated with.
    Raises `AuthenticationError` for an assertion that was used before.
    """
    await issuer.store.write(_revoke_token, issuer, client_id, token, secret, int(time.time()))


def _revoke_token(session: Session, issuer: Issuer, client_id: str, token: str, secret: Secret, now: int) -> None:
    """End the grant of a token of this client and this server.

    A request that ends nothing leaves no row: anyone may send any number of them.
    """
    if _end_grant(session, issuer, client_id, token, now):
        spend(session, secret, now)
    else:
        check_unused(session, secret)


def _end_grant(session: Session, issuer: Issuer, client_id: str, token: str, now: int) -> bool:
    """End the grant of a token, and return whether there was one to end."""
    row = lookup(session, _token_by_hash, b_hash=hash_secret(token))
    if row is None or row.client_id != client_id or row.revoked_at is not None or not issuer.is_ours(row.resource):
        return False
    emit_after_commit(session, "revoked", grant_id=row.grant_id, client_id=row.client_id, by="the client")
    revoke_grants(session, [row.grant_id], "revoked by the client", now)
    return True
