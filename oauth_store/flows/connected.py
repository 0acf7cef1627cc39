"""Live grants as the owner sees them, and how to end them."""

import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Row, Select, bindparam, case, func, null, select, true, update
from sqlalchemy.orm import Session

from oauth_store.database.models import ACCESS, REFRESH, Client, Code, Token, codes, is_live, tokens
from oauth_store.display import link_start
from oauth_store.events import emit_after_commit

BATCH = 1000
"""The most values in one statement: every database has a limit."""

AUTHORIZATION_CODE = "authorization_code"
CLIENT_CREDENTIALS = "client_credentials"
"""The grant type of machines (RFC 6749, section 4.4)."""
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
"""The grant type of devices (RFC 8628, section 3.4)."""
JWT_BEARER_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
"""The grant type of identity assertions (RFC 7523, section 2.1). The SDK's constant would take a second to import."""
INTROSPECTION = "introspection"
"""Stored as the grant type of a server that asks about tokens (RFC 7662). It gets none: no grant is called that."""
OF_OWNERS = ([CLIENT_CREDENTIALS], [JWT_BEARER_GRANT], [INTROSPECTION])
"""The grant types of clients without a code, which only the owner adds: machines, those of identity providers, and
servers that ask about tokens."""


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
class LiveGrant:
    """A live grant: a device or application that the owner let in, and that still has access."""

    grant_id: bytes
    client_id: str
    client_name: str | None
    """The name that the client gives itself. Anyone may register under any name."""
    hosts: tuple[str, ...]
    """Where its codes are sent: the hosts of its redirect URIs, or the start of an app's own links."""
    scopes: tuple[str, ...]
    subject: str | None
    resource: str | None
    granted_at: int
    last_used_at: int
    """The latest refresh or use of an access token, accurate to five minutes."""
    expires_at: int
    """When the grant ends unless it is refreshed first."""
    ceiling: tuple[str, ...] | None
    """The scopes that the owner set for a client that was added by hand: it can have no others."""

    @property
    def used_at(self) -> int | None:
        """The last use of a personal token, whose creation is not a use; None if there is none."""
        return self.last_used_at if self.last_used_at > self.granted_at else None


def live_grants(
    session: Session,
    *,
    subject: str | None = None,
    client_id: str | None = None,
    grant_id: bytes | None = None,
    resources: Collection[str] | None = None,
    limit: int | None = None,
    now: int | None = None,
) -> tuple[list[LiveGrant], int]:
    """Return the live grants, most recently used first, and how many there are in all, beyond the limit too.

    Filter them by subject, client, the resources of a server, or grant; without a filter, all are returned.
    """
    live = (
        is_live(int(time.time()) if now is None else now)
        & Token.kind.in_((ACCESS, REFRESH))
        & _of(Token, subject, client_id, grant_id, resources)
    )
    # First select the wanted grants, then their details: that takes half as long as the details of all grants.
    newest = (
        select(Token.grant_id, func.count().over().label("total"))
        .where(live)
        .group_by(Token.grant_id)
        .order_by(func.max(_last_used_at).desc(), Token.grant_id)
        .limit(limit)
    )
    wanted = session.execute(newest).all()
    if len(wanted) <= BATCH:
        live &= Token.grant_id.in_([row.grant_id for row in wanted])
    details = {row.grant_id: row for row in session.execute(_details(live))}
    grants = [_connection(details[row.grant_id]) for row in wanted if row.grant_id in details]
    return grants, wanted[0].total if wanted else 0


def _of(
    model: type[Token] | type[Code],
    subject: str | None,
    client_id: str | None,
    grant_id: bytes | None,
    resources: Collection[str] | None,
) -> ColumnElement[bool]:
    """Match rows of a subject, client, grant and server, to the letter: for MariaDB, 'abc ' equals 'abc'."""
    matches = true() if grant_id is None else model.grant_id == grant_id
    if resources is not None:
        spelled = [spelling for resource in resources for spelling in _spellings(resource)]
        matches &= model.resource.is_(None) | model.resource.in_(spelled)
    for column, value in ((model.subject, subject), (model.client_id, client_id)):
        if value is not None:
            literally = re.sub(r"([/%_])", r"/\1", value)
            matches &= (column == value) & column.like(literally, escape="/")
    return matches


