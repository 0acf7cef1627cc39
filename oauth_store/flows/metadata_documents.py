"""Client ID metadata documents: a client whose client_id is the https URL of its own description."""

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

from oauth_store.flows.documented_clients import DocumentUnavailableError, InvalidDocumentError, read_document

DOCUMENT_BYTES = 5 * 1024
"""The size of the largest document that is read, as the specification recommends."""
FETCH_SECONDS = 10.0
"""How long a request waits for a document."""
CONNECT_SECONDS = 4.0
"""How long one address of a host is waited for, before the next one is tried."""
FETCHES = 4
"""How many documents a provider fetches at the same time."""
TURN_SECONDS = 10.0
"""How long a request waits for its turn where as many fetches are under way as there may be."""
WAITING = 50
"""How many requests wait for their turn at most."""
BUSY_SECONDS = 5
"""After which to try again where its turn did not come."""
FAILURE_SECONDS = 60
"""For how long a document that could not be had is not asked for again."""
DEFAULT_LIFETIME_SECONDS, LONGEST_LIFETIME_SECONDS = 3600, 24 * 3600
"""How long a document is kept whose host does not say, and how long at most."""
KEPT_DOCUMENTS, KEPT_FAILURES = 100, 1000

_GONE = re.compile(r"HTTP (404|410) ")
_TOO_LARGE = "Response too large"
_NO_ADDRESS = "DNS resolution"


@dataclass(frozen=True, slots=True)
class _Kept:
    """A document in memory, as long as its cache headers say (RFC 9111)."""

    client: OAuthClientInformationFull
    validators: dict[str, str]
    lifetime: float
    fresh_until: float


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A fetch that is under way, and the address that asked for it."""

    address: str
    client: Future[OAuthClientInformationFull]


class MetadataDocuments:
    """Fetches documents, a few at a time, and keeps them; FastMCP guards each fetch against SSRF.

    Each fetch has a thread and an event loop of its own. Names are looked up in threads of the loop's executor, which
    may hang for a minute, and an HTTP client reads the system's certificates: neither is done on the server's loop.
    """

    def __init__(self) -> None:
        self._fetcher = CIMDFetcher()  # what it says of a URL is what a fetch says of it
        self._kept: dict[str, _Kept] = {}
        self._failures: dict[str, float] = {}
        """By client_id, or by host where that has no address to ask: until when not to ask again."""
        self._under_way: dict[str, _Fetch] = {}
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        """For the end of a fetch, any one."""

    def names(self, client_id: str) -> bool:
        """Tell whether a client_id is the URL of a document: https, with a path, without fragment, user or dots.

        In ASCII, as URLs are (RFC 3986, section 2): the consent page shows its host, and letters of other scripts look
        like ours.
        """
        if not self._fetcher.is_cimd_client_id(client_id) or not re.fullmatch(r"[!-~]+", client_id) or "#" in client_id:
            return False
        url = urlsplit(client_id)
        return "@" not in url.netloc and not {".", ".."} & set(url.path.split("/"))

    async def fetch(self, client_id: str, address: str) -> OAuthClientInformationFull:
        """Return the client that a document describes. `address` is who asks for it: one fetch each at a time.

        Raises `InvalidDocumentError`, or `DocumentUnavailableError` where the document cannot be had now.
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
            raise self._failed(client_id, f"no answer after {FETCH_SECONDS:g} s") from None
        return client.model_copy()

    def _check_failures(self, client_id: str) -> None:
        for key in (client_id, urlsplit(client_id).netloc):
            seconds = self._failures.get(key, 0) - time.time()
            if seconds > 0:
                raise DocumentUnavailableError("it could not be had a moment ago", max(1, round(seconds)))

    def _failed(self, key: str, reason: object) -> DocumentUnavailableError:
        _remember(self._failures, key, time.time() + FAILURE_SECONDS, KEPT_FAILURES)
        return DocumentUnavailableError(str(reason), FAILURE_SECONDS)

    async def _client_or_fetch(self, client_id: str, address: str) -> OAuthClientInformationFull | _Fetch:
        """Return a client that is kept; or the fetch that is under way, or one that is started when there is room."""
        loop = asyncio.get_running_loop()
        while True:
            waiter = loop, loop.create_future()
            self._waiting.append(waiter)  # before the look: threads end while it is taken
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
        fetch.client.set_running_or_notify_cancel()  # a request that waits no longer must not end it for the others
        self._under_way[client_id] = fetch
        try:
            threading.Thread(target=self._run, args=(client_id, kept, fetch), daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            self._under_way.pop(client_id)
            raise DocumentUnavailableError(str(error), BUSY_SECONDS) from error
        return fetch

    def _run(self, client_id: str, kept: _Kept | None, fetch: _Fetch) -> None:
        """Fetch a document in a thread. The fetch is under way until its last name lookup has come back."""
        try:
            client = self._client(client_id, kept)
        except BaseException as error:  # it is raised where it is waited for
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
        except SSRFError as error:  # nothing was asked; a name without an address has none for any document
            no_address = str(error).startswith(_NO_ADDRESS)
            raise self._failed(urlsplit(client_id).netloc if no_address else client_id, error) from error
        except SSRFFetchError as error:
            gone = _GONE.match(str(error))
            if gone:
                raise InvalidDocumentError(f"its host says that there is none (HTTP {gone[1]})") from error
            if str(error).startswith(_TOO_LARGE):
                raise InvalidDocumentError(f"it is larger than {DOCUMENT_BYTES} bytes") from error
            raise self._failed(client_id, error) from error
        except (ValueError, httpx2.InvalidURL) as error:  # a port or a name that cannot be
            raise InvalidDocumentError("its URL cannot be read") from error
        now = time.time()
        lifetime = _lifetime(response.headers, now)
        if kept is not None and response.status_code == 304:
            stated = {"cache-control", "expires"} & {name.lower() for name in response.headers}
            lifetime = lifetime if stated else kept.lifetime
            return _Kept(kept.client, kept.validators | _validators(response.headers), lifetime, now + lifetime)
        client = read_document(client_id, response.content)
        return _Kept(client, _validators(response.headers), lifetime, now + lifetime)


def _lifetime(headers: Mapping[str, str], now: float) -> float:
    """Return for how many seconds a document may be used without asking again (RFC 9111); below 0, it is not kept."""
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
    except (ValueError, TypeError, OverflowError):  # RFC 9111, section 4.2.1: what cannot be read is stale
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
