"""Personal tokens: an access token that the owner makes by hand, for a program that cannot sign in.

Each is a client of its own with one live access token, and no other way in: no redirect URI, no grant type, no refresh
token. So it is a grant like all others: it is listed, explained, limited and revoked as they are.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret, mint_grant_id, mint_personal_token
from oauth_store.database.models import ACCESS, NEVER, REFRESH, clients, is_live, tokens
from oauth_store.display import one_line
from oauth_store.errors import LostRaceError, OAuthStoreError
from oauth_store.events import emit_after_commit
from oauth_store.flows.connected import LiveGrant, live_grants
from oauth_store.flows.scopes import check_scopes

NO_EXPIRY = 253402300799
"""The `expires_at` of a token that never expires: the last second of the year 9999."""
NAME_LENGTH = 100
CLIENT_ID = "token-"
"""What the client_id of a personal token begins with."""
_UNITS = {"d": 24 * 3600, "y": 365 * 24 * 3600}


@dataclass(frozen=True, slots=True, repr=False)
class NewToken:
    """A personal token that was just made. Its text is not stored: it is shown once."""

    text: str
    name: str
    grant_id: bytes
    scopes: tuple[str, ...]
    subject: str | None
    resource: str | None
    expires_at: int


def expiry_of(text: str, now: int) -> int:
    """Return when a token expires that is made now for "30d", "1y" or "never". Raises `OAuthStoreError`."""
    if text == "never":
        return NO_EXPIRY
    found = re.fullmatch(r"([1-9][0-9]{0,3})([dy])", text)
    if found is None or int(found[1]) * _UNITS[found[2]] > 100 * _UNITS["y"]:
        raise OAuthStoreError(f"the expiry is {one_line(text)!r}; expected days or years, such as 30d or 1y, or never")
    return now + int(found[1]) * _UNITS[found[2]]


def create_token(
    session: Session,
    name: str,
    scopes: Sequence[str],
    expiry: str,
    *,
    subject: str | None,
    resource: str | None,
    by: str,
) -> NewToken:
    """Make a personal token for the server with this resource. `by` is the person, for the log.

    Raises `OAuthStoreError` for a name that is empty or too long, or that a live token of this server and subject has.
    """
    now = int(time.time())
    name = one_line(name).strip()
    if not name or len(name) > NAME_LENGTH:
        raise OAuthStoreError(f"the token's name is empty or longer than {NAME_LENGTH} characters; choose another")
    check_scopes(scopes)
    client_id = client_id_of(name, subject, resource)
    token = NewToken(
        mint_personal_token(), name, mint_grant_id(), tuple(scopes), subject, resource, expiry_of(expiry, now)
    )
    _store_client(session, client_id, name, scopes, now)
    live, _ = live_grants(session, client_id=client_id, now=now)
    if live:
        raise OAuthStoreError(f"a token named {name} exists; choose another name, or revoke that token first")
    row = {
        "token_hash": hash_secret(token.text),
        "kind": ACCESS,
        "grant_id": token.grant_id,
        "client_id": client_id,
        "subject": subject,
        "scopes": " ".join(scopes),
        "resource": resource,
        "created_at": now,
        "expires_at": token.expires_at,
    }
    session.execute(insert(tokens), row)
    emit_after_commit(session, "token_created", grant_id=token.grant_id, client_id=client_id, subject=subject, by=by)
    return token


def client_id_of(name: str, subject: str | None, resource: str | None) -> str:
    """Return the client_id of a token: of one name, there is one live token for each server and subject."""
    named = json.dumps([name, subject, resource]).encode()
    return f"{CLIENT_ID}{hashlib.sha256(named).hexdigest()[:32]}"


def _store_client(session: Session, client_id: str, name: str, scopes: Sequence[str], now: int) -> None:
    """Store the token's client, or replace it, and keep its row as it is: no other token gets the name meanwhile."""
    metadata: dict[str, Any] = {
        "client_id": client_id,
        "client_name": name,
        "grant_types": [],
        "response_types": [],
        "token_endpoint_auth_method": "none",
        "scope": " ".join(scopes) or None,
    }
    values = {"client_metadata": json.dumps(metadata), "last_used_at": NEVER}
    replaced = session.connection().execute(update(clients).where(clients.c.client_id == client_id).values(**values))
    if not replaced.rowcount:
        try:
            session.execute(insert(clients), {"client_id": client_id, "created_at": now, **values})
        except IntegrityError as error:  # of the same name, at the same moment
            raise LostRaceError from error


def is_personal(client_id: str) -> bool:
    """Return whether a client is a personal token's."""
    return re.fullmatch(f"{CLIENT_ID}[0-9a-f]{{32}}", client_id) is not None


def personal_tokens(session: Session, *, now: int | None = None) -> list[LiveGrant]:
    """Return the live personal tokens of all servers on the database, by name."""
    of_tokens = select(tokens.c.client_id).where(
        tokens.c.kind == ACCESS,
        tokens.c.client_id.between(CLIENT_ID, f"{CLIENT_ID}g"),  # hexadecimal digits follow
        is_live(int(time.time()) if now is None else now),
    )
    client_ids = session.execute(of_tokens).scalars().all()
    found = filter(is_personal, client_ids)
    grants = [grant for client_id in found for grant in live_grants(session, client_id=client_id, now=now)[0]]
    return sorted(grants, key=lambda grant: str(grant.client_name))


def resources(session: Session) -> list[str]:
    """Return the servers on the database that have grants, by their MCP URLs: a few of them, if they are many."""
    of_tokens = (
        select(tokens.c.resource)
        .where(tokens.c.kind.in_((ACCESS, REFRESH)), tokens.c.resource.is_not(None))
        .distinct()
        .limit(4)
    )
    return sorted(session.execute(of_tokens).scalars())
