"""Client ID metadata documents: the client_id is the https URL of the client's own description."""

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from fastmcp.server.auth.cimd import CIMDFetcher
from fastmcp.server.auth.ssrf import SSRFError, SSRFFetchError, ssrf_safe_fetch_response
from mcp.shared.auth import OAuthClientInformationFull

from oauth_store.database.models import CLIENT_ID_LENGTH
from oauth_store.flows.documented_clients import DocumentUnavailableError, InvalidDocumentError, read_document

DOCUMENT_BYTES = 5 * 1024
"""The largest document that is read, as the specification recommends."""
FETCH_SECONDS = 10.0
"""How long a request waits for a document."""
CONNECT_SECONDS = 4.0
"""How long to wait for one address of a host before the next is tried."""
FETCHES = 4
"""How many documents a provider fetches at the same time."""
TURN_SECONDS = 10.0
"""How long a request waits for its turn while the maximum number of fetches is in progress."""
WAITING = 50
"""How many requests can wait for their turn."""
BUSY_SECONDS = 5
"""When to try again if the turn did not come."""
FAILURE_SECONDS = 60
"""How long a document that could not be retrieved is not requested again."""
DEFAULT_LIFETIME_SECONDS, LONGEST_LIFETIME_SECONDS = 3600, 24 * 3600
"""How long a document is kept if its host does not say, and at most."""
KEPT_DOCUMENTS, KEPT_FAILURES = 100, 1000

_GONE = re.compile(r"HTTP (404|410) ")
_TOO_LARGE = "Response too large"
_NO_ADDRESS = "DNS resolution"


