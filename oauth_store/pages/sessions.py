"""Who is signed in: on the page of connected apps, for one request, or on a browser that stays signed in."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from oauth_store.approval import Approver
from oauth_store.browser import request_cookie
from oauth_store.credentials import derive, mint
from oauth_store.database.models import BROWSER, SESSION
from oauth_store.flows import sessions
from oauth_store.pages.accounts import ACCOUNT
from oauth_store.pages.passkeys import PASSKEY
from oauth_store.pages.passwords import PASSWORD
from oauth_store.pages.ways import SignedIn, Way

SESSION_COOKIE = "oauth_store_session"
BROWSER_COOKIE = "oauth_store_browser"
STAYING = (PASSKEY, ACCOUNT)
"""The ways after which a browser may stay signed in."""


class Sessions:
    """The sessions of browsers. Each ends with the password, the passkey or the entry of `allow` that began it.

    A cookie for one purpose is worthless for another: the rows are of two kinds, and a session for one request is
    stored under a hash of its cookie and of the request.
    """

    def __init__(self, ways: Mapping[str, Way]) -> None:
        self._ways = ways

    # On the page of connected apps

    async def begin(self, approver: Approver, response: Response, signed_in: SignedIn, *, samesite: str) -> None:
        """Begin a session of a user who has signed in."""
        value, seconds = self._signed(signed_in), sessions.SESSION_SECONDS
        await self._store(approver, value, signed_in, SESSION, seconds)
        approver.cookies.set(response, SESSION_COOKIE, value, max_age_seconds=seconds, samesite=samesite)

    async def current(self, approver: Approver, request: Request) -> tuple[SignedIn, str] | None:
        """Return who is signed in, and the cookie that proves it, or None."""
        value = approver.cookies.get(request, SESSION_COOKIE)
        found = None if value is None else await self._find(approver, value, value, SESSION)
        return None if value is None or found is None else (found, value)

    # To answer requests

    async def begin_request(self, approver: Approver, response: Response, signed_in: SignedIn, handle: str) -> None:
        """Let a user answer one request, for which they signed in."""
        value, seconds = self._signed(signed_in), sessions.REQUEST_SECONDS
        await self._store(approver, _for_request(value, handle), signed_in, SESSION, seconds)
        approver.cookies.set(response, _request_cookie(handle), value, max_age_seconds=seconds)

    async def stay(self, approver: Approver, request: Request, response: Response, signed_in: SignedIn) -> None:
        """Let a user who has a passkey or an account stay signed in on this browser, in place of anyone before."""
        if signed_in.way in STAYING:
            before = approver.cookies.get(request, BROWSER_COOKIE)
            if before is not None:
                await approver.issuer.store.write(sessions.end, before)
            value, seconds = self._signed(signed_in), sessions.BROWSER_SECONDS
            await self._store(approver, value, signed_in, BROWSER, seconds)
            approver.cookies.set(response, BROWSER_COOKIE, value, max_age_seconds=seconds)

    async def for_request(self, approver: Approver, request: Request, handle: str) -> SignedIn | None:
        """Return who is signed in to answer a request: for this one alone, or on this browser."""
        once = approver.cookies.get(request, _request_cookie(handle))
        if once is not None and (found := await self._find(approver, once, _for_request(once, handle), SESSION)):
            return found
        stays = approver.cookies.get(request, BROWSER_COOKIE)
        return None if stays is None else await self._find(approver, stays, stays, BROWSER)

    async def use(self, approver: Approver, request: Request) -> None:
        """Note that a browser that stays signed in was used."""
        value = approver.cookies.get(request, BROWSER_COOKIE)
        if value is not None:
            await approver.issuer.store.write(sessions.use, value, int(time.time()))

    # All

    async def end(self, approver: Approver, request: Request, response: Response, handle: str = "") -> None:
        """Sign a browser out: of the page of connected apps, of one request, and as a browser that stays signed in."""
        once = _request_cookie(handle)
        for name in (SESSION_COOKIE, BROWSER_COOKIE, once):
            value = approver.cookies.get(request, name)
            if value is not None:
                secret = _for_request(value, handle) if name == once else value
                await approver.issuer.store.write(sessions.end, secret)
                approver.cookies.delete(response, name)

    def _signed(self, signed_in: SignedIn) -> str:
        return self._ways[signed_in.way].sign(signed_in, mint("session"))

    async def _store(
        self, approver: Approver, secret: str, signed_in: SignedIn, kind: str, lifetime_seconds: int
    ) -> None:
        began = sessions.Began(
            user=signed_in.user,
            way=f"{signed_in.way} {signed_in.entry}".strip(),
            key_hash=signed_in.key_hash,
            resource=approver.issuer.resource,
        )
        await approver.issuer.store.write(sessions.begin, secret, began, kind, lifetime_seconds, int(time.time()))

    async def _find(self, approver: Approver, value: str, secret: str, kind: str) -> SignedIn | None:
        row: Any = await sessions.find(approver.issuer, secret, kind)
        if row is None:
            return None
        name, _, entry = row.scopes.partition(" ")
        way = self._ways.get(name or PASSWORD)  # the release before did not store it
        if way is None or not way.signed(row.subject, value):
            return None
        return SignedIn(row.subject, way.name, row.paired_hash, entry, row.created_at, stays=kind == BROWSER)


def _request_cookie(handle: str) -> str:
    return f"{request_cookie(handle)}_user"


def _for_request(value: str, handle: str) -> str:
    """Return the secret of a session that is for one request: with its cookie, no other can be answered."""
    return derive(value, f"request {handle}")
