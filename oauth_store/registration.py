"""Registrations (RFC 7591): what is checked of each, and how it is stored."""

import time

from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from oauth_store.clients import check_redirect_uris
from oauth_store.credentials import hash_secret
from oauth_store.database import Database
from oauth_store.models import CLIENT_ID_LENGTH, Client

METADATA_BYTES = 32 * 1024
"""The size of the largest registration that is stored: anyone may register."""


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
    secret = client.client_secret
    values = {
        "client_metadata": _metadata(client),
        "client_secret_hash": hash_secret(secret) if secret else None,
    }
    replace = update(Client).where(Client.client_id == client.client_id).values(values)
    try:
        async with database.write() as session:
            replaced = await session.execute(replace)
            if not replaced.rowcount:  # type: ignore[attr-defined]  # an UPDATE's result is a CursorResult
                new = {"client_id": client.client_id, "created_at": int(time.time()), "last_used_at": last_used_at}
                await session.execute(insert(Client).values({**new, **values}))
    except IntegrityError:  # another process registered it in between
        async with database.write() as session:
            await session.execute(replace)


def _metadata(client: OAuthClientInformationFull) -> str:
    return client.model_dump_json(exclude={"client_secret"}, exclude_none=True)
