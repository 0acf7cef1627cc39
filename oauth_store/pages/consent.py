"""The consent page: the client, where its code goes, its scopes, and the owner's answer."""

from collections.abc import Collection, Mapping
from urllib.parse import urlencode

from mcp.server.auth.provider import AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.approval import Approver, AuthorizationRequest
from oauth_store.browser import Form, form_of, from_our_page, redirect, request_cookie
from oauth_store.credentials import derive, same
from oauth_store.display import app_name
from oauth_store.flows.challenges import about
from oauth_store.flows.clients import offered_to
from oauth_store.pages.callback import CallbackPage
from oauth_store.pages.choices import Choices, Tools, choices_of, tools_by_scope
from oauth_store.pages.html import Pages
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import SignedIn, SignInError
from oauth_store.pages.wording import Target, Wording, document_host, in_words, scopes_in_words
from oauth_store.urls import resource_name


def consent_url(approver: Approver, handle: str) -> str:
    """Return the address of the page for one request."""
    return f"{approver.public_url(ConsentPage.path)}?{urlencode({'handle': handle})}"


class ConsentPage:
    """Shows a pending request to the browser that started it, and takes the answer."""

    path = "/consent"

    def __init__(
        self, approver: Approver, sign_in: SignIn, pages: Pages, wording: Wording, callback: CallbackPage | None
    ) -> None:
        self._approver = approver
        self._sign_in = sign_in
        self._pages = pages
        self._wording = wording
        self._callback = callback
        self._url = approver.public_url(self.path)
        self._cookies = approver.cookies

    async def handle(self, request: Request) -> Response:
        """Show the page, or take the answer that its form sends."""
        handle = request.query_params.get("handle", "")
        browser = self._cookies.get(request, request_cookie(handle))
        if browser is None:
            return self._message(
                403,
                "This page belongs to another browser",
                "Only the browser that started a request can answer it. It must accept cookies, and the request must "
                "not be hours old. Go back to your app, and connect again from there.",
                "If someone sent you this link, close this page: nothing was allowed.",
            )
        waiting = await self._approver.pending(handle, request)
        if waiting is None:
            return self._over()
        csrf = derive(browser, f"consent {handle}")
        if request.method != "POST":
            return await self._page(request, waiting, csrf)
        form = await form_of(request)
        if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):
            return self._message(
                403,
                "This form was not sent from our page",
                "Nothing was allowed. Go back to your app, and connect again.",
            )
        try:
            return await self._answer(request, form, waiting, csrf, browser)
        except AuthorizeError:  # answered or expired in the meantime
            return self._over()

    async def _answer(
        self, request: Request, form: Form, waiting: AuthorizationRequest, csrf: str, browser: str
    ) -> Response:
        if form.get("answer") == "deny":
            return redirect(await self._approver.deny(waiting.handle))
        if "account" in form and self._callback is not None:
            return await self._leave(request, self._callback, waiting, csrf)
        if form.get("answer") == "sign_out":
            signed_out = redirect(consent_url(self._approver, waiting.handle))
            await self._sign_in.sessions.end(self._approver, request, signed_out, waiting.handle)
            return signed_out
        if form.get("answer") != "allow":
            return await self._page(request, waiting, csrf, error="Choose Allow or Deny.", status_code=400)
        choices = self._choices(waiting, {})
        shown = "choices" in form or "scope" in form  # a template of the owner's may have no boxes
        ticked = form.getlist("scope") if choices and shown else None
        scopes = None if ticked is None else choices.chosen(ticked)
        if ticked is not None and not scopes:
            error = "Choose at least one permission, or Deny." if scopes == [] else "Choose among these permissions."
            return await self._page(request, waiting, csrf, error=error, ticked=ticked, status_code=400)
        # what a passkey signs: this answer to this request of this browser, for exactly these scopes
        granted = sorted(waiting.scopes if scopes is None else scopes)
        purpose = about("allow", self._url, waiting.handle, browser, str(waiting.client.client_id), *granted)
        if form.get("stay"):
            purpose = about(purpose, "stay")
        if "question" in form:
            return await self._sign_in.ask(self._approver, request, form, purpose, waiting.handle)
        try:
            signed_in = await self._who(request, form, waiting, purpose)
        except SignInError as error:
            username = form.get("username", "")
            return await self._page(
                request,
                waiting,
                csrf,
                error=str(error),
                username=username,
                ticked=ticked,
                status_code=error.status_code,
                headers=error.headers,
            )
        if await self._approver.pending(waiting.handle, request) is None:  # a device's code was typed again elsewhere
            return self._over()
        choice = {} if scopes is None else {"scopes": scopes}
        response = redirect(await self._approver.approve(waiting.handle, subject=signed_in.user, **choice))
        self._sign_in.remember(self._approver, response, signed_in.user)
        if signed_in.stays:
            await self._sign_in.sessions.use(self._approver, request)
        elif form.get("stay"):
            await self._sign_in.sessions.stay(self._approver, request, response, signed_in)
        return response

    async def _who(self, request: Request, form: Form, waiting: AuthorizationRequest, purpose: str) -> SignedIn:
        """Return who answers: the user who is signed in, or the one whose proof the form has. Raises `SignInError`."""
        if "user" not in form:
            return await self._sign_in.check(self._approver, request, form, purpose)
        signed_in = await self._sign_in.sessions.for_request(self._approver, request, waiting.handle)
        if signed_in is None or signed_in.user != form["user"]:
            raise SignInError("You were signed out. Sign in again.")
        return signed_in

    async def _leave(
        self, request: Request, callback: CallbackPage, waiting: AuthorizationRequest, csrf: str
    ) -> Response:
        try:
            return await callback.leave(request, waiting.handle)
        except SignInError as error:
            status_code, headers = error.status_code, error.headers
            return await self._page(request, waiting, csrf, error=str(error), status_code=status_code, headers=headers)

    def _choices(
        self,
        waiting: AuthorizationRequest,
        tools: Tools,
        ticked: Collection[str] | None = None,
    ) -> Choices:
        server, words = self._approver.issuer.scopes, self._wording.scope_descriptions
        return choices_of(waiting.scopes, offered_to(waiting.client, server), server, words, tools, ticked)

    async def _page(
        self,
        request: Request,
        waiting: AuthorizationRequest,
        csrf: str,
        *,
        error: str = "",
        username: str = "",
        ticked: Collection[str] | None = None,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        client = waiting.client
        elsewhere = not self._approver.issuer.is_own(waiting.resource)
        tools = {} if elsewhere else await tools_by_scope(request, self._approver.issuer.scopes)
        signed_in = await self._sign_in.sessions.for_request(self._approver, request, waiting.handle)
        return self._pages.render(
            "consent.html",
            status_code=status_code,
            headers=headers,
            server=self._approver.public_name,
            action=consent_url(self._approver, waiting.handle),
            csrf=csrf,
            title="Allow an app?",
            client=app_name(client.client_name),
            used=resource_name(str(waiting.resource)) if elsewhere else "",
            document_host=document_host(client.client_id),
            target=Target("device", waiting.user_code, None)
            if waiting.user_code is not None
            else Target.of(waiting.redirect_uri, self._wording.known_hosts),
            choices=self._choices(waiting, tools, ticked),
            scopes=scopes_in_words(waiting.scopes, self._wording.scope_descriptions),
            duration=self._duration(client),
            **await self._sign_in.shown(self._approver),
            user="" if signed_in is None else signed_in.user,
            stays=signed_in is not None and signed_in.stays,
            username=username,
            error=error,
        )

    def _duration(self, client: OAuthClientInformationFull) -> str:
        access, refresh = self._approver.issuer.access_expiry_seconds, self._approver.issuer.refresh_expiry_seconds
        if "refresh_token" not in client.grant_types:
            return f"{in_words(access)}; then it has to ask again"
        return f"Until you revoke it, or until it goes unused for {in_words(refresh)}"

    def _over(self) -> Response:
        return self._message(
            410,
            "This request is over",
            "It was already answered, or it expired: you have 10 minutes to answer a request. Or the code of a device "
            "was typed again in another browser.",
            "If your app is connected, close this page. If not, go back to your app and connect again.",
        )

    def _message(self, status_code: int, title: str, *paragraphs: str) -> Response:
        return self._pages.message(title, *paragraphs, server=self._approver.public_name, status_code=status_code)
