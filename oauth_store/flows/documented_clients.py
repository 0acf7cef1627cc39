"""Clients described by a metadata document: the fields that are used, and the reasons to refuse one."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import AnyUrl, ValidationError

from oauth_store.flows import clients
from oauth_store.flows.client_keys import NoKeysError, check_keys_url, read_keys
from oauth_store.flows.clients import PRIVATE_KEY_JWT, StoredClient, check_scopes
from oauth_store.flows.connected import AUTHORIZATION_CODE, DEVICE_CODE, JWT_BEARER_GRANT
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.metadata_documents import (
    LONGEST_LIFETIME_SECONDS,
    DocumentUnavailableError,
    InvalidDocumentError,
    MetadataDocuments,
)
from oauth_store.flows.redirect_uris import check_redirect_uris
from oauth_store.flows.registration import is_valid_scope, withdraw

_FIELDS = (
    "client_name",
    "client_uri",
    "logo_uri",
    "contacts",
    "tos_uri",
    "policy_uri",
    "software_id",
    "software_version",
    "scope",
    "grant_types",
    "response_types",
)
"""The fields taken from a document, besides its redirect URIs, and the keys of a client that needs them."""

DOCUMENT_BYTES = 5 * 1024
"""The largest document that is read, as the specification recommends."""
RENEWAL_SECONDS = 30
"""How old keys have to be for a signature that they do not match to make this server fetch them again."""

logger = logging.getLogger("oauth_store")

Documents = MetadataDocuments[OAuthClientInformationFull]


def client_documents() -> Documents:
    """Return a source of metadata documents, which has fetched none yet."""
    return MetadataDocuments(read_document, DOCUMENT_BYTES)


def read_document(client_id: str, content: bytes) -> OAuthClientInformationFull:
    """Return the client that the document at `client_id` describes, without its unsafe redirect URIs.

    A client that can do without authentication is public, whatever method it prefers. Any other needs public keys (RFC
    7523, section 2.2). Empty fields count as absent. Raises `InvalidDocumentError`.
    """
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # fails for half a character, which JSON can hold but no row
    except (ValueError, RecursionError) as error:
        raise InvalidDocumentError("it is not JSON") from error
    if not isinstance(document, dict):
        raise InvalidDocumentError("it is not a JSON object")
    if document.get("client_id") != client_id:
        raise InvalidDocumentError("its client_id is not its own URL")
    method = next((method for method in ("none", PRIVATE_KEY_JWT) if method in _methods(document)), None)
    if method is None:
        raise InvalidDocumentError(
            "it offers neither of the supported values of token_endpoint_auth_method: none and private_key_jwt"
        )
    metadata = {name: document[name] for name in _FIELDS if document.get(name) not in (None, "", [], {})}
    defaults = {
        "client_id": client_id,
        "token_endpoint_auth_method": method,
        "grant_types": ["authorization_code"],  # RFC 7591, section 2
        "redirect_uris": _redirect_uris(document.get("redirect_uris")),
        **({} if method == "none" else _keys(document)),
    }
    try:
        client = OAuthClientInformationFull.model_validate(defaults | metadata)
        check_redirect_uris(client.redirect_uris)
        check_scopes(client)
    except ValidationError as error:
        raise InvalidDocumentError(f"its {error.errors()[0]['loc'][0]} is not valid") from error
    except RegistrationError as error:
        raise InvalidDocumentError(str(error.error_description)) from error
    client.grant_types = [grant for grant in client.grant_types if grant != JWT_BEARER_GRANT]  # the owner's to give
    if not {AUTHORIZATION_CODE, DEVICE_CODE} & {*client.grant_types}:
        raise InvalidDocumentError("its grant_types lack authorization_code")
    return client


def _methods(document: Mapping[str, Any]) -> list[Any]:
    """Return how a client may authenticate: the methods that it lists, and the one that it prefers."""
    preferred = document.get("token_endpoint_auth_method") or None
    listed = document.get("token_endpoint_auth_methods_supported")
    methods = [*(listed if isinstance(listed, list) else []), *([] if preferred is None else [preferred])]
    return methods or ["none"]


def _keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the client's keys are, or the keys. Raises `InvalidDocumentError` without any."""
    address = document.get("jwks_uri")
    if address in (None, ""):
        return {"jwks": read_keys(document.get("jwks"))}
    if not isinstance(address, str):
        raise InvalidDocumentError("its jwks_uri is not a URL")
    check_keys_url(address)
    return {"jwks_uri": address}


