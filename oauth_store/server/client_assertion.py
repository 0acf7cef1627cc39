"""private_key_jwt at /token and /revoke: a client authenticates with an assertion (RFC 7523, section 2.2)."""

import logging
import time
from typing import cast

from mcp.server.auth.middleware.client_auth import AuthenticationError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.flows import documented_clients
from oauth_store.flows.assertions import (
    JWT_BEARER,
    Secret,
    VerifiedAssertion,
    claimed_client,
    read_assertion,
)
from oauth_store.flows.client_keys import KeySet, has_signed, key_sets, read_keys
from oauth_store.flows.clients import PRIVATE_KEY_JWT, StoredClient, is_client_id
from oauth_store.flows.documented_clients import RENEWAL_SECONDS
from oauth_store.flows.metadata_documents import (
    LONGEST_LIFETIME_SECONDS,
    DocumentUnavailableError,
    InvalidDocumentError,
    is_document_url,
)
from oauth_store.server.answers import error_answer
from oauth_store.server.authorize import Server
from oauth_store.server.client_auth import credentials

logger = logging.getLogger("oauth_store")

RENEWALS = 1000
"""Clients whose latest renewal is remembered."""


class ClientAuthentication:
    """Reads what a client presents, and verifies its assertion if it needs one.

    A key set is fetched only for an assertion that claims to be of a stored client which authenticates by it.
    """

    def __init__(self, server: Server) -> None:
        issuer = server.issuer.url.rstrip("/")
        self._server = server
        self._audiences = [f"{str(server.provider.base_url).rstrip('/')}/token", issuer, f"{issuer}/"]
        self._key_sets = key_sets()
        self._renewals: dict[str, float] = {}
        """When the documents of clients were last fetched for a signature that did not match."""

    async def credentials(self, request: Request) -> tuple[str, Secret]:
        """Return the client_id of a request, and its secret or its verified assertion.

        A public client's assertion is ignored, as a secret would be. Raises `AuthenticationError`, or
        `DocumentUnavailableError` if the client's keys cannot be fetched right now.
        """
        client_id, secret, text = await self._presented(request)
        if text is None:
            return client_id, secret
        form = await request.form()
        client = await self._server.provider.get_client(client_id) if is_client_id(client_id) else None
        if not isinstance(client, StoredClient) or client.is_public:
            return client_id, secret
        if secret:
            raise AuthenticationError("the request uses two authentication methods at once")
        if client.secret_hash is not None or client.token_endpoint_auth_method != PRIVATE_KEY_JWT:
            raise AuthenticationError("the client did not register for private_key_jwt")
        if form.getlist("client_assertion") != [text] or form.get("client_assertion_type") != JWT_BEARER:
            raise AuthenticationError(f"client_assertion_type is not {JWT_BEARER}, or a parameter is repeated")
        return client_id, await self._verified(client, text, self._server.floods.address(request))

    async def client_id(self, request: Request) -> str:
        """Return the client that a request names, before it has authenticated. Raises `AuthenticationError`."""
        return (await self._presented(request))[0]

    async def _presented(self, request: Request) -> tuple[str, str | None, str | None]:
        """Return the client_id, the secret and the assertion of a request."""
        form = await request.form()
        text = form.get("client_assertion")
        if not isinstance(text, str) or not text:
            return *await credentials(request), None
        has_name = form.get("client_id") or "authorization" in request.headers
        return *await credentials(request, None if has_name else claimed_client(text)), text

    async def _verified(self, client: StoredClient, text: str, address: str) -> VerifiedAssertion:
        assertion = read_assertion(text, str(client.client_id), self._audiences, time.time())
        unavailable: DocumentUnavailableError | None = None
        tried: list[KeySet | None] = [None]
        for source in (self._known_keys, self._newer_keys, self._moved_keys):
            try:
                keys = await source(client, address)
            except DocumentUnavailableError as error:
                unavailable = error
                continue
            if keys not in tried and await has_signed(cast(KeySet, keys), assertion, self._audiences):
                return VerifiedAssertion(assertion.client_id, assertion.jti, assertion.expires_at)
            tried.append(keys)
        if unavailable is not None:
            logger.warning("keys of the client %s cannot be retrieved: %s", client.client_id, unavailable)
            raise unavailable
        raise AuthenticationError("client_assertion is not valid, or not signed with a key of the client")

    async def _known_keys(self, client: StoredClient, address: str) -> KeySet | None:
        """Return the keys of a client: those in its registration, or those at its jwks_uri. None if it has none."""
        if client.jwks_uri is not None:
            return await self._key_set(client, address, LONGEST_LIFETIME_SECONDS)
        try:
            return read_keys(client.jwks)
        except InvalidDocumentError:  # of the owner's own code, which is not checked
            return None

    async def _newer_keys(self, client: StoredClient, address: str) -> KeySet | None:
        """Return the keys at the jwks_uri of a client, as they were at most `RENEWAL_SECONDS` ago."""
        return None if client.jwks_uri is None else await self._key_set(client, address, RENEWAL_SECONDS)

    async def _moved_keys(self, client: StoredClient, address: str) -> KeySet | None:
        """Return the keys of a client as its document has them now, or has named them within `RENEWAL_SECONDS`."""
        client_id, documents, provider = str(client.client_id), self._server.documents, self._server.provider
        if documents is None or not is_document_url(client_id):
            return None
        if 0 <= time.time() - self._renewals.get(client_id, 0) < RENEWAL_SECONDS:
            renewed = await provider.get_client(client_id)  # another request may have changed it
        else:
            try:
                renewed = await documented_clients.renew(self._server.issuer, provider, documents, client, address)
            except InvalidDocumentError:
                return None
            finally:
                self._remember(client_id)
        if not isinstance(renewed, StoredClient) or renewed.token_endpoint_auth_method != PRIVATE_KEY_JWT:
            return None
        return await self._known_keys(renewed, address)

    async def _key_set(self, client: StoredClient, address: str, oldest_seconds: float) -> KeySet:
        url = str(client.jwks_uri)
        if self._server.documents is None or not is_document_url(url):
            raise self._key_sets.failed(url, "this server fetches no keys")
        try:
            return await self._key_sets.fetch(url, address, oldest_seconds)
        except InvalidDocumentError as error:
            raise self._key_sets.failed(url, error) from error

    def _remember(self, client_id: str) -> None:
        while len(self._renewals) >= RENEWALS:
            del self._renewals[next(iter(self._renewals))]
        self._renewals[client_id] = time.time()


def keys_unavailable(error: DocumentUnavailableError) -> Response:
    """Return the response to a client whose keys cannot be fetched: it should retry, and keep its registration."""
    headers = {"Retry-After": str(error.retry_after)}
    return error_answer(503, "temporarily_unavailable", "the client's keys could not be fetched", headers)
