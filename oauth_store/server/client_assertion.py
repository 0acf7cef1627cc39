"""private_key_jwt at /token and /revoke: a client authenticates with an assertion (RFC 7523, section 2.2)."""

import asyncio
import logging
import time
from contextlib import suppress
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
from oauth_store.flows.client_keys import KeySet, check_keys_url, has_signed, key_sets, read_keys
from oauth_store.flows.clients import PRIVATE_KEY_JWT, StoredClient, as_stored, is_client_id
from oauth_store.flows.documented_clients import RENEWAL_SECONDS, Documents
from oauth_store.flows.metadata_documents import (
    LONGEST_LIFETIME_SECONDS,
    DocumentUnavailableError,
    InvalidDocumentError,
    is_document_url,
    remember,
)
from oauth_store.server.answers import error_answer
from oauth_store.server.authorize import Server
from oauth_store.server.client_auth import credentials

logger = logging.getLogger("oauth_store")

RENEWALS = 1000
"""Clients whose latest renewal is remembered."""
DAILY_SECONDS = 24 * 3600
"""How old a document may be whose keys count."""
RETRY_SECONDS = 600
"""When to try to read such a document again that could not be had: until then, the stored keys count."""


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
        """When the documents of clients were last read for an assertion."""
        self._under_way: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[StoredClient | None]] = {}
        """Such readings in progress: one for each client."""

    async def credentials(self, request: Request) -> tuple[str, Secret]:
        """Return the client_id of a request, and its secret or its verified assertion.

        A public client's assertion is ignored, as a secret would be. Raises `AuthenticationError`, or
        `DocumentUnavailableError` if the client's keys cannot be fetched right now.
        """
        client_id, secret, text = await self._presented(request)
        if text is None:
            return client_id, secret
        form = await request.form()
        client = await self._client(client_id) if is_client_id(client_id) else None
        if client is None or client.is_public:
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

    async def _client(self, client_id: str) -> StoredClient | None:
        client = await self._server.provider.get_client(client_id)
        return None if client is None else as_stored(client, self._server.issuer.scopes)

    async def _verified(self, client: StoredClient, text: str, address: str) -> VerifiedAssertion | None:
        """Return the assertion of a client, or None if its document now lets it do without one."""
        assertion = read_assertion(text, str(client.client_id), self._audiences, time.time())
        verified = VerifiedAssertion(assertion.client_id, assertion.jti, assertion.expires_at)
        unavailable: DocumentUnavailableError | None = None
        tried: list[KeySet | None] = [None]
        for source in (self._known_keys, self._newer_keys, self._moved_keys):
            try:
                keys = await source(client, address)
                if keys not in tried and await has_signed(cast(KeySet, keys), assertion, self._audiences):
                    current = await self._current(client, address)
                    if current is None or current.is_public:
                        return None
                    is_same, client = current is client, current
                    newest = keys if is_same else await self._known_keys(client, address)
                    if newest == keys or (newest and await has_signed(newest, assertion, self._audiences)):
                        return verified
                    break
            except DocumentUnavailableError as error:
                unavailable = error
                continue
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
        if await self._is_described(client):
            renewed = await self._renewed(client, address, RENEWAL_SECONDS)
            if renewed is not None and renewed.token_endpoint_auth_method == PRIVATE_KEY_JWT:
                return await self._known_keys(renewed, address)
        return None

    async def _current(self, client: StoredClient, address: str) -> StoredClient | None:
        """Return a client as its document described it a day ago at most, or as it is stored if that cannot be had."""
        client_id, documents = str(client.client_id), self._server.documents
        if documents is None or not await self._is_described(client):
            return client
        read_at = max(self._renewals.get(client_id, 0), documents.fetched_at(client_id))
        if 0 <= time.time() - read_at < DAILY_SECONDS:
            return client
        try:
            return await self._renewed(client, address, DAILY_SECONDS)
        except DocumentUnavailableError as error:
            logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
            remember(self._renewals, client_id, time.time() - DAILY_SECONDS + RETRY_SECONDS, RENEWALS)
            return client

    async def _is_described(self, client: StoredClient) -> bool:
        """Return whether a client is as its document describes it, and not as its owner does."""
        if self._server.documents is None or not is_document_url(str(client.client_id)):
            return False
        return not await documented_clients.added_by_owner(self._server.issuer, client)

    async def _renewed(self, client: StoredClient, address: str, oldest_seconds: float) -> StoredClient | None:
        """Return a client as its document described it at most so long ago: requests at the same time share that.

        Raises `DocumentUnavailableError`.
        """
        client_id = str(client.client_id)
        if 0 <= time.time() - self._renewals.get(client_id, 0) < oldest_seconds:
            return await self._client(client_id)  # another request may have changed it
        key = asyncio.get_running_loop(), client_id
        if key not in self._under_way:
            self._under_way[key] = asyncio.create_task(self._renew(client, address, oldest_seconds))
            self._under_way[key].add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(self._under_way[key])  # a request that ends must not end it for the others

    async def _renew(self, client: StoredClient, address: str, oldest_seconds: float) -> StoredClient | None:
        server, client_id = self._server, str(client.client_id)
        with suppress(InvalidDocumentError):  # logged, and the client is withdrawn
            await documented_clients.renew(
                server.issuer, server.provider, cast(Documents, server.documents), client, address, oldest_seconds
            )
        remember(self._renewals, client_id, time.time(), RENEWALS)
        return await self._client(client_id)

    async def _key_set(self, client: StoredClient, address: str, oldest_seconds: float) -> KeySet:
        url = str(client.jwks_uri)
        if self._server.documents is None:
            raise self._key_sets.failed(url, "this server fetches none, because of metadata_documents=False")
        try:
            check_keys_url(url)
            return await self._key_sets.fetch(url, address, oldest_seconds)
        except InvalidDocumentError as error:
            raise self._key_sets.failed(url, error) from error


def keys_unavailable(error: DocumentUnavailableError) -> Response:
    """Return the response to a client whose keys cannot be fetched: it should retry, and keep its registration."""
    headers = {"Retry-After": str(error.retry_after)}
    return error_answer(503, "temporarily_unavailable", "the client's keys could not be fetched", headers)
