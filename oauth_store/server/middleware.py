"""Middleware around the routes: outages become 503, errors become pages, and responses with secrets are not cached."""

import json
from collections.abc import Callable

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store.browser import wants_page
from oauth_store.display import short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import Listener, listener
from oauth_store.rate_limits import FloodGuard
from oauth_store.server.answers import MessagePage, error_answer

NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
RETRY_AFTER_SECONDS = 5
COOKIE_ESCAPES = 100


class NoStoreMiddleware:
    """Marks every response as not to be stored by caches (RFC 6749, section 5.1; RFC 7591, section 3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(NO_STORE)
            await send(message)

        await self.app(scope, receive, marked)


class CookieLimitMiddleware:
    """Refuses cookies with more escapes than any app sets: Python 3.11 and 3.12 take seconds to parse 64 KiB of them.

    Our pages do not parse such cookies; the pages of another approval, and its middleware, may.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        escapes = sum(line.count("\\") for line in Headers(scope=scope).getlist("cookie"))
        if escapes > COOKIE_ESCAPES:
            refused = error_answer(400, "invalid_request", "the cookies cannot be read")
            await refused(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def too_many(seconds: int) -> Response:
    """Return the response to a request over a limit: try again in so many seconds (RFC 6585, section 4)."""
    description = f"too many requests; try again in {seconds} s"
    return error_answer(429, "temporarily_unavailable", description, {"Retry-After": str(seconds)})


class FloodMiddleware:
    """Responds 429 to requests over a limit (RFC 6585, section 4)."""

    def __init__(
        self, app: ASGIApp, guard: FloodGuard, path: str, refunds: Callable[[int], bool] = lambda _status: False
    ) -> None:
        """`refunds` returns, from the status of a response, whether its request left no row and does not count."""
        self.app = app
        self._guard, self._path = guard, path
        self._refunds = refunds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        seconds = self._guard.retry_after(self._path, request)
        if seconds is None:

            async def watch(message: Message) -> None:
                if message["type"] == "http.response.start" and self._refunds(message["status"]):
                    self._guard.refund(self._path, request)
                await send(message)

            await self.app(scope, receive, watch)
            return
        await too_many(seconds)(scope, receive, send)


class ListeningMiddleware:
    """Passes the events of each request on to a listener."""

    def __init__(self, app: ASGIApp, listening: Listener) -> None:
        self.app = app
        self._listening = listening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = listener.set(self._listening)
        try:
            await self.app(scope, receive, send)
        finally:
            listener.reset(token)


class OutageMiddleware:
    """Responds 503 during a database outage (RFC 9110, section 15.6.4): clients should retry, not sign in again.

    A client that hangs up before it has sent its whole request gets nothing, and leaves no traceback in the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except OAuthStoreError:
            if started or scope["type"] != "http":
                raise
            await _unavailable()(scope, receive, send)


def _unavailable() -> Response:
    # the log has the cause, for the operator
    description = "the authorization server's database is unavailable"
    headers = {**NO_STORE, "Retry-After": str(RETRY_AFTER_SECONDS)}
    return error_answer(503, "temporarily_unavailable", description, headers)


class ChallengeMiddleware:
    """Makes FastMCP ask for a token on every method: its route checks the method first, and responds 405.

    Clients probe with GET or HEAD, and learn from the challenge where to sign in (RFC 9728, section 5.1). A request
    without a token gets no further than that route.
    """

    def __init__(self, app: ASGIApp, is_protected: Callable[[str], bool]) -> None:
        self.app = app
        self._is_protected = is_protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_probe = scope["type"] == "http" and scope["method"] not in ("POST", "OPTIONS")
        if is_probe and not isinstance(scope.get("user"), AuthenticatedUser):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if self._is_protected(path):
                scope = {**scope, "method": "POST"}
        await self.app(scope, receive, send)


class ProblemPages:
    """Shows an error as a page to a browser that navigates; clients get the usual response."""

    def __init__(self, app: ASGIApp, message_page: MessagePage) -> None:
        self.app = app
        self._message_page = message_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not wants_page(Request(scope)):
            await self.app(scope, receive, send)
            return
        problem: Message | None = None
        body = b""

        async def watch(message: Message) -> None:
            nonlocal problem, body
            if message["type"] == "http.response.start" and _is_problem(message):
                problem = message
            elif problem is None:
                await send(message)
            else:
                body += message.get("body", b"")

        await self.app(scope, receive, watch)
        if problem is not None:
            await self._page(problem, body)(scope, receive, send)

    def _page(self, problem: Message, body: bytes) -> Response:
        status, headers = problem["status"], Headers(raw=problem["headers"])
        kept = {"Retry-After": headers["retry-after"]} if "retry-after" in headers else {}
        if status == 503:
            title, text = (
                "Not available right now",
                "The server cannot reach its database. Reload this page in a moment.",
            )
        elif status == 429:
            title = "Too many requests"
            text = f"Wait {headers['retry-after']} seconds, then go back to your app and connect again."
        else:
            title = "This request cannot be processed"
            text = "Go back to your app and connect again. If that fails, remove the server there and add it again."
        return self._message_page(title, text, _description(body) if status == 400 else "", status, kept)


def _is_problem(start: Message) -> bool:
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and not content_type.startswith("text/html")


def _description(body: bytes) -> str:
    try:
        return short_line(str(json.loads(body)["error_description"]))
    except (ValueError, KeyError, TypeError):
        return ""
