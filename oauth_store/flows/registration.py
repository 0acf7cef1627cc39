"""Registrations (RFC 7591): what is checked of each, and how it is stored."""

import time

from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from sqlalchemy import bindparam, insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import CLIENT_ID_LENGTH, clients
from oauth_store.database.sqlite import LATER, SEND
from oauth_store.database.store import Database
from oauth_store.flows.clients import check_redirect_uris

METADATA_BYTES = 32 * 1024
"""The size of the largest registration that is stored: anyone may register."""

_replace_client = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"))
    .values(client_metadata=bindparam("b_metadata"), client_secret_hash=bindparam("b_secret_hash"))
)
_insert_client = insert(clients).execution_options(**{SEND: LATER})


def check_registration(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` for a client that no server of ours would take, whatever its scopes."""
    if len(client.client_id) > CLIENT_ID_LENGTH:
        raise RegistrationError("invalid_client_metadata", f"client_id is longer than {CLIENT_ID_LENGTH} characters")
    check_redirect_uris(client)
    if len(_metadata(client).encode()) > METADATA_BYTES:
        raise RegistrationError("invalid_client_metadata", f"more than {METADATA_BYTES} bytes of metadata")


async def store_registration(
    database: Database, client: OAuthClientInformationFull, *, last_used_at: int | None = None
) -> None:
    """Store a registration, or replace the one of the same client_id. Its secret is stored as a hash."""
    metadata = _metadata(client)
    secret_hash = hash_secret(client.client_secret) if client.client_secret else None
    new = {
        "client_id": client.client_id,
        "client_metadata": metadata,
        "client_secret_hash": secret_hash,
        "created_at": int(time.time()),
        "last_used_at": last_used_at,
    }
    try:
        await database.write().run(Session.execute, _insert_client, new)
    except IntegrityError:
        known = {"b_client_id": client.client_id, "b_metadata": metadata, "b_secret_hash": secret_hash}
        await database.write().run(Session.execute, _replace_client, known)


def _metadata(client: OAuthClientInformationFull) -> str:
    return client.model_dump_json(exclude={"client_secret"}, exclude_none=True)