def _spellings(resource: str) -> tuple[str, str]:
    bare = resource.removesuffix("/")
    return bare, f"{bare}/"


_last_used_at = case((Token.first_used_at > Token.created_at, Token.first_used_at), else_=Token.created_at)


def _details(live: ColumnElement[bool]) -> Select[Any]:
    # All tokens of a grant have the same client and subject. Its refresh tokens have the granted scopes, of which an
    # access token may have fewer.
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
            func.max(_last_used_at).label("last_used_at"),
            func.max(Token.expires_at).label("expires_at"),
        )
        .where(live)
        .group_by(Token.grant_id)
        .subquery()
    )
    return select(rows, Client.client_metadata).join(Client, Client.client_id == rows.c.client_id)


def _connection(row: Row[Any]) -> LiveGrant:
    name, hosts = described(row.client_metadata)
    return LiveGrant(
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
        ceiling=_ceiling(row.client_metadata),
    )


def _ceiling(client_metadata: str) -> tuple[str, ...] | None:
    metadata: dict[str, Any] = json.loads(client_metadata)
    named = (metadata.get("scope") or "").split() if metadata.get("added_by_owner") else ()
    return tuple(named) or None


@dataclass(frozen=True, slots=True)
class GrantName:
    """A grant as events name it."""

    grant_id: bytes
    client_id: str


def grants_to_end(
    session: Session,
    now: int,
    *,
    subject: str | None = None,
    client_id: str | None = None,
    grant_id: bytes | None = None,
    resources: Collection[str] | None = None,
) -> list[GrantName]:
    """Return the grants that can still be used: those with a code waiting for its client, and those with a live token.

    Codes come first, since a code that is exchanged in between becomes a token. A grant found twice counts once.
    """
    chosen_tokens = Token.kind.in_((ACCESS, REFRESH)) & is_live(now)
    chosen_codes = Code.approved_at.is_not(None) & Code.consumed_at.is_(None) & (Code.expires_at > now)
    queries = (
        select(model.grant_id, model.client_id)
        .distinct()
        .where(chosen, _of(model, subject, client_id, grant_id, resources))
        for model, chosen in ((Code, chosen_codes), (Token, chosen_tokens))
    )
    rows = [row for query in queries for row in session.execute(query)]
    return list({row.grant_id: GrantName(row.grant_id, str(row.client_id)) for row in rows}.values())


def grants_named(session: Session, prefix: str) -> list[bytes]:
    """Return the ids of grants, live or not, that begin with these hex digits: four of them at most."""
    first, last = bytes.fromhex(prefix.ljust(32, "0")), bytes.fromhex(prefix.ljust(32, "f"))
    tokens_of = select(Token.grant_id).where(Token.kind.in_((ACCESS, REFRESH)), Token.grant_id.between(first, last))
    codes_of = select(Code.grant_id).where(Code.approved_at.is_not(None), Code.grant_id.between(first, last))
    return sorted(session.execute(tokens_of.union(codes_of).limit(4)).scalars())


def end_all(
    session: Session, subject: str | None, resources: Collection[str] | None, *, by: str, now: int
) -> list[GrantName]:
    """End all grants of a server, or of one subject of it, and return them. `by` names the actor in the log."""
    chosen = grants_to_end(session, now, subject=subject, resources=resources)
    _end(session, chosen, by, now)
    return chosen


