"""The connected apps: which apps have access, since when, and the buttons that revoke it."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from oauth_store.approval import Approver
from oauth_store.browser import Form, form_of, from_our_page
from oauth_store.credentials import derive, mint, same
from oauth_store.display import app_name, short_line, utc
from oauth_store.errors import DatabaseUnavailable, OAuthStoreError, SchemaError
from oauth_store.flows import sessions
from oauth_store.flows.challenges import about
from oauth_store.flows.connected import LiveGrant, end_all, end_one, live_grants
from oauth_store.flows.issuer import UnknownResourceError
from oauth_store.flows.personal import NO_EXPIRY, create_token, is_personal
from oauth_store.flows.scopes import change_scopes
from oauth_store.flows.sessions import Browser
from oauth_store.pages.accounts import ACCOUNT
from oauth_store.pages.callback import CallbackPage
from oauth_store.pages.choices import Choices, Tools, choices_of, tools_by_scope
from oauth_store.pages.html import Pages
from oauth_store.pages.passwords import PASSWORD
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import SignedIn, SignInError
from oauth_store.pages.wording import Wording, scopes_in_words
from oauth_store.urls import known_as, resource_name
from oauth_store.webauthn import CHALLENGE_SECONDS

QUESTION_COOKIE = "oauth_store_question"
"""Binds the question of a way to sign in to the browser that asked for it."""
SHOWN = 200
"""Maximum apps on the page: enough for a user, and rendered within a second."""
FRESH_SECONDS = 5 * 60
"""How young a sign-in at an identity provider is that confirms a form: the provider need not ask for anything again."""
CONFIRMED = ("revoke", "create", "name", "expires", "resource")
"""The fields of a form, with its scopes, that a passkey signs when it confirms one."""


class AppsPage:
    """Lists and revokes the grants of the user who signs in.

    With one password, these are all grants; with `users`, each user sees the grants that they approved. A session is a
    row of `oauth_tokens` with its own kind, valid for 15 minutes.
    """

    def __init__(
        self,
        approver: Approver,
        sign_in: SignIn,
        pages: Pages,
        wording: Wording,
        callback: CallbackPage | None,
        path: str,
    ) -> None:
        self.path = path
        self._callback = callback
        self._approver = approver
        self._issuer = approver.issuer
        self._sign_in = sign_in
        self._pages = pages
        self._wording = wording
        self._url = approver.public_url(path)
        self._cookies = approver.cookies

    async def handle(self, request: Request) -> Response:
        """Show the sign-in form or the list, or handle one of their forms."""
        current = await self._sign_in.sessions.current(self._approver, request)
        if current is None:
            return await self._answer_sign_in(request) if request.method == "POST" else await self._form()
        signed_in, session = current
        user, csrf = signed_in.user, derive(session, "apps")
        if request.method != "POST":
            return await self._list(request, signed_in, csrf)
        form = await form_of(request)
        if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):
            return self._pages.message(
                "This form was not sent from our page",
                "Nothing was changed.",
                server=self._approver.public_name,
                status_code=403,
            )
        if form.get("sign_out"):
            response = self._to_page()
            if form["sign_out"] == "everywhere":
                await self._sign_out_everywhere(user)
            await self._sign_in.sessions.end(self._approver, request, response)
            return response
        message, app, token, failed = "", "", "", False
        status_code, headers = 200, {}
        try:
            if "account" in form and self._callback is not None:
                return await self._callback.leave(request)
            if "create" in form or form.get("revoke") == "all":
                purpose = about(*("change", self._url, session), *(form.get(name, "") for name in CONFIRMED),
                                *sorted(form.getlist("scope")))  # fmt: skip
                if "question" in form:
                    return await self._sign_in.ask(self._approver, request, form, purpose, session)
                await self._confirm(request, form, signed_in, purpose)
            if "create" in form:
                message, app, token = await self._create(user, form)
            elif "save" in form:
                message, app = await self._save(user, form["save"], form.getlist("scope"), form.get("had"))
            else:
                message, app = await self._revoke(user, form.get("revoke", ""))
        except SignInError as error:
            message, failed, status_code, headers = str(error), True, error.status_code, error.headers
        except (DatabaseUnavailable, SchemaError):
            raise
        except OAuthStoreError as error:
            message, failed = f"Nothing was changed: {error}.", True
        return await self._list(
            request, signed_in, csrf,
            message=message, app=app, token=token, failed=failed, status_code=status_code, headers=headers,
        )  # fmt: skip

    async def _confirm(self, request: Request, form: Form, signed_in: SignedIn, purpose: str) -> None:
        """Check that the user proves again who they are. Raises `SignInError`."""
        user = signed_in.user
        if not self._sign_in.is_in(form):
            if _is_fresh(signed_in):
                return
            # from a template of the owner's, made for a release before
            account = self._sign_in.account
            if account is not None:
                raise SignInError(f"Sign in with {account.label} again, then confirm this within 5 minutes.")
            raise SignInError("Confirm this with your password or your passkey.")
        again = await self._sign_in.check(self._approver, request, {**dict(form), "username": user}, purpose)
        if again.user != user:
            raise SignInError("You are signed in as another user.")

    async def _answer_sign_in(self, request: Request) -> Response:
        form = await form_of(request)
        if not self._sign_in.is_in(form) or "csrf" in form or not from_our_page(request, self._url):
            return await self._form("You were signed out. Sign in again.")
        browser = self._cookies.get(request, QUESTION_COOKIE) or mint("browser")
        purpose = about("sign in", self._url, browser)
        if "account" in form and self._callback is not None:
            try:
                return await self._callback.leave(request)
            except SignInError as error:
                return await self._form(str(error), status_code=error.status_code, headers=error.headers)
        if "question" in form:
            response = await self._sign_in.ask(self._approver, request, form, purpose)
            self._cookies.set(response, QUESTION_COOKIE, browser, max_age_seconds=CHALLENGE_SECONDS, samesite="strict")
            return response
        try:
            signed_in = await self._sign_in.check(self._approver, request, form, purpose)
        except SignInError as error:
            return await self._form(
                str(error),
                username=form.get("username", ""),
                status_code=error.status_code,
                headers=error.headers,
            )
        response = self._to_page()
        await self._sign_in.sessions.begin(self._approver, response, signed_in, samesite="strict")
        self._sign_in.remember(self._approver, response, signed_in.user)
        return response

    async def _form(self, error: str = "", *, username: str = "", status_code: int = 200, **options: Any) -> Response:
        return self._pages.render(
            "sign_in.html",
            server=self._approver.public_name,
            title="Connected apps",
            action=self._url,
            error=error,
            username=username,
            **await self._sign_in.shown(self._approver),
            status_code=status_code,
            **options,
        )

    async def _list(
        self,
        request: Request,
        signed_in: SignedIn,
        csrf: str,
        *,
        message: str = "",
        app: str = "",
        token: str = "",
        failed: bool = False,
        **options: Any,
    ) -> Response:
        user = signed_in.user
        subject, known = self._sign_in.sees(user), self._issuer.known
        connected, total = await self._issuer.store.read(live_grants, subject=subject, resources=known, limit=SHOWN)
        tools = await tools_by_scope(request, self._issuer.scopes)
        groups = [
            {"server": server, "apps": [self._described(grant, tools) for grant in grants]}
            for server, grants in self._by_server(connected)
        ]
        return self._pages.render(
            "apps.html",
            server=self._approver.public_name,
            title="Connected apps",
            action=self._url,
            csrf=csrf,
            user=user,
            said=message,
            said_of=app,
            failed=failed,
            token=token,
            token_choices=self._token_choices(tools),
            apps=[app for group in groups for app in group["apps"]],
            groups=groups,
            servers=self._servers(),
            more=total - len(connected),
            browsers=len(await self._browsers(user)),
            is_fresh=_is_fresh(signed_in),
            **await self._shown(user),
            **options,
        )

    def _servers(self) -> dict[str, str]:
        """Return the names of the servers for which there are tokens, by their resources, if there are several."""
        known = self._issuer.known or ()
        return {resource: resource_name(resource) for resource in known} if len(known) > 1 else {}

    def _by_server(self, grants: list[LiveGrant]) -> list[tuple[str, list[LiveGrant]]]:
        """Return grants under the name of their server, in the order of the servers; all under "" if there is one."""
        servers = self._servers()
        if not servers:
            return [("", grants)]
        own = next(iter(servers))
        placed = [(known_as(grant.resource, servers) or own, grant) for grant in grants]
        grouped = [(name, [grant for of, grant in placed if of == server]) for server, name in servers.items()]
        return [(name, listed) for name, listed in grouped if listed]

    def _token_choices(self, tools: Tools) -> Choices:
        server = self._issuer.scopes
        return choices_of(list(server.valid or ()), (), server, self._wording.scope_descriptions, tools, ticked=())

    def _choices(self, grant: LiveGrant, tools: Tools) -> Choices:
        server = self._issuer.scopes
        offered = [scope for scope in server.valid or () if grant.ceiling is None or scope in grant.ceiling]
        return choices_of(grant.scopes, offered, server, self._wording.scope_descriptions, tools)

    def _described(self, grant: LiveGrant, tools: Tools) -> dict[str, Any]:
        since, used = utc(grant.granted_at), utc(grant.last_used_at)
        unused = is_personal(grant.client_id) and grant.used_at is None
        return {
            "grant_id": grant.grant_id.hex(),
            "name": app_name(grant.client_name),
            "hosts": "a personal token"
            if is_personal(grant.client_id)
            else ", ".join(grant.hosts) or "a program without a browser",
            "expires": _expiry(grant) if is_personal(grant.client_id) else "",
            "scopes": self._scopes_in_words(grant),
            "choices": self._choices(grant, tools if self._issuer.is_own(grant.resource) else {}),
            "had": " ".join(grant.scopes),
            "subject": short_line(grant.subject or ""),
            "since": f"{since.day} {since:%B %Y}",
            "since_iso": since.isoformat(),
            "used": "never" if unused else f"{used.day} {used:%B %Y, %H:%M} UTC",
            "used_iso": "" if unused else used.isoformat(),
        }

    def _scopes_in_words(self, grant: LiveGrant) -> list[str]:
        server = self._issuer.scopes
        if not set(server.required) <= set(grant.scopes):
            return ["nothing: it lacks a permission that this server requires of every app"]
        if server.valid and not grant.scopes:
            return ["use what needs no permission"]
        return scopes_in_words(grant.scopes, self._wording.scope_descriptions)

    def _to_page(self) -> Response:
        return RedirectResponse(self._url, 303, headers={"Cache-Control": "no-store"})

    async def _shown(self, user: str) -> dict[str, Any]:
        """Return what the templates need to show the ways in which this user can confirm."""
        shown = await self._sign_in.shown(self._approver)
        ways = [name for name in shown["ways"] if name != PASSWORD or user in self._sign_in.ways[PASSWORD].users]
        return {**shown, "ways": ways}

    async def _browsers(self, user: str) -> list[Browser]:
        """Return the browsers in which a user stays signed in to this server."""
        listed = await self._issuer.store.read(sessions.browsers, int(time.time()))
        return [browser for browser in listed if browser.user == user and self._issuer.is_ours(browser.resource)]

    async def _sign_out_everywhere(self, user: str) -> None:
        by = f"{user}, on the page of apps"
        await self._issuer.store.write(sessions.sign_out_everywhere, self._issuer, user, by=by)

    async def _create(self, user: str, form: Form) -> tuple[str, str, str]:
        """Create a personal token. Return a message, the name that begins it, and the token, which is shown once."""
        ticked, choices = form.getlist("scope"), self._token_choices({})
        scopes = choices.chosen(ticked) if choices else list(self._issuer.scopes.required)
        if scopes is None or (choices and not scopes):
            raise OAuthStoreError("choose at least one permission")
        try:
            resource = self._issuer.target(form.get("resource"))
        except UnknownResourceError as error:
            raise OAuthStoreError("this server issues no tokens for that one") from error
        token = await self._issuer.store.write(
            create_token,
            form.get("name", ""),
            scopes,
            form.get("expires", ""),
            subject=user,
            resource=resource,
            by=f"{user}, on the page of apps",
        )
        where = resource_name(resource) if self._servers() and resource else "this server"
        return f"can use {where} with this token. Copy it now: it cannot be shown again.", token.name, token.text

    async def _save(self, user: str, choice: str, ticked: list[str], shown: str | None) -> tuple[str, str]:
        """Change what a grant allows. Return a message, and the name of the app that begins it.

        `shown` are the scopes that the grant had when the page was shown, or None from a template that does not say: an
        old page must not give back what was taken away since.
        """
        store, subject, known = self._issuer.store, self._sign_in.sees(user), self._issuer.known
        grant_id = _grant_id(choice)
        listed, _ = await store.read(live_grants, grant_id=grant_id, subject=subject, resources=known)
        if grant_id is None or not listed:
            return "It was already revoked.", ""
        choices, present = self._choices(listed[0], {}), set(listed[0].scopes)
        scopes = choices.chosen(ticked)
        if not scopes:
            raise OAuthStoreError("choose at least one permission, or revoke the app")
        had = set() if shown is None else set(shown.split())
        saved = {choice.scope for choice in choices if choice.scope in present} == set(scopes)  # by an earlier click
        if shown is not None and had != present and not saved:
            raise OAuthStoreError("this page was out of date; check the permissions, and save again")
        changed = await store.write(
            change_scopes,
            grant_id,
            add=[scope for scope in scopes if scope not in had],
            remove=[choice.scope for choice in choices if choice.scope not in scopes],
            subject=subject,
            resources=known,
            by=f"{user}, on the page of apps",
            now=int(time.time()),
        )
        if changed is None:
            return "It was already revoked.", ""
        return "can do what you chose, from its next call on.", app_name(listed[0].client_name)

    async def _revoke(self, user: str, choice: str) -> tuple[str, str]:
        """End one grant or all of them. Return a message, and the name of the app that begins it."""
        store, now = self._issuer.store, int(time.time())
        subject, known = self._sign_in.sees(user), self._issuer.known
        if choice == "all":
            ended = len(await store.write(end_all, subject, known, by=user, now=now))
            return f"{ended} app{' no longer has' if ended == 1 else 's no longer have'} access.", ""
        grant_id = _grant_id(choice)
        if not grant_id:
            raise OAuthStoreError("no app was named")
        grant = await store.write(end_one, grant_id, subject, known, by=user, now=now)
        if grant is None:
            return "It was already revoked.", ""
        return "no longer has access.", app_name(grant.client_name)


def _is_fresh(signed_in: SignedIn) -> bool:
    """Return whether a user has just come back from an identity provider."""
    return signed_in.way == ACCOUNT and signed_in.at is not None and time.time() - signed_in.at < FRESH_SECONDS


def _grant_id(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _expiry(grant: LiveGrant) -> str:
    at = utc(grant.expires_at)
    return "never" if grant.expires_at >= NO_EXPIRY else f"{at.day} {at:%B %Y}"
