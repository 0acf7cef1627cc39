"""The page that adds a passkey: `oauth-store passkey add` prints its link, which works once within ten minutes."""

import asyncio
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from oauth_store.approval import Approver
from oauth_store.browser import Form, form_of, from_our_page
from oauth_store.credentials import derive
from oauth_store.display import short_line
from oauth_store.errors import ConfigurationError
from oauth_store.events import emit
from oauth_store.flows import passkeys
from oauth_store.flows.challenges import RefusedError, about, ask
from oauth_store.flows.passkeys import Link
from oauth_store.pages.html import Pages
from oauth_store.pages.passkeys import PASSKEY, Passkeys
from oauth_store.pages.sign_in import PER_ADDRESS, QUESTIONS, WRONG_IN_TOTAL, SignIn, too_many
from oauth_store.pages.ways import SignInError
from oauth_store.rate_limits import Limiter
from oauth_store.urls import same_resource
from oauth_store.webauthn import CHALLENGE_SECONDS, EXTRA, InvalidPasskeyError, RelyingParty

OVER = "This link is incomplete, was used already, or is older than 10 minutes. Run oauth-store passkey add again."


class EnrollmentPage:
    """Takes a link and a passkey that the browser has made, and stores the passkey.

    The secret of the link is in the fragment of its URL, which browsers do not send: the page's script posts it, so it
    is in no log of a server or a proxy.
    """

    path = "/passkey"

    def __init__(self, approver: Approver, sign_in: SignIn, pages: Pages) -> None:
        self._approver = approver
        self._way = sign_in.ways.get(PASSKEY)
        self._pages = pages
        self._url = approver.public_url(self.path)
        self._limiter = Limiter()

    async def handle(self, request: Request) -> Response:
        """Show the page or its result, ask the browser for a passkey, or store the one that it made."""
        try:
            party = RelyingParty.of(self._approver.public_url(""))
        except ConfigurationError as error:
            return self._message(f"{str(error)[0].upper()}{str(error)[1:]}.", 404)
        if not isinstance(self._way, Passkeys) or not self._way.is_installed:
            return self._message(f"The server needs the extra passkeys: {EXTRA}", 404)
        if request.method != "POST":
            if request.query_params.get("answer") == "added":
                return self._message("You can sign in with it now. Close this page.", 200, "Your passkey was added")
            return self._page()
        form = await form_of(request)
        if not from_our_page(request, self._url):
            return self._page("That form was not sent from our page. Open the link again.", 403)
        address = self._approver.address_of(request)
        link = await self._link(form.get("link", ""), party, self._way)
        if isinstance(link, str):  # nobody guesses a link: a right one is never refused
            wait = self._limiter.retry_after((WRONG_IN_TOTAL, "wrong"), (PER_ADDRESS, address))
            emit("sign_in_failed", address=address, reason="too many attempts" if wait else "wrong link")
            return self._refused(form, too_many(wait) if wait else SignInError(link))
        purpose = about("enroll", party.url, link.secret)
        if "question" not in form:
            return await self._add(form, link, party, purpose, address)
        wait = self._limiter.retry_after((QUESTIONS, derive(link.secret, "questions")))
        if wait:
            return self._refused(form, too_many(wait))
        challenge = await ask(self._approver.issuer, purpose, CHALLENGE_SECONDS)
        known = [one.credential_id for one in await passkeys.of_server(self._approver.issuer) if one.user == link.user]
        options = await asyncio.to_thread(party.creation_options, challenge, link.user, known)
        return JSONResponse(options, headers={"Cache-Control": "no-store"})

    async def _link(self, secret: str, party: RelyingParty, way: Passkeys) -> Link | str:
        """Return a link that can be used at this server, or why it cannot."""
        link = await passkeys.open_link(self._approver.issuer, secret)
        if link is None or not same_resource(link.url, party.url):
            return OVER
        if link.user not in way.users:
            return f"This server has no user {short_line(link.user)}, so the passkey could not sign in."
        return replace(link, url=party.url)

    async def _add(self, form: Form, link: Link, party: RelyingParty, purpose: str, address: str) -> Response:
        try:
            created = await asyncio.to_thread(party.check_created, form.get(PASSKEY, ""))
            await passkeys.enroll(self._approver.issuer, link, created, purpose)
        except (InvalidPasskeyError, RefusedError) as error:
            reason = str(error) if isinstance(error, RefusedError) else "wrong"
            emit("sign_in_failed", address=address, reason=reason)
            return self._page("That passkey was not accepted, and nothing was added. Open the link again.", 403)
        return RedirectResponse(f"{self._url}?answer=added", 303, headers={"Cache-Control": "no-store"})

    def _refused(self, form: Form, error: SignInError) -> Response:
        if "question" in form:
            return JSONResponse({"error": str(error)}, error.status_code, error.headers)
        return self._page(str(error), error.status_code)

    def _page(self, error: str = "", status_code: int = 200) -> Response:
        return self._pages.render(
            "passkey.html",
            status_code=status_code,
            server=self._approver.public_name,
            title="Add a passkey",
            action=self._url,
            error=error,
            script=True,
        )

    def _message(self, text: str, status_code: int, title: str = "No passkey can be added here") -> Response:
        return self._pages.message(title, text, server=self._approver.public_name, status_code=status_code)
