"""Who is connected: the live grants, as their owner sees them, and how to end some of them."""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Subquery, bindparam, case, func, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from oauth_store.models import ACCESS, REFRESH, Client, Token, codes, tokens

_close_codes = (
    update(codes)
    .where(codes.c.grant_id.in_(bindparam("b_grant_ids", expanding=True)))
    .values(consumed_at=func.coalesce(codes.c.consumed_at, bindparam("b_now")))
)
_revoke_tokens = (
    update(tokens)
    .where(
        tokens.c.grant_id.in_(bindparam("b_grant_ids", expanding=True)),
        tokens.c.kind == bindparam("b_kind"),
        tokens.c.revoked_at.is_(None),
    )
    .values(revoked_at=bindparam("b_now"), revoked_reason=bindparam("b_reason"), replay=null())
)


@dataclass(frozen=True, slots=True)
class Connection:
    """One live grant: one device or application that the owner has let in, and that can still come in."""

    grant_id: bytes
    client_id: str
    client_name: str | None
    """What the client calls itself. Anyone may register under any name."""
    hosts: tuple[str, ...]
    """Where its codes are sent: the hosts of its redirect URIs, or `scheme:` for a scheme of an application's own."""
    scopes: tuple[str, ...]
    subject: str | None
    resource: str | None
    granted_at: int
    last_used_at: int
    """The latest of what is stored: a refresh, and the first use of a pair. Later uses of a token leave no trace."""
    expires_at: int
    """When the grant ends unless it is refreshed before."""


def is_live(now: int) -> ColumnElement[bool]:
    """Whether a token's row is neither expired, consumed nor revoked."""
    return (Token.expires_at > now) & Token.consumed_at.is_(None) & Token.revoked_at.is_(None)


def live_grant_rows(
    now: int, *, subject: str | None = None, client_id: str | None = None, grant_id: bytes | None = None
) -> Subquery:
    """Return one row for each grant that has a live token. One pass over the tokens, those that rotation left too."""
    # All tokens of a grant are of one client and one subject; the refresh tokens have the scopes that were granted,
    # while an access token may have less of them.
    last_used_at = case((Token.first_used_at > Token.created_at, Token.first_used_at), else_=Token.created_at)
    expires_at = func.max(case((is_live(now), Token.expires_at)))
    rows = (
        select(
            Token.grant_id,
            func.max(Token.client_id).label("client_id"),
            func.max(Token.subject).label("subject"),
            func.max(Token.resource).label("resource"),
            func.coalesce(func.max(case((Token.kind == REFRESH, Token.scopes))), func.max(Token.scopes)).label(
                "scopes"
            ),
            func.min(func.coalesce(Token.granted_at, Token.created_at)).label("granted_at"),
            func.max(last_used_at).label("last_used_at"),
            expires_at.label("expires_at"),
        )
        .where(Token.kind.in_((ACCESS, REFRESH)))
        .group_by(Token.grant_id)
        .having(expires_at.is_not(None))
    )
    if subject is not None:
        rows = rows.where(Token.subject == subject)
    if client_id is not None:
        rows = rows.where(Token.client_id == client_id)
    if grant_id is not None:
        rows = rows.where(Token.grant_id == grant_id)
    return rows.subquery()


async def live_grants(
    session: AsyncSession,
    *,
    subject: str | None = None,
    client_id: str | None = None,
    grant_id: bytes | None = None,
    limit: int | None = None,
    now: int | None = None,
) -> list[Connection]:
    """Return the live grants, those that were used last first: all, or those of a subject, a client, or just one."""
    rows = live_grant_rows(
        int(time.time()) if now is None else now, subject=subject, client_id=client_id, grant_id=grant_id
    )
    query = (
        select(rows, Client.client_metadata)
        .join(Client, Client.client_id == rows.c.client_id)
        .order_by(rows.c.last_used_at.desc(), rows.c.grant_id)
        .limit(limit)
    )
    found = []
    for row in await session.execute(query):
        if (subject is not None and row.subject != subject) or (client_id is not None and row.client_id != client_id):
            continue  # MariaDB pads: 'abc ' equals 'abc'
        name, hosts = described(row.client_metadata)
        found.append(
            Connection(
                grant_id=row.grant_id,
                client_id=row.client_id,
                client_name=name,
                hosts=hosts,
                scopes=tuple(row.scopes.split()),
                subject=row.subject,
                resource=row.resource,
                granted_at=row.granted_at,
                last_used_at=row.last_used_at,
                expires_at=row.expires_at,
            )
        )
    return found


async def revoke_grants(session: AsyncSession, grant_ids: Collection[bytes], reason: str, now: int) -> None:
    """End some grants: their codes, and every token of them, also those that a refresh inserts at this moment.

    `reason` says by whom, in at most 64 characters: `explain` repeats it. A thousand grants at once are fine; more
    would keep other writers waiting for long.
    """
    values = {"b_grant_ids": list(grant_ids), "b_now": now}
    connection = await session.connection()
    await connection.execute(_close_codes, values)
    # Refresh tokens before access tokens, as every step takes the rows of a grant: otherwise it and a refresh wait for
    # each other, and PostgreSQL needs a second to see that.
    for kind in (REFRESH, ACCESS):
        # At READ COMMITTED the UPDATE waits for a refresh under way and then misses the rows that it inserted. Whatever
        # is still to come needs one of the rows seen here, so that a round that finds nothing is the last.
        while (await connection.execute(_revoke_tokens, {**values, "b_kind": kind, "b_reason": reason})).rowcount:
            pass


def described(client_metadata: str) -> tuple[str | None, tuple[str, ...]]:
    """Return a stored client's name and the hosts of its redirect URIs."""
    metadata: dict[str, Any] = json.loads(client_metadata)
    return metadata.get("client_name"), tuple(dict.fromkeys(map(_host, metadata.get("redirect_uris") or ())))


def _host(redirect_uri: str) -> str:
    try:
        url = urlsplit(redirect_uri)
    except ValueError:  # what registration lets in is for pydantic to say, which reads URLs in a way of its own
        return redirect_uri
    return url.hostname or "" if url.scheme in ("https", "http") else f"{url.scheme}:"