def _redirect_uris(given: object) -> list[str]:
    """Return the redirect URIs to which a code may be sent, each once. Raises `InvalidDocumentError` without any."""
    if not isinstance(given, list) or not given:
        raise InvalidDocumentError("it has no redirect_uris")
    good: dict[str, None] = {}
    reason = ""
    for entry in given:
        try:
            uri = _any_port(entry)
            check_redirect_uris([AnyUrl(uri)])
            good[uri] = None
        except RegistrationError as error:
            reason = f": {error.error_description}"
        except (ValueError, TypeError, AttributeError):  # not text, or not a URL
            reason = ": a redirect URI is not a URL"
    if not good:
        raise InvalidDocumentError(f"none of its redirect_uris can be used{reason}")
    return list(good)


def _any_port(uri: str) -> str:
    """Return a redirect URI without the port `*`. On loopback, no port means any port (RFC 8252, section 7.3)."""
    parts = urlsplit(uri)
    if parts.scheme == "http" and parts.netloc.endswith(":*") and is_loopback_host(parts.hostname):
        return parts._replace(netloc=parts.netloc.removesuffix(":*")).geturl()
    return uri


async def find(
    issuer: Issuer,
    provider: OAuthProvider,
    documents: Documents,
    client_id: str,
    address: str,
    count_new: Callable[[], None],
) -> OAuthClientInformationFull | None:
    """Return the client of an authorization request whose client_id is the URL of its metadata document.

    The client is read from the document, and stored: /token and /revoke read the database, and a refresh works while
    the document's host is down. They make this server fetch only the keys of a stored client that authenticates by
    them. `address` is the requester's; `count_new` is called for a new client, and raises if there are too many.

    Raises `InvalidDocumentError`, or `DocumentUnavailableError` if there is no stored client to fall back on.
    """
    stored = await provider.get_client(client_id)
    if await added_by_owner(issuer, stored):
        return stored
    try:
        described = await _described(issuer, documents, client_id, address, stored)
    except DocumentUnavailableError as error:
        logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
        if stored is None or not stored.redirect_uris:
            raise
        return stored
    if stored is None:
        count_new()
    return await _kept(issuer, provider, described)


async def renew(
    issuer: Issuer,
    provider: OAuthProvider,
    documents: Documents,
    stored: OAuthClientInformationFull,
    address: str,
    oldest_seconds: float,
) -> OAuthClientInformationFull | None:
    """Return a stored client as its document describes it now, or did at most `oldest_seconds` ago.

    Raises `InvalidDocumentError` or `DocumentUnavailableError`.
    """
    described = await _described(issuer, documents, str(stored.client_id), address, stored, oldest_seconds)
    return await _kept(issuer, provider, described)


async def added_by_owner(issuer: Issuer, client: OAuthClientInformationFull | None) -> bool:
    """Return whether the owner added a client: no document changes it, and none is fetched for it."""
    if client is not None and not isinstance(client, StoredClient):
        client = await clients.find(issuer, str(client.client_id))  # an application's own method knows no more
    return client is not None and client.is_limited


async def _described(
    issuer: Issuer,
    documents: Documents,
    client_id: str,
    address: str,
    stored: OAuthClientInformationFull | None,
    oldest_seconds: float = LONGEST_LIFETIME_SECONDS,
) -> OAuthClientInformationFull:
    """Return the client that a document describes, with the scopes of it that this server has."""
    try:
        described = (await documents.fetch(client_id, address, oldest_seconds)).model_copy()
    except InvalidDocumentError as error:
        logger.warning("client metadata document %s cannot be used: %s", client_id, error)
        if stored is not None:
            await _withdraw(issuer, stored, error)
        raise
    if described.scope is not None:  # the document is for other servers too
        described.scope = " ".join(scope for scope in described.scope.split() if is_valid_scope(issuer, scope)) or None
    return described


async def _withdraw(issuer: Issuer, stored: OAuthClientInformationFull, error: InvalidDocumentError) -> None:
    """Withdraw a stored client: otherwise an outage of its host would bring back what the document removed."""
    has_keys = stored.jwks is not None or stored.jwks_uri is not None
    if isinstance(error, NoKeysError) and has_keys:
        await withdraw(issuer, stored.model_copy(update={"jwks": None, "jwks_uri": None}))
    elif stored.redirect_uris:
        await withdraw(issuer, stored)


async def _kept(
    issuer: Issuer, provider: OAuthProvider, described: OAuthClientInformationFull
) -> OAuthClientInformationFull | None:
    """Store a client unless its row is the same, or its owner's, and return it."""
    stored = await clients.find(issuer, str(described.client_id))
    if stored is None or not (stored.is_limited or stored.model_dump() == described.model_dump()):
        await provider.register_client(described)
    return await provider.get_client(str(described.client_id))
