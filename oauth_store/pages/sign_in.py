"""Sign-in: the ways in which users prove who they are, and what all share: limits and known browsers."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from limits import parse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oauth_store.approval import Approver
from oauth_store.display import in_minutes
from oauth_store.events import emit
from oauth_store.pages.accounts import ACCOUNT, Accounts
from oauth_store.pages.passkeys import PASSKEY
from oauth_store.pages.sessions import Sessions
from oauth_store.pages.ways import OWNER, SignedIn, SignInError, Way
from oauth_store.rate_limits import Limiter

KNOWN_BROWSER = "oauth_store_known"
KNOWN_BROWSER_SECONDS = 180 * 24 * 3600
PER_ADDRESS = parse("10/15 minutes")
PER_BROWSER = parse("20/15 minutes")
IN_TOTAL = parse("100/15 minutes")
QUESTIONS = parse("60/15 minutes")
"""Challenges for one browser, address or link: each leaves a row for five minutes."""
QUESTIONS_PER_REQUEST = parse("10/15 minutes")
"""Challenges for one request or session. Anyone can start requests."""
WRONG_IN_TOTAL = parse("10000/15 minutes")
"""Wrong passkeys and links that are counted at all: their addresses take memory."""
QUESTIONS_IN_TOTAL = parse("600/minute")
"""Challenges for signing in on the page of connected apps, which anyone can ask for."""


class SignIn:
    """The ways to sign in to a server, with limits per address, browser and process that all of them share.

    A browser that signed in before proves it with a cookie, and has its own limit: an attacker elsewhere can exhaust
    the other limits, but cannot lock the owner out. The cookie's key is the password's hash, so it needs no row and
    becomes invalid when the password changes, as sessions do.
    """

    def __init__(self, ways: Sequence[Way], *, asks_user: bool) -> None:
        """`asks_user`: whether there are several users, each of whom sees their own apps."""
        self.ways = {way.name: way for way in ways}
        self.asks_user = asks_user
        self.sessions = Sessions(self.ways)
        self._limiter = Limiter()

    async def shown(self, approver: Approver) -> dict[str, Any]:
        """Return what the templates need to show the ways that can be used now."""
        offered = [name for name, way in self.ways.items() if await way.is_offered(approver)]
        return {
            "ways": offered,
            "asks_user": self.asks_user,
            "script": PASSKEY in offered,
            "account": "" if self.account is None else self.account.label,
        }

    @property
    def account(self) -> Accounts | None:
        """The identity provider at which users may sign in."""
        way = self.ways.get(ACCOUNT)
        return way if isinstance(way, Accounts) else None

    def sees(self, user: str) -> str | None:
        """Return the user whose grants a user sees, or None for those of all: the owner's, where no user has a name."""
        return None if user == OWNER and not self.asks_user else user

    def is_in(self, form: Mapping[str, str]) -> bool:
        """Return whether a form has the proof of a way, or asks for its question."""
        return any(name in form for name in (*self.ways, "question"))

    async def ask(
        self, approver: Approver, request: Request, form: Mapping[str, str], purpose: str, subject: str = ""
    ) -> Response:
        """Return the question of the way that a form names, as JSON.

        `subject` names the request or the session that it is for. Without one, anyone may ask.
        """
        way = self.ways.get(form.get("question", ""))
        if way is None or not await way.is_offered(approver):
            return JSONResponse({"error": "This server has no such way to sign in."}, 400)
        try:
            self.count_question(approver, request, subject)
        except SignInError as error:
            headers = {"Cache-Control": "no-store", **error.headers}
            return JSONResponse({"error": str(error)}, error.status_code, headers)
        return JSONResponse(await way.question(approver, purpose), headers={"Cache-Control": "no-store"})

    def count_question(self, approver: Approver, request: Request, subject: str, *, by_address: bool = False) -> None:
        """Count a challenge, for a request or a session, or for anyone. Raises `SignInError` if there are too many.

        With `by_address`, one for a request or a session counts for its address or browser too.
        """
        browser, address = approver.cookies.get(request, KNOWN_BROWSER), approver.address_of(request)
        known = f"browser {browser}" if browser is not None and self.knows(browser) else ""
        counted = [
            (QUESTIONS_PER_REQUEST, f"about {subject}") if subject else (QUESTIONS, f"question {known or address}")
        ]
        if subject and by_address:
            counted.append((QUESTIONS, f"question {known or address}"))
        if not subject and not known:
            counted.insert(0, (QUESTIONS_IN_TOTAL, "questions"))
        wait = self._limiter.retry_after(*counted)
        if wait is not None:
            emit("sign_in_failed", address=address, reason="too many attempts")
            raise too_many(wait)

    async def check(self, approver: Approver, request: Request, form: Mapping[str, str], purpose: str) -> SignedIn:
        """Return the user whose proof is in a form, for one purpose.

        Raises `SignInError`: with a password, the same and after the same time for a wrong one and an unknown user.
        """
        filled = [way for name, way in self.ways.items() if form.get(name)]
        used = filled or [way for name, way in self.ways.items() if name in form] or list(self.ways.values())[:1]
        way = used[-1]  # not the password, which the browser may have filled in
        browser, address = approver.cookies.get(request, KNOWN_BROWSER), approver.address_of(request)
        user = way.user_in(form)
        is_known = browser is not None and self.knows(browser, user)
        if is_known:
            counted = [(PER_BROWSER, f"browser {browser}")]
        else:
            counted = [(IN_TOTAL, "all") if way.guessable else (WRONG_IN_TOTAL, "wrong"), (PER_ADDRESS, address)]
        wait = self._limiter.retry_after(*counted) if way.guessable else None
        if wait is not None:
            emit("sign_in_failed", address=address, reason="too many attempts")
            raise too_many(wait)
        try:
            signed_in = await way.check(approver, user, form.get(way.name, ""), purpose)
        except SignInError as error:
            # Nobody guesses a passkey: a right one is never refused, whatever was sent from the same address
            wait = None if way.guessable else self._limiter.retry_after(*counted)
            reason = error.reason if wait is None else "too many attempts"
            emit("sign_in_failed", address=address, reason=reason)  # no name: users type passwords there
            if wait is not None:
                raise too_many(wait) from error
            raise
        if way.guessable and (is_known or not self.asks_user):
            self._limiter.forget(*counted[-1])  # never so that a user resets the limit for another's password
        return signed_in

    def remember(self, approver: Approver, response: Response, user: str) -> None:
        """Set a cookie that proves that this user has signed in with this browser, where that helps against guesses."""
        for way in self._guessable():
            if user in way.users:
                value = way.sign(SignedIn(user, way.name), secrets.token_urlsafe(16))
                approver.cookies.set(response, KNOWN_BROWSER, value, max_age_seconds=KNOWN_BROWSER_SECONDS)

    def knows(self, browser: str, user: str | None = None) -> bool:
        """Return whether the cookie of `remember` shows that a user, or this one, has signed in with this browser."""
        return any(
            way.signed(one, browser) for way in self._guessable() for one in (way.users if user is None else (user,))
        )

    def _guessable(self) -> list[Way]:
        return [way for way in self.ways.values() if way.guessable]


def too_many(wait: int) -> SignInError:
    """Return the error for an attempt over a limit, which ends in so many seconds."""
    return SignInError(f"Too many attempts. Wait {in_minutes(wait)}, and try again.", wait)
