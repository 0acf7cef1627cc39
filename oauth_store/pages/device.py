"""The page where the owner types the code that a device shows (RFC 8628, section 3.3)."""

from collections.abc import Awaitable, Callable

from limits import parse
from mcp.server.auth.provider import AuthorizeError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.approval import Approver, AuthorizationRequest, request_of
from oauth_store.browser import REQUEST_COOKIE_SECONDS, form_of, from_our_page, redirect, request_cookie
from oauth_store.credentials import device_handle, user_code_of
from oauth_store.display import in_minutes, short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit
from oauth_store.flows import devices
from oauth_store.pages.default import DEVICE_PATH
from oauth_store.pages.html import Pages
from oauth_store.pages.sign_in import KNOWN_BROWSER, PER_BROWSER, SignIn
from oauth_store.rate_limits import Limiter

PER_ADDRESS = parse("10/15 minutes")
IN_TOTAL = parse("1000/15 minutes")
"""Wrong codes. A thousand in 15 minutes find the code of one of a hundred waiting devices in 7 years, on average, and
it leads only to the page that asks for the owner's approval."""
_DENIED = "Your device was not allowed"
_ANSWERS = {
    "allowed": ("Your device can connect", "It was allowed. Close this page, and go back to your device."),
    "denied": (_DENIED, "Nothing was allowed. Close this page."),
}


class DevicePage:
    """Takes a user code, and sends the browser on to the approval, like /authorize."""

    def __init__(
        self,
        approver: Approver,
        authorize: Callable[[AuthorizationRequest], Awaitable[str]],
        pages: Pages,
        sign_in: SignIn | None,
    ) -> None:
        """`authorize` is the approval's. `sign_in` knows browsers that signed in before; None if nobody signs in."""
        self._approver = approver
        self._authorize = authorize
        self._pages = pages
        self._sign_in = sign_in
        self._url = approver.public_url(DEVICE_PATH)
        self._limiter = Limiter()

    async def handle(self, request: Request) -> Response:
        """Show the form or the owner's answer, or take the code."""
        if request.method != "POST":
            answer = _ANSWERS.get(request.query_params.get("answer", ""))
            return self._form(request.query_params.get("user_code", "")) if answer is None else self._message(*answer)
        form = await form_of(request)
        typed = form.get("user_code", "")
        if not from_our_page(request, self._url):
            return self._form(
                typed, "That form was not sent from our page. Compare the code, and choose Continue.", 403
            )
        user_code = user_code_of(typed)
        if user_code is None:
            return self._form(typed, "That is no code: a code has eight letters, such as WDJB-MJHT.", 400)
        cookies, issuer = self._approver.cookies, self._approver.issuer
        browser = cookies.get(request, KNOWN_BROWSER)
        known = browser is not None and self._sign_in is not None and self._sign_in.knows(browser)
        address = self._approver.address_of(request)
        counted = [(PER_BROWSER, f"browser {browser}")] if known else [(IN_TOTAL, "all"), (PER_ADDRESS, address)]
        seconds = self._limiter.retry_after(*counted)
        if seconds is not None:
            emit("sign_in_failed", address=address, reason="too many codes")
            error = f"Too many wrong codes. Wait {in_minutes(seconds)}, and try again."
            return self._form(typed, error, 429, {"Retry-After": str(seconds)})
        earlier = cookies.get(request, request_cookie(device_handle(user_code)))
        try:
            opened = await devices.open_request(issuer, user_code, earlier)
            client = None if opened is None else await self._approver.get_client(opened.row.client_id)
        except OAuthStoreError:  # an outage is no guess
            self._limiter.refund(*counted)
            raise
        if opened is None or client is None:
            emit("sign_in_failed", address=address, reason="wrong code")
            error = "No device waits with this code. Compare it with the device. Codes expire after 10 minutes."
            return self._form(typed, error, 404)
        self._limiter.refund(*counted)
        try:
            url = await self._authorize(request_of(opened.handle, client, opened.row))
        except AuthorizeError as error:
            await self._approver.deny(opened.handle)
            return self._message(_DENIED, short_line(error.error_description or error.error), status_code=403)
        response = redirect(url)
        cookies.set(response, request_cookie(opened.handle), opened.browser, max_age_seconds=REQUEST_COOKIE_SECONDS)
        return response

    def _form(
        self, typed: str, error: str = "", status_code: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        return self._pages.render(
            "device.html",
            status_code=status_code,
            headers=headers,
            server=self._approver.public_name,
            title="Connect a device",
            action=self._url,
            user_code=short_line(typed[:20]),
            error=error,
        )

    def _message(self, title: str, text: str, status_code: int = 200) -> Response:
        return self._pages.message(title, text, server=self._approver.public_name, status_code=status_code)
