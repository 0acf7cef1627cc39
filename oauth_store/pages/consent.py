"""The consent page: who asks, where the code goes, what for; and the owner's answer."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from oauth_store.approval import AuthorizationRequest
from oauth_store.browser import Cookies, form_of, from_our_page, request_cookie
from oauth_store.credentials import derive, same
from oauth_store.display import link_start, shown, shown_name
from oauth_store.flows.clients import OFFLINE_ACCESS
from oauth_store.pages.sign_in import SignInError

if TYPE_CHECKING:
    from oauth_store.pages.password import PasswordApproval
    from oauth_store.provider import SQLAlchemyOAuthProvider

KNOWN_CALLBACKS = {
    "https://claude.ai/api/mcp/auth_callback": "Claude",
    "https://claude.com/api/mcp/auth_callback": "Claude",
    "https://chatgpt.com/connector_platform_oauth_redirect": "ChatGPT",
    "https://vscode.dev/redirect": "Visual Studio Code",
    "https://insiders.vscode.dev/redirect": "Visual Studio Code",
    "https://www.cursor.com/agents/mcp/oauth/callback": "Cursor",
}
"""Where well-known clients have their codes sent, to the letter: elsewhere on their hosts may stand pages of others, or
one that leads on. The page warns of all others."""
CHATGPT_CONNECTOR = re.compile(r"https://chatgpt\.com/connector/oauth/[\w-]+", re.ASCII)
"""Where ChatGPT has them sent that has an id for each connector."""


class ConsentPage:
    """Shows a pending request to the browser that started it, and takes the answer."""

    path = "/consent"

    def __init__(self, provider: "SQLAlchemyOAuthProvider", approval: "PasswordApproval") -> None:
        self._provider = provider
        self._approval = approval
        self._url = provider.public_url(self.path)
        self._cookies = Cookies(str(provider.base_url))

    def url(self, handle: str) -> str:
        """Return the address of the page for one request."""
        return f"{self._url}?{urlencode({'handle': handle})}"

    async def handle(self, request: Request) -> Response:
        """Show the page, or take the answer that its form sends."""
        handle = request.query_params.get("handle", "")
        browser = self._cookies.get(request, request_cookie(handle))
        if browser is None:
            return self._message(
                403,
                "This page belongs to another browser",
                "Only the browser that started a request can answer it, if it accepts cookies, and not hours later. Go "
                "back to your app, and connect again from there.",
                "If somebody sent you this link, close the page: nothing was allowed.",
            )
        waiting = await self._provider.pending(handle, request)
        if waiting is None:
            return self._over()
        csrf = derive(browser, f"consent {handle}")
        if request.method != "POST":
            return self._page(waiting, csrf)
        form = await form_of(request)
        if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):
            return self._message(
                403,
                "This answer did not come from our page",
                "Nothing was allowed. Go back to your app, and connect again.",
            )
        try:
            return await self._answer(request, form, waiting, csrf)
        except AuthorizeError:  # answered, or expired, in between
            return self._over()

    async def _answer(
        self, request: Request, form: Mapping[str, str], waiting: AuthorizationRequest, csrf: str
    ) -> Response:
        if form.get("answer") == "deny":
            return _to_client(await self._provider.deny(waiting.handle))
        if form.get("answer") != "allow":
            return self._page(waiting, csrf, error="Choose Allow or Deny.", status_code=400)
        try:
            user = await self._approval.sign_in.check(request, form, self._cookies, self._provider.address_of(request))
        except SignInError as error:
            username = form.get("username", "")
            return self._page(
                waiting, csrf, error=str(error), username=username, status_code=error.status_code, headers=error.headers
            )
        response = _to_client(await self._provider.approve(waiting.handle, subject=user))
        self._approval.sign_in.remember(response, self._cookies, user)
        return response

    def _page(
        self,
        waiting: AuthorizationRequest,
        csrf: str,
        *,
        error: str = "",
        username: str = "",
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        client = waiting.client
        return self._approval.pages.render(
            "consent.html",
            status_code=status_code,
            headers=headers,
            server=self._provider.public_name,
            action=self.url(waiting.handle),
            csrf=csrf,
            title="Allow an app?",
            client=shown_name(client.client_name),
            document_host=document_host(client.client_id),
            target=Target.of(waiting.redirect_uri, self._approval.known_hosts),
            scopes=scopes_in_words(waiting.scopes, self._approval.scope_descriptions),
            duration=self._duration(client),
            asks_user=self._approval.sign_in.asks_user,
            username=username,
            error=error,
        )

    def _duration(self, client: OAuthClientInformationFull) -> str:
        access, refresh = self._provider.expiry_seconds
        if "refresh_token" not in client.grant_types:
            return f"{in_words(access)}; then it has to ask again"
        return f"Until you revoke it, or it is not used for {in_words(refresh)}"

    def _over(self) -> Response:
        return self._message(
            410,
            "This request is over",
            "It was answered already, or it is too old: a request waits for 10 minutes.",
            "If your app is connected, close this page. If it is not, go back to it and connect again.",
        )

    def _message(self, status_code: int, title: str, *paragraphs: str) -> Response:
        return self._approval.pages.message(
            title, *paragraphs, server=self._provider.public_name, status_code=status_code
        )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a code will be sent, for people to read."""

    kind: str
    """`web`, `loopback`, or `app` for an application's own scheme."""
    host: str
    """The host, with a port that is not the usual one; of an application's own scheme, how its links begin."""
    known_as: str | None
    """Whose address it is, as the page says it: of a well-known callback, or of a host that the owner named."""

    @property
    def ending(self) -> str:
        """How a long host ends, which is what counts: `claude.ai.evil.example` belongs to `evil.example`."""
        labels = self.host.split(".")
        return ".".join(labels[-3:]) if len(labels) > 3 and self.kind == "web" else ""

    @classmethod
    def of(cls, redirect_uri: str, known_hosts: Collection[str] = ()) -> "Target":
        """Return where a redirect URI leads. `known_hosts` are hosts, or `host:port`, that the owner knows."""
        uri = urlsplit(redirect_uri)
        host, named = uri.hostname or "", uri.netloc.rpartition("@")[2]
        if uri.scheme not in ("http", "https"):
            return cls("app", link_start(uri), None)
        if is_loopback_host(host):
            return cls("loopback", named, None)
        if uri.scheme != "https":  # registered before such were refused: anyone on the way could take the code
            return cls("web", named, None)
        if CHATGPT_CONNECTOR.fullmatch(redirect_uri):
            return cls("web", named, "ChatGPT")
        known_as = "an app that this server knows" if named in known_hosts else None
        return cls("web", named, KNOWN_CALLBACKS.get(redirect_uri, known_as))


def document_host(client_id: str) -> str | None:
    """Return the host of a client ID metadata document, which was asked and so verified; None for other clients."""
    return urlsplit(client_id).netloc if client_id.startswith("https://") else None


def scopes_in_words(scopes: Sequence[str], descriptions: Mapping[str, str]) -> list[str]:
    """Return what a client may do, as people read it."""
    known = {OFFLINE_ACCESS: "stay connected when you are not there", **descriptions}
    words = [shown(known.get(scope, scope)) for scope in scopes]
    return words or ["use everything that this server offers to apps"]


def in_words(seconds: int) -> str:
    """Return a duration in the largest unit that it is a few of."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next(one for one in units if seconds >= 2 * one[1] or seconds == one[1])
    count = round(seconds / length)
    return f"{count} {unit}{'s' if count != 1 else ''}"


def _to_client(url: str) -> Response:
    return RedirectResponse(url, 303, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
