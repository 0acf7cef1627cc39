"""Registrations (RFC 7591): how each is checked and stored."""

import time
from typing import Any

from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from sqlalchemy import BigInteger, Insert, Update, bindparam, func, insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from oauth_store.credentials import hash_secret
from oauth_store.database.models import CLIENT_ID_LENGTH, NEVER, clients
from oauth_store.events import emit_after_commit
from oauth_store.flows.client_keys import KeySet, check_keys_url, read_keys
from oauth_store.flows.clients import OFFLINE_ACCESS, PRIVATE_KEY_JWT, OwnersClient, check_scopes
from oauth_store.flows.connected import AUTHORIZATION_CODE, CLIENT_CREDENTIALS, DEVICE_CODE, OF_OWNERS
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.metadata_documents import InvalidDocumentError
from oauth_store.flows.redirect_uris import check_redirect_uris
from oauth_store.flows.scopes import is_scope

METADATA_BYTES = 32 * 1024
"""The largest registration that is stored, since anyone may register."""

_insert_client = insert(clients)
_replace_client = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"))
    .values(
        client_metadata=bindparam("b_client_metadata"),
        client_secret_hash=bindparam("b_client_secret_hash"),
        last_used_at=func.coalesce(clients.c.last_used_at, bindparam("b_last_used_at", type_=BigInteger)),
    )
)
_replace_metadata = (
    update(clients)
    .where(clients.c.client_id == bindparam("b_client_id"))
    .values(client_metadata=bindparam("b_client_metadata"))
)


async def register(issuer: Issuer, client: OAuthClientInformationFull) -> None:
    """Store a registration, or replace the one with the same client_id. Raises `RegistrationError`.

    A client without the code flow comes from the owner's own code: /register accepts none.
    """
    check_registration(client)
    if client.grant_types in OF_OWNERS:
        client = OwnersClient.model_validate(client.model_dump())
    elif _is_for_a_device(client):
        client = _without(client, AUTHORIZATION_CODE)
    client = client.model_copy(update={"jwks": _keys(client)})
    refused = [scope for scope in (client.scope or "").split() if not is_valid_scope(issuer, scope)]
    if refused:
        raise RegistrationError("invalid_client_metadata", f"scopes not valid here: {' '.join(refused)}")
    await _store(issuer, client)
    issuer.after_commit()


def is_valid_scope(issuer: Issuer, scope: str) -> bool:
    """Return whether a client may register for a scope: any scope, if the server does not list them."""
    listed = issuer.scopes.listed
    return is_scope(scope) and (listed is None or scope in listed or scope == OFFLINE_ACCESS)


def check_registration(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` for a client that no server of ours would accept, whatever its scopes."""
    if len(client.client_id) > CLIENT_ID_LENGTH:
        raise RegistrationError("invalid_client_metadata", f"client_id is longer than {CLIENT_ID_LENGTH} characters")
    if client.grant_types in OF_OWNERS:
        _check_confidential(client)
    elif not _is_for_a_device(client):
        check_redirect_uris(client.redirect_uris)
    check_scopes(client)
    if len(_metadata(client).encode()) > METADATA_BYTES:
        raise RegistrationError("invalid_client_metadata", f"more than {METADATA_BYTES} bytes of metadata")


def _is_for_a_device(client: OAuthClientInformationFull) -> bool:
    """Return whether a client can sign in as a device alone (RFC 8628)."""
    return DEVICE_CODE in client.grant_types and not client.redirect_uris


def _without(client: OAuthClientInformationFull, grant_type: str) -> OAuthClientInformationFull:
    kept = [grant for grant in client.grant_types if grant != grant_type]
    return client.model_copy(update={"grant_types": kept})


def _check_confidential(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` unless a client can use client credentials (RFC 6749, section 4.4), and only them.

    Or unless it can use only identity assertions (SEP-990), for which a key of its own is enough.
    """
    (grant,) = client.grant_types
    if client.redirect_uris:
        raise RegistrationError("invalid_redirect_uri", f"a client for {grant} has no redirect URI")
    method = client.token_endpoint_auth_method
    if grant != CLIENT_CREDENTIALS and method == PRIVATE_KEY_JWT and not client.client_secret:
        if not client.jwks_uri and not _keys(client):
            raise RegistrationError("invalid_client_metadata", "a client for private_key_jwt needs jwks or jwks_uri")
    elif not client.client_secret or method == "none":
        raise RegistrationError("invalid_client_metadata", f"a client for {grant} needs a secret")


def _keys(client: OAuthClientInformationFull) -> KeySet | None:
    """Return the public keys with which a client authenticates, if they are in its registration.

    Raises `RegistrationError` if none of them can be used, or if those elsewhere can never be fetched.
    """
    if client.token_endpoint_auth_method != PRIVATE_KEY_JWT:
        return None
    try:
        if client.jwks_uri is not None:
            check_keys_url(str(client.jwks_uri))
        return None if client.jwks is None else read_keys(client.jwks)
    except InvalidDocumentError as error:
        raise RegistrationError("invalid_client_metadata", str(error)) from error


async def _store(issuer: Issuer, client: OAuthClientInformationFull) -> None:
    row = client_row(client)
    try:
        await issuer.store.write(_register_client, _insert_client, row, client.client_id)
    except IntegrityError:
        columns = ("client_id", "client_metadata", "client_secret_hash", "last_used_at")
        values = {f"b_{name}": row[name] for name in columns}
        await issuer.store.write(_register_client, _replace_client, values, client.client_id)


def client_row(client: OAuthClientInformationFull) -> dict[str, Any]:
    """Return the row of a registration, with a hash of its secret."""
    return {
        "client_id": client.client_id,
        "client_metadata": _metadata(client),
        "client_secret_hash": hash_secret(client.client_secret) if client.client_secret else None,
        "created_at": int(time.time()),
        "last_used_at": NEVER if client.grant_types in OF_OWNERS else None,
    }


def add_client(session: Session, client: OAuthClientInformationFull) -> None:
    """Store a client that the owner adds."""
    session.execute(_insert_client, client_row(client) | {"last_used_at": NEVER})


async def withdraw(issuer: Issuer, client: OAuthClientInformationFull) -> None:
    """Keep a client for its grants, but without a way to a new one, until its document is good again."""
    metadata = _metadata(_without(client, DEVICE_CODE).model_copy(update={"redirect_uris": None}))
    await issuer.store.write(_withdraw, client.client_id, metadata)


def _register_client(session: Session, statement: Insert | Update, values: dict[str, Any], client_id: str) -> None:
    session.execute(statement, values)
    emit_after_commit(session, "client_registered", client_id=client_id)


def _withdraw(session: Session, client_id: str, metadata: str) -> None:
    replace_metadata(session, client_id, metadata)


def replace_metadata(session: Session, client_id: str, metadata: str) -> None:
    """Replace the stored registration of a client. Its secret stays."""
    session.execute(_replace_metadata, {"b_client_id": client_id, "b_client_metadata": metadata})


def _metadata(client: OAuthClientInformationFull) -> str:
    return client.model_dump_json(exclude={"client_secret"}, exclude_none=True)
