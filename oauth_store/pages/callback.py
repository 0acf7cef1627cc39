"""The way to an identity provider and back: its response comes to the redirect URI of this server."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from oauth_store.approval import Approver
from oauth_store.browser import redirect
from oauth_store.credentials import hash_secret, mint
from oauth_store.events import emit
from oauth_store.flows import challenges
from oauth_store.flows.challenges import RefusedError, about
from oauth_store.openid import Attempt
from oauth_store.pages.accounts import ACCOUNT, CALLBACK_PATH, Accounts
from oauth_store.pages.html import Pages
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import SignedIn, SignInError

ATTEMPT_SECONDS = 10 * 60
"""How long a user has at an identity provider."""


class CallbackPage:
    """Sends browsers to the identity provider, and takes each back once: to a request, or to the connected apps.

    The state is a challenge, bound to a cookie and to what the user signed in for. The nonce and the PKCE verifier are
    derived from both, so no other browser can continue, and the database has neither.
    """

    path = CALLBACK_PATH

    def __init__(
        self,
        approver: Approver,
        sign_in: SignIn,
        account: Accounts,
        pages: Pages,
        page_of: Callable[[str], str | None],
    ) -> None:
        """`page_of` returns the page of a request, by its handle, or for "" that of the connected apps."""
        self._approver = approver
        self._sign_in = sign_in
        self._account = account
        self._pages = pages
        self._page_of = page_of
        self._url = approver.public_url(self.path)

    async def leave(self, request: Request, handle: str = "") -> Response:
        """Send a browser to the provider, for a request or for the connected apps. Raises `SignInError`."""
        self._sign_in.count_question(self._approver, request, handle, by_address=True)
        secret = mint("browser")
        state = await challenges.ask(self._approver.issuer, self._purpose(secret, handle), ATTEMPT_SECONDS)
        try:
            response = redirect(await self._account.begin(Attempt(state, secret, self._url)))
        except SignInError as error:
            emit("sign_in_failed", address=self._approver.address_of(request), reason=error.reason)
            raise
        kept = f"{secret}.{handle}"
        self._approver.cookies.set(response, _cookie(state), kept, max_age_seconds=ATTEMPT_SECONDS)
        return response

    async def handle(self, request: Request) -> Response:
        """Take a browser back, and show the page that it came from."""
        state = request.query_params.get("state", "")
        secret, _, handle = (self._approver.cookies.get(request, _cookie(state)) or "").partition(".")
        back = self._page_of(handle) if secret else None
        try:
            signed_in = await self._signed_in(request, state, secret, handle)
        except SignInError as error:
            emit("sign_in_failed", address=self._approver.address_of(request), reason=error.reason)
            return self._pages.message(
                "You are not signed in",
                str(error),
                server=self._approver.public_name,
                status_code=error.status_code,
                again=back,
            )
        response = redirect(back or self._url)
        self._approver.cookies.delete(response, _cookie(state))
        if handle:
            await self._sign_in.sessions.begin_request(self._approver, response, signed_in, handle)
        else:  # a browser that comes from another site sends no strict cookie
            await self._sign_in.sessions.begin(self._approver, response, signed_in, samesite="lax")
        return response

    async def _signed_in(self, request: Request, state: str, secret: str, handle: str) -> SignedIn:
        try:
            await challenges.use(self._approver.issuer, state, self._purpose(secret, handle))
        except RefusedError as refused:
            raise SignInError(
                "This sign-in was used, is older than 10 minutes, or began in another browser. Nothing was allowed.",
                reason="the sign-in is over",
                status_code=400,
            ) from refused
        return await self._account.finish(Attempt(state, secret, self._url), dict(request.query_params))

    def _purpose(self, secret: str, handle: str) -> str:
        return about(ACCOUNT, self._url, secret, handle)


def _cookie(state: str) -> str:
    """Return the name of the cookie of one sign-in, so that two tabs do not collide."""
    return f"oauth_store_attempt_{hash_secret(state).hex()[:16]}"
