"""Clients described by a metadata document: the fields that are used, and the reasons to refuse one."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import ValidationError

from oauth_store.flows.clients import check_redirect_uris
from oauth_store.flows.issuer import Issuer
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
"""The fields taken from a document, besides its redirect URIs. Keys and secrets are not: the client is public."""


logger = logging.getLogger("oauth_store")


class Documents(Protocol):
    """The source of documents: `MetadataDocuments`."""

    async def fetch(self, client_id: str, address: str) -> OAuthClientInformationFull: ...


class DocumentError(Exception):
    """A client_id is the URL of a document, and no client can be made from it."""


class InvalidDocumentError(DocumentError):
    """A document was retrieved, but describes no acceptable client. The message says what is wrong with it."""


class DocumentUnavailableError(DocumentError):
    """A document cannot be retrieved right now, so nothing is known about the client."""

    def __init__(self, reason: str, retry_after: int) -> None:
        """`retry_after` is in seconds."""
        super().__init__(reason)
        self.retry_after = retry_after


def read_document(client_id: str, content: bytes) -> OAuthClientInformationFull:
    """Return the client that the document at `client_id` describes, without its unsafe redirect URIs.

    A client that can do without authentication is public, whatever method it prefers. Empty fields count as absent.
    Raises `InvalidDocumentError`.
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
    if "none" not in _methods(document):
        raise InvalidDocumentError(
            "it does not offer token_endpoint_auth_method none, the only one that is supported for documents"
        )
    metadata = {name: document[name] for name in _FIELDS if document.get(name) not in (None, "", [], {})}
    defaults = {
        "client_id": client_id,
        "token_endpoint_auth_method": "none",
        "grant_types": ["authorization_code"],  # RFC 7591, section 2
        "redirect_uris": _redirect_uris(document.get("redirect_uris")),
    }
    try:
        client = OAuthClientInformationFull.model_validate(defaults | metadata)
        check_redirect_uris(client)
    except ValidationError as error:
        raise InvalidDocumentError(f"its {error.errors()[0]['loc'][0]} is not valid") from error
    except RegistrationError as error:
        raise InvalidDocumentError(str(error.error_description)) from error
    return client


def _methods(document: Mapping[str, Any]) -> list[Any]:
    """Return how a client may authenticate: the methods that it lists, and the one that it prefers."""
    preferred = document.get("token_endpoint_auth_method") or None
    listed = document.get("token_endpoint_auth_methods_supported")
    methods = [*(listed if isinstance(listed, list) else []), *([] if preferred is None else [preferred])]
    return methods or ["none"]


def _redirect_uris(given: object) -> list[str]:
    """Return the redirect URIs to which a code may be sent, each once. Raises `InvalidDocumentError` without any."""
    if not isinstance(given, list) or not given:
        raise InvalidDocumentError("it has no redirect_uris")
    good: dict[str, None] = {}
    reason = ""
    for entry in given:
        try:
            uri = _any_port(entry)
            check_redirect_uris(OAuthClientInformationFull.model_validate({"client_id": "-", "redirect_uris": [uri]}))
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

    The client is read from the document, and stored: /token and /revoke read only the database, so that they cannot be
    used to make this server fetch URLs, and a refresh works while the document's host is down. `address` is the
    requester's; `count_new` is called for a new client, and raises if there are too many.

    Raises `InvalidDocumentError`, or `DocumentUnavailableError` if there is no stored client to fall back on.
    """
    stored = await provider.get_client(client_id)
    try:
        described = await documents.fetch(client_id, address)
    except InvalidDocumentError as error:
        logger.warning("client metadata document %s cannot be used: %s", client_id, error)
        if stored is not None and stored.redirect_uris:
            await withdraw(issuer, stored)  # otherwise an outage of its host would bring back what the document removed
        raise
    except DocumentUnavailableError as error:
        logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
        if stored is None or not stored.redirect_uris:
            raise
        return stored
    if described.scope is not None:  # the document is for other servers too
        described.scope = " ".join(scope for scope in described.scope.split() if is_valid_scope(issuer, scope)) or None
    if stored is None:
        count_new()
    if stored is None or stored.model_dump() != described.model_dump():
        await provider.register_client(described)
    return await provider.get_client(client_id)