@dataclass(frozen=True, slots=True)
class _Kept:
    """A document in memory, kept as long as its cache headers say (RFC 9111)."""

    client: OAuthClientInformationFull
    validators: dict[str, str]
    lifetime: float
    fresh_until: float


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A fetch in progress, and the address that requested it."""

    address: str
    client: Future[OAuthClientInformationFull]


class MetadataDocuments:
    """Fetches documents, a few at a time, and keeps them; FastMCP guards each fetch against SSRF.

    Each fetch has its own thread and event loop. Name lookups run in threads of the loop's executor and can hang for a
    minute, and an HTTP client reads the system's certificates: neither happens on the server's loop.
    """

    def __init__(self) -> None:
        self._fetcher = CIMDFetcher()  # it judges a URL as a fetch does
        self._kept: dict[str, _Kept] = {}
        self._failures: dict[str, float] = {}
        """By client_id, or by host if that has no address: the time until which no request is made."""
        self._under_way: dict[str, _Fetch] = {}
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        """Requests that wait for any fetch to end."""

    def names(self, client_id: str) -> bool:
        """Return whether a client_id is a document's URL: https, with a path, without fragment, user or dots.

        Only ASCII, as URLs are (RFC 3986, section 2): the consent page shows its host, and letters of other scripts can
        look like ours.
        """
        if len(client_id) > CLIENT_ID_LENGTH or not re.fullmatch(r"[!-~]+", client_id) or "#" in client_id:
            return False
        if not self._fetcher.is_cimd_client_id(client_id):
            return False
        url = urlsplit(client_id)
        return "@" not in url.netloc and not {".", ".."} & set(url.path.split("/"))

    async def fetch(self, client_id: str, address: str) -> OAuthClientInformationFull:
        """Return the client that a document describes. `address` is the requester's: each gets one fetch at a time.

        Raises `InvalidDocumentError`, or `DocumentUnavailableError` if the document cannot be retrieved right now.
        """
        try:
            source = await asyncio.wait_for(self._client_or_fetch(client_id, address), TURN_SECONDS)
        except TimeoutError:
            raise DocumentUnavailableError("too many documents are being fetched", BUSY_SECONDS) from None
        if not isinstance(source, _Fetch):
            return source.model_copy()
        try:
            client = await asyncio.wait_for(asyncio.wrap_future(source.client), FETCH_SECONDS)
        except TimeoutError:
            raise self._failed(client_id, f"no response after {FETCH_SECONDS:g} s") from None
        return client.model_copy()

    def _check_failures(self, client_id: str) -> None:
        for key in (client_id, urlsplit(client_id).netloc):
            seconds = self._failures.get(key, 0) - time.time()
            if seconds > 0:
                raise DocumentUnavailableError("it could not be retrieved a moment ago", max(1, round(seconds)))

    def _failed(self, key: str, reason: object) -> DocumentUnavailableError:
        _remember(self._failures, key, time.time() + FAILURE_SECONDS, KEPT_FAILURES)
        return DocumentUnavailableError(str(reason), FAILURE_SECONDS)

    async def _client_or_fetch(self, client_id: str, address: str) -> OAuthClientInformationFull | _Fetch:
        """Return the client that is kept, the fetch in progress, or a new fetch as soon as there is room."""
        loop = asyncio.get_running_loop()
        while True:
            waiter = loop, loop.create_future()
            self._waiting.append(waiter)  # before the check: a thread may end during it
            try:
                kept = self._kept.get(client_id)
                if kept is not None and time.time() < kept.fresh_until:
                    return kept.client
                self._check_failures(client_id)
                under_way = dict(self._under_way)
                if client_id in under_way:
                    return under_way[client_id]
                of_address = [fetch for fetch in under_way.values() if fetch.address == address]
                if not of_address and len(under_way) < FETCHES:
                    return self._start(client_id, kept, address)
                if len(self._waiting) > WAITING:
                    raise DocumentUnavailableError("too many documents are being fetched", BUSY_SECONDS)
                await waiter[1]
            finally:
                self._waiting.remove(waiter)

    def _start(self, client_id: str, kept: _Kept | None, address: str) -> _Fetch:
        fetch = _Fetch(address, Future())
        fetch.client.set_running_or_notify_cancel()  # a request that stops waiting must not end it for the others
        self._under_way[client_id] = fetch
        try:
            threading.Thread(target=self._run, args=(client_id, kept, fetch), daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            self._under_way.pop(client_id)
            raise DocumentUnavailableError(str(error), BUSY_SECONDS) from error
        return fetch

    def _run(self, client_id: str, kept: _Kept | None, fetch: _Fetch) -> None:
        """Fetch a document in a thread. The fetch is in progress until its last name lookup has returned."""
        try:
            client = self._client(client_id, kept)
        except BaseException as error:  # raised where the result is awaited
            self._under_way.pop(client_id)
            fetch.client.set_exception(error)
        else:
            self._under_way.pop(client_id)
            fetch.client.set_result(client)
        for loop, end in list(self._waiting):
            with suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(_wake, end)

    def _client(self, client_id: str, kept: _Kept | None) -> OAuthClientInformationFull:
        try:
            with asyncio.Runner() as runner:
                retrieved = runner.run(self._retrieve(client_id, kept))
        except (OSError, RuntimeError) as error:  # no file descriptor is left, or no thread
            raise self._failed(client_id, error) from error
        for key in (client_id, urlsplit(client_id).netloc):
            self._failures.pop(key, None)
        if retrieved.lifetime < 0:
            self._kept.pop(client_id, None)
        else:
            _remember(self._kept, client_id, retrieved, KEPT_DOCUMENTS)
        return retrieved.client

    async def _retrieve(self, client_id: str, kept: _Kept | None) -> _Kept:
        validators = {} if kept is None else kept.validators
        try:
            response = await ssrf_safe_fetch_response(
                client_id,
                require_path=True,
                max_size=DOCUMENT_BYTES,
                timeout=CONNECT_SECONDS,
                overall_timeout=FETCH_SECONDS,
                request_headers=validators,
                allowed_status_codes={200, 304} if validators else {200},
            )
        except SSRFError as error:  # nothing was requested; a name without an address has none for any document
            no_address = str(error).startswith(_NO_ADDRESS)
            raise self._failed(urlsplit(client_id).netloc if no_address else client_id, error) from error
        except SSRFFetchError as error:
            gone = _GONE.match(str(error))
            if gone:
                raise InvalidDocumentError(f"its host has no such document (HTTP {gone[1]})") from error
            if str(error).startswith(_TOO_LARGE):
                raise InvalidDocumentError(f"it is larger than {DOCUMENT_BYTES} bytes") from error
            raise self._failed(client_id, error) from error
        except (ValueError, httpx2.InvalidURL) as error:  # an impossible port or name
            raise InvalidDocumentError("its URL is not valid") from error
        now = time.time()
        lifetime = _lifetime(response.headers, now)
        if kept is not None and response.status_code == 304:
            stated = {"cache-control", "expires"} & {name.lower() for name in response.headers}
            lifetime = lifetime if stated else kept.lifetime
            return _Kept(kept.client, kept.validators | _validators(response.headers), lifetime, now + lifetime)
        client = read_document(client_id, response.content)
        return _Kept(client, _validators(response.headers), lifetime, now + lifetime)


def _lifetime(headers: Mapping[str, str], now: float) -> float:
    """Return for how many seconds a document may be used without a new request (RFC 9111). Below 0, it is not kept."""
    named = {name.lower(): value for name, value in headers.items()}
    directives = [part.strip().lower() for part in named.get("cache-control", "").split(",")]
    if "no-store" in directives:
        return -1
    if "no-cache" in directives:
        return 0
    seconds: float = DEFAULT_LIFETIME_SECONDS
    stated = next((part.removeprefix("max-age=") for part in directives if part.startswith("max-age=")), None)
    try:
        if stated is not None:
            seconds = int(stated.strip('"'))
        elif "expires" in named:
            seconds = parsedate_to_datetime(named["expires"]).timestamp() - now
    except (ValueError, TypeError, OverflowError):  # RFC 9111, section 4.2.1: an invalid lifetime is stale
        return 0
    return min(max(0.0, seconds), LONGEST_LIFETIME_SECONDS)


def _validators(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that ask whether a document has changed (RFC 9110, section 13.1)."""
    named = {name.lower(): value for name, value in headers.items()}
    pairs = (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified"))
    return {condition: named[header] for condition, header in pairs if header in named and named[header].isascii()}


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _remember(entries: dict[str, Any], key: str, value: object, most: int) -> None:
    entries.pop(key, None)
    entries[key] = value
    for oldest in list(entries)[:-most]:
        entries.pop(oldest, None)