def end_one(
    session: Session, grant_id: bytes, subject: str | None, resources: Collection[str] | None, *, by: str, now: int
) -> LiveGrant | None:
    """End one live grant of a server and a subject, and return it as it was, or None if it does not exist."""
    listed, _ = live_grants(session, subject=subject, grant_id=grant_id, resources=resources, now=now)
    _end(session, [GrantName(grant.grant_id, grant.client_id) for grant in listed], by, now)
    return listed[0] if listed else None


def _end(session: Session, chosen: list[GrantName], by: str, now: int) -> None:
    end_grants(session, chosen, f"revoked on the page by {by}", by, now)


def end_grants(session: Session, chosen: Collection[GrantName], reason: str, by: str, now: int) -> None:
    """End exactly these grants. `reason` is stored in their rows, and `by` is logged."""
    for grant in chosen:
        emit_after_commit(session, "revoked", grant_id=grant.grant_id, client_id=grant.client_id, by=by)
    revoke_grants(session, [grant.grant_id for grant in chosen], reason[:64], now)


def revoke_grants(session: Session, grant_ids: Collection[bytes], reason: str, now: int) -> None:
    """End grants: their codes and all their tokens, including those that a refresh inserts at this moment.

    `reason` names the cause in at most 64 characters; `explain` repeats it. A thousand grants at once are fine; more
    would keep other writers waiting for long.
    """
    connection, ids = session.connection(), list(grant_ids)
    takes_turns = connection.dialect.name == "sqlite"
    for start in range(0, len(ids), BATCH):  # every database limits the values in one statement
        values = {"b_grant_ids": ids[start : start + BATCH], "b_now": now}
        connection.execute(_close_codes, values)
        # Refresh tokens before access tokens, the order in which every step takes the rows of a grant: otherwise this
        # step and a refresh wait for each other, and PostgreSQL needs a second to notice.
        for kind in (REFRESH, ACCESS):
            # At READ COMMITTED, the UPDATE waits for a refresh in progress and then misses the rows that it inserted.
            # Any later row needs one of the rows seen here, so a round that finds nothing is the last. SQLite has one
            # writer at a time, so no refresh is in progress.
            revoke = {**values, "b_kind": kind, "b_reason": reason}
            while connection.execute(_revoke_tokens, revoke).rowcount and not takes_turns:
                pass


def described(client_metadata: str) -> tuple[str | None, tuple[str, ...]]:
    """Return a stored client's name and the hosts of its redirect URIs."""
    metadata: dict[str, Any] = json.loads(client_metadata)
    return metadata.get("client_name"), tuple(dict.fromkeys(map(_host, metadata.get("redirect_uris") or ())))


def is_machine(client_metadata: str) -> bool:
    """Return whether a stored client is a machine: one that the owner added by hand, for client credentials alone."""
    if CLIENT_CREDENTIALS not in client_metadata:
        return False
    metadata: dict[str, Any] = json.loads(client_metadata)
    return metadata.get("added_by_owner") is True and metadata.get("grant_types") == [CLIENT_CREDENTIALS]


def presents_users(client_metadata: str) -> bool:
    """Return whether an access token of a stored client without a refresh token is for an asserted user."""
    grants = json.loads(client_metadata).get("grant_types", ())
    return JWT_BEARER_GRANT in grants and (AUTHORIZATION_CODE not in grants or "refresh_token" in grants)


def has_keys(client_metadata: str) -> bool:
    """Return whether a stored client authenticates with a key of its own (RFC 7523, section 2.2)."""
    metadata: dict[str, Any] = json.loads(client_metadata)
    return metadata.get("token_endpoint_auth_method") == "private_key_jwt"


def _host(redirect_uri: str) -> str:
    try:
        url = urlsplit(redirect_uri)
    except ValueError:  # registration leaves this decision to pydantic, which parses URLs in its own way
        return redirect_uri
    if url.scheme == "https":
        return url.netloc.rpartition("@")[2]
    return url.hostname or "" if url.scheme == "http" else link_start(url)  # on loopback, any port matches
