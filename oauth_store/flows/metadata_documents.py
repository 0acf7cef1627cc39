"""Fetch what clients publish: the metadata document at the URL that is their client_id, and their sets of keys."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx2
from fastmcp.server.auth.cimd import CIMDFetcher
from fastmcp.server.auth.ssrf import SSRFError, SSRFFetchError, ssrf_safe_fetch_response

from oauth_store.database.models import CLIENT_ID_LENGTH

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
VALIDATOR_LENGTH = 1000
"""The longest header that is kept to ask whether a document has changed."""

_GONE = re.compile(r"HTTP (404|410) ")
_TOO_LARGE = "Response too large"
_NO_ADDRESS = "DNS resolution"


T = TypeVar("T")

_fetcher = CIMDFetcher()  # it judges a URL as a fetch does


class DocumentError(Exception):
    """Nothing can be made of the document at a URL."""


class InvalidDocumentError(DocumentError):
    """A document was retrieved, but is not acceptable. The message says what is wrong with it."""


class DocumentUnavailableError(DocumentError):
    """A document cannot be retrieved right now, so nothing is known about it."""

    def __init__(self, reason: str, retry_after: int) -> None:
        """`retry_after` is in seconds."""
        super().__init__(reason)
        self.retry_after = retry_after


def is_document_url(url: str) -> bool:
    """Return whether a document can be at a URL: https, with a path, without fragment, user or dots.

    Only ASCII, as URLs are (RFC 3986, section 2): the consent page shows its host, and letters of other scripts can
    look like ours.
    """
    if len(url) > CLIENT_ID_LENGTH or not re.fullmatch(r"[!-~]+", url) or "#" in url:
        return False
    if not _fetcher.is_cimd_client_id(url):
        return False
    parts = urlsplit(url)
    return "@" not in parts.netloc and not {".", ".."} & set(parts.path.split("/"))


@dataclass(frozen=True, slots=True)
class _Kept(Generic[T]):
    """What was read from a document, kept as long as its cache headers say (RFC 9111)."""

    content: T
    validators: dict[str, str]
    lifetime: float
    fetched_at: float

    def is_fresh(self, oldest_seconds: float) -> bool:
        return time.time() < self.fetched_at + min(self.lifetime, oldest_seconds)


@dataclass(frozen=True, slots=True)
class _Fetch(Generic[T]):
    """A fetch in progress, and the address that requested it."""

    address: str
    content: Future[T]


class MetadataDocuments(Generic[T]):
    """Fetches documents of one kind, a few at a time, and keeps them; FastMCP guards each fetch against SSRF.

    Each fetch has its own thread and event loop. Name lookups run in threads of the loop's executor and can hang for a
    minute, and an HTTP client reads the system's certificates: neither happens on the server's loop.
    """

    def __init__(
        self,
        read: Callable[[str, bytes], T],
        most_bytes: int,
        least_seconds: float = -1,
        most_kept: int = KEPT_DOCUMENTS,
    ) -> None:
        """`read` makes something of a URL and its content, or raises `InvalidDocumentError`.

        `least_seconds` is how long it is kept whatever its host says; -1 keeps it as its host says.
        """
        self._read, self._most_bytes = read, most_bytes
        self._least_seconds, self._most_kept = least_seconds, most_kept
        self._kept: dict[str, _Kept[T]] = {}
        self._failures: dict[str, float] = {}
        """By URL, or by host if that has no address: the time until which no request is made."""
        self._under_way: dict[str, _Fetch[T]] = {}
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        """Requests that wait for any fetch to end."""

    async def fetch(self, url: str, address: str, oldest_seconds: float = LONGEST_LIFETIME_SECONDS) -> T:
        """Return what a document describes. `address` is the requester's: each gets one fetch at a time.

        One that was fetched `oldest_seconds` ago is fetched again. Raises `InvalidDocumentError`, or
        `DocumentUnavailableError` if the document cannot be retrieved right now.
        """
        try:
            source = await asyncio.wait_for(self._kept_or_fetch(url, address, oldest_seconds), TURN_SECONDS)
        except TimeoutError:
            raise DocumentUnavailableError("too many documents are being fetched", BUSY_SECONDS) from None
        if isinstance(source, _Kept):
            return source.content
        try:
            return await asyncio.wait_for(asyncio.wrap_future(source.content), FETCH_SECONDS)
        except TimeoutError:
            raise self.failed(url, f"no response after {FETCH_SECONDS:g} s") from None

    def fetched_at(self, url: str) -> float:
        """Return when the document that is kept was fetched, or 0."""
        kept = self._kept.get(url)
        return 0 if kept is None else kept.fetched_at

    def _check_failures(self, url: str) -> None:
        for key in (url, urlsplit(url).netloc):
            seconds = self._failures.get(key, 0) - time.time()
            if seconds > 0:
                raise DocumentUnavailableError("it could not be retrieved a moment ago", max(1, round(seconds)))

    def failed(self, key: str, reason: object) -> DocumentUnavailableError:
        """Return the error for a URL or a host that is not requested again for `FAILURE_SECONDS`."""
        remember(self._failures, key, time.time() + FAILURE_SECONDS, KEPT_FAILURES)
        return DocumentUnavailableError(str(reason), FAILURE_SECONDS)

    async def _kept_or_fetch(self, url: str, address: str, oldest_seconds: float) -> _Kept[T] | _Fetch[T]:
        """Return what is kept, the fetch in progress, or a new fetch as soon as there is room."""
        loop = asyncio.get_running_loop()
        while True:
            waiter = loop, loop.create_future()
            self._waiting.append(waiter)  # before the check: a thread may end during it
            try:
                kept = self._kept.get(url)
                if kept is not None and kept.is_fresh(oldest_seconds):
                    return kept
                self._check_failures(url)
                under_way = dict(self._under_way)
                if url in under_way:
                    return under_way[url]
                of_address = [fetch for fetch in under_way.values() if fetch.address == address]
                if not of_address and len(under_way) < FETCHES:
                    return self._start(url, kept, address)
                if len(self._waiting) > WAITING:
                    raise DocumentUnavailableError("too many documents are being fetched", BUSY_SECONDS)
                await waiter[1]
            finally:
                self._waiting.remove(waiter)

    def _start(self, url: str, kept: _Kept[T] | None, address: str) -> _Fetch[T]:
        fetch: _Fetch[T] = _Fetch(address, Future())
        fetch.content.set_running_or_notify_cancel()  # a request that stops waiting must not end it for the others
        self._under_way[url] = fetch
        try:
            threading.Thread(target=self._run, args=(url, kept, fetch), daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            self._under_way.pop(url)
            raise DocumentUnavailableError(str(error), BUSY_SECONDS) from error
        return fetch

    def _run(self, url: str, kept: _Kept[T] | None, fetch: _Fetch[T]) -> None:
        """Fetch a document in a thread. The fetch is in progress until its last name lookup has returned."""
        try:
            content = self._content(url, kept)
        except BaseException as error:  # raised where the result is awaited
            self._under_way.pop(url)
            fetch.content.set_exception(error)
        else:
            self._under_way.pop(url)
            fetch.content.set_result(content)
        for loop, end in list(self._waiting):
            with suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(_wake, end)

    def _content(self, url: str, kept: _Kept[T] | None) -> T:
        try:
            with asyncio.Runner() as runner:
                retrieved = runner.run(self._retrieve(url, kept))
        except (OSError, RuntimeError) as error:  # no file descriptor is left, or no thread
            raise self.failed(url, error) from error
        except InvalidDocumentError:
            self._kept.pop(url, None)  # what its host has withdrawn must not come back
            raise
        for key in (url, urlsplit(url).netloc):
            self._failures.pop(key, None)
        if retrieved.lifetime < 0:
            self._kept.pop(url, None)
        else:
            remember(self._kept, url, retrieved, self._most_kept)
        return retrieved.content

    async def _retrieve(self, url: str, kept: _Kept[T] | None) -> _Kept[T]:
        validators = {} if kept is None else kept.validators
        try:
            response = await ssrf_safe_fetch_response(
                url,
                require_path=True,
                max_size=self._most_bytes,
                timeout=CONNECT_SECONDS,
                overall_timeout=FETCH_SECONDS,
                request_headers=validators,
                allowed_status_codes={200, 304} if validators else {200},
            )
        except SSRFError as error:  # nothing was requested; a name without an address has none for any document
            no_address = str(error).startswith(_NO_ADDRESS)
            raise self.failed(urlsplit(url).netloc if no_address else url, error) from error
        except SSRFFetchError as error:
            gone = _GONE.match(str(error))
            if gone:
                raise InvalidDocumentError(f"its host has no such document (HTTP {gone[1]})") from error
            if str(error).startswith(_TOO_LARGE):
                raise InvalidDocumentError(f"it is larger than {self._most_bytes} bytes") from error
            raise self.failed(url, error) from error
        except (ValueError, httpx2.InvalidURL) as error:  # an impossible port or name
            raise InvalidDocumentError("its URL is not valid") from error
        now = time.time()
        lifetime = max(_lifetime(response.headers, now), self._least_seconds)
        if kept is not None and response.status_code == 304:
            stated = {"cache-control", "expires"} & {name.lower() for name in response.headers}
            lifetime = lifetime if stated else kept.lifetime
            return _Kept(kept.content, kept.validators | _validators(response.headers), lifetime, now)
        return _Kept(self._read(url, response.content), _validators(response.headers), lifetime, now)


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
    values = {condition: named[header] for condition, header in pairs if header in named}
    return {name: value for name, value in values.items() if value.isascii() and len(value) <= VALIDATOR_LENGTH}


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def remember(entries: dict[str, Any], key: str, value: object, most: int) -> None:
    """Keep a value as the latest of at most so many entries."""
    entries.pop(key, None)
    entries[key] = value
    for oldest in list(entries)[:-most]:
        entries.pop(oldest, None)
