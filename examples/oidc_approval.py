"""Sign the owner in with an OpenID Connect provider: Google, Microsoft, Keycloak, Authentik, or your company's.

    pip install fastmcp-oauth-store authlib itsdangerous
    python examples/oidc_approval.py

Copy this approval and change it. Set these environment variables:

    BASE_URL               the public URL of this server; by default http://127.0.0.1:8000, where it listens
    OIDC_ISSUER            the provider's issuer, spelled exactly as in its metadata: https://accounts.google.com
    OIDC_CLIENT_ID         this server's client id at the provider, with the redirect URI <BASE_URL>/sign-in/callback
    OIDC_CLIENT_SECRET     the secret of that client
    OIDC_OWNER_SUBJECTS    the owners, by their `sub` at the provider, separated by commas
    OIDC_OWNER_EMAILS      the owners, by email addresses that the provider has verified, separated by commas
"""

import hmac
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from authlib.integrations.starlette_client import OAuth, OAuthError
from fastmcp import FastMCP
from jinja2 import Environment, FileSystemLoader
from mcp.server.auth.provider import AuthorizeError
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from oauth_store import AuthorizationRequest, ConfigurationError, OAuthStoreError, SQLAlchemyOAuthProvider

PAGE, CALLBACK = "/sign-in", "/sign-in/callback"
SESSION_SECONDS = 600  # as long as a request waits
template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
    "oidc_approval.html"
)
logger = logging.getLogger("oidc_approval")


class OidcApproval:
    """Sign the owner in with an OpenID Connect provider, then ask the owner to allow or deny the app."""

    def __init__(self, settings: Mapping[str, str] = os.environ) -> None:
        """Raises `ConfigurationError` for a missing or bad setting. Does not contact the provider yet."""
        needed = ("OIDC_ISSUER", "OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET")
        for name in needed:
            if not settings.get(name):
                raise ConfigurationError(f"{name} is not set; the top of {Path(__file__).name} explains it")
        self._issuer, client_id, client_secret = (settings[name] for name in needed)
        url = urlsplit(self._issuer)
        if url.scheme != "https" and (url.scheme, url.hostname) != ("http", "127.0.0.1"):
            raise ConfigurationError(f"OIDC_ISSUER is {self._issuer!r}; expected one like https://accounts.google.com")
        self._subjects, self._emails = (
            {owner.strip() for owner in settings.get(name, "").split(",")} - {""}
            for name in ("OIDC_OWNER_SUBJECTS", "OIDC_OWNER_EMAILS")
        )
        if not self._subjects and not self._emails:
            raise ConfigurationError("nobody can allow an app; set OIDC_OWNER_SUBJECTS or OIDC_OWNER_EMAILS")
        self._upstream = OAuth().register(
            "upstream",
            client_id=client_id,
            client_secret=client_secret,
            server_metadata_url=f"{self._issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={"scope": "openid email", "code_challenge_method": "S256"},
        )
        self._claims = {
            "iss": {"essential": True, "value": self._issuer},
            "aud": {"essential": True, "value": client_id},
        }
        # the same key in every process, so that any of them can continue; a new key when the owners change
        bound = repr((self._issuer, client_id, sorted(self._subjects), sorted(self._emails)))
        self._session_key = hmac.digest(client_secret.encode(), bound.encode(), "sha256").hex()

    async def authorize(self, provider: SQLAlchemyOAuthProvider, request: AuthorizationRequest) -> str:
        """Send the browser to our page."""
        return _page_url(provider, request.handle)

    def routes(self, provider: SQLAlchemyOAuthProvider) -> list[Route]:
        """Return our pages. A signed session cookie holds the request of a sign-in, and then the signed-in owner."""
        secure = provider.public_url("").startswith("https://")
        session = Middleware(
            SessionMiddleware,
            secret_key=self._session_key,
            session_cookie="__Host-sign-in" if secure else "sign-in",
            max_age=SESSION_SECONDS,
            same_site="lax",  # browsers do not send a strict cookie when the provider redirects back
            https_only=secure,
        )
        return [
            Route(PAGE, partial(self._page, provider), methods=["GET", "POST"], middleware=[session]),
            Route(CALLBACK, partial(self._callback, provider), middleware=[session]),
        ]

    async def _page(self, provider: SQLAlchemyOAuthProvider, request: Request) -> Response:
        handle = request.query_params.get("handle", "")
        asked = await provider.pending(handle, request)
        if asked is None:  # also in every browser that did not start the request: an attacker may have sent the link
            return _say(410, "This request is over", "It was answered, has expired, or belongs to another browser.")
        signed_in = request.session.get("signed_in", {})
        if signed_in.get("handle") != handle:  # a sign-in is valid for one request
            if request.method == "POST":
                return _say(403, "You are not signed in", "Nothing was allowed.")
            return await self._to_upstream(provider, request, handle)
        if request.method == "GET":
            return _ask(asked, signed_in)
        form = await request.form()
        if not hmac.compare_digest(str(form.get("csrf", "")).encode(), signed_in["csrf"].encode()):
            return _say(403, "This form was not sent from our page", "Nothing was allowed.")
        try:
            if form.get("answer") == "allow":
                ticked = [str(scope) for scope in form.getlist("scope")]
                if _choices(asked) and not ticked:
                    return _ask(asked, signed_in, "Choose at least one, or deny.")
                url = await provider.approve(handle, subject=signed_in["subject"], scopes=ticked or None)
            else:
                url = await provider.deny(handle)
        except AuthorizeError:  # answered or expired in the meantime
            return _say(410, "This request is over", "It was answered, or has expired.")
        return RedirectResponse(url, 303, {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})

    async def _to_upstream(self, provider: SQLAlchemyOAuthProvider, request: Request, handle: str) -> Response:
        request.session.clear()
        request.session["handle"] = handle
        try:
            # Authlib creates state, nonce and PKCE verifier, and keeps them in the session
            redirect: Response = await self._upstream.authorize_redirect(request, provider.public_url(CALLBACK))
            issuer = self._upstream.server_metadata["issuer"]
        except Exception as error:  # whatever the provider returns, the owner gets a page
            logger.warning("nobody can sign in: %r", error)
            return _say(502, "Signing in does not work right now", "Reload this page in a moment.")
        if issuer != self._issuer:  # OpenID Connect Discovery, section 4.3
            logger.error("nobody can sign in: OIDC_ISSUER is %r, which calls itself %r", self._issuer, issuer)
            return _say(502, "Signing in does not work", "See the log of this server for the reason.")
        return redirect

    async def _callback(self, provider: SQLAlchemyOAuthProvider, request: Request) -> Response:
        handle = request.session.get("handle", "")
        again = _page_url(provider, handle) if handle else None
        try:
            token = await self._upstream.authorize_access_token(request, claims_options=self._claims)
            person = await self._person(token)
        except OAuthError as error:  # the provider refused, or the state was used or belongs to another browser
            logger.warning("a sign-in failed: %r", error)
            return _say(400, "You are not signed in", "The sign-in was canceled, or not started here.", again)
        except Exception as error:  # any other response of the provider lets nobody in
            logger.warning("nobody can sign in: %r", error)
            return _say(502, "Signing in does not work right now", "Try again in a moment.", again)
        email = person.get("email") if person.get("email_verified") is True else None
        name = f"{email or 'someone without a verified address'} (subject {person['sub']})"
        if person["sub"] not in self._subjects and email not in self._emails:
            logger.warning("not an owner: %r", name)
            return _say(403, "You cannot allow apps here", f"You signed in as {name}, who is not an owner.", again)
        request.session.clear()
        csrf = secrets.token_urlsafe(32)
        request.session["signed_in"] = {"handle": handle, "subject": person["sub"], "name": name, "csrf": csrf}
        return RedirectResponse(_page_url(provider, handle), 303, {"Cache-Control": "no-store"})

    async def _person(self, token: dict[str, Any]) -> dict[str, Any]:
        """Return the claims of the verified ID token, and those of the userinfo endpoint if only it has the address."""
        claims: dict[str, Any] = token["userinfo"]  # a KeyError without an ID token, handled like other errors
        if self._emails and "email" not in claims:
            more = await self._upstream.userinfo(token=token)
            if more["sub"] == claims["sub"]:  # OpenID Connect Core, section 5.3.2
                return {**more, **claims}
        return claims


def _page_url(provider: SQLAlchemyOAuthProvider, handle: str) -> str:
    return f"{provider.public_url(PAGE)}?{urlencode({'handle': handle})}"


def _choices(asked: AuthorizationRequest) -> list[str]:
    """Return the scopes that have a checkbox. `offline_access` asks for a refresh token, and is no permission."""
    return [scope for scope in asked.scopes if scope != "offline_access"]


def _target(asked: AuthorizationRequest) -> str:
    """Return where the access goes, in words."""
    if asked.user_code is not None:
        return f"the device that shows the code {asked.user_code}"
    target = urlsplit(asked.redirect_uri)
    if target.scheme in ("http", "https"):
        return target.netloc
    # the host of a private-use scheme proves nothing
    link = f"{target.scheme}:{'//' if target.netloc else ''}{target.netloc}"
    return f"an app on this device that opens links that begin with {link}"


def _ask(asked: AuthorizationRequest, signed_in: dict[str, str], error: str | None = None) -> Response:
    name = "".join(one for one in asked.client.client_name or "" if one.isprintable())[:80]  # the client chose it
    return _html(
        200 if error is None else 400,
        title="Allow this app?",
        error=error,
        client=name or "nothing",
        target=_target(asked),
        scopes=_choices(asked),
        name=signed_in["name"],
        csrf=signed_in["csrf"],
    )


def _say(status: int, title: str, text: str, again: str | None = None) -> Response:
    return _html(status, title=title, text=text, again=again)


def _html(status: int, **values: str | list[str] | None) -> Response:
    headers = {
        # no form-action: Chromium would also apply it to the redirect to the client after the form
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
        "frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(template.render(values), status, headers)


def main() -> None:
    """Serve until stopped."""
    try:
        base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
        mcp: FastMCP[None] = FastMCP("wiki", auth=SQLAlchemyOAuthProvider(base_url=base_url, approval=OidcApproval()))
        mcp.tool(lambda title: f"{title}: for authorized clients only", name="read_page")
        mcp.run(transport="http", host="127.0.0.1", port=8000, stateless_http=True, show_banner=False)
    except OAuthStoreError as error:
        sys.exit(f"cannot start: {error}")


if __name__ == "__main__":
    main()
