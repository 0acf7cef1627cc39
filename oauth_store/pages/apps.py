"""The connected apps: what may use the server, since when; and the buttons that end it."""

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, insert, select
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from oauth_store.browser import Cookies, form_of, from_our_page
from oauth_store.credentials import derive, hash_secret, mint, mint_grant_id, same
from oauth_store.database.models import SESSION, Token
from oauth_store.database.store import flow_step
from oauth_store.display import moment, shown, shown_name
from oauth_store.events import emit
from oauth_store.flows.connected import Connection, GrantName, grants_to_end, live_grants, revoke_grants
from oauth_store.pages.consent import scopes_in_words
from oauth_store.pages.sign_in import SignInError
from oauth_store.urls import is_for

if TYPE_CHECKING:
    from oauth_store.pages.password import PasswordApproval
    from oauth_store.provider import SQLAlchemyOAuthProvider

SESSION_SECONDS = 15 * 60
SESSION_COOKIE = "oauth_store_session"
SHOWN = 200
"""Apps on the page: enough for people, and no more to render than a second's work."""

_session_by_hash = select(Token.subject, Token.resource).where(
    Token.token_hash == bindparam("b_hash"), Token.kind == SESSION, Token.expires_at > bindparam("b_now")
)


class AppsPage:
    """Lists the grants of who signs in, and revokes them.

    With one password that is all of them; with `users`, each sees the grants that they approved themselves. A session
    is a row of `oauth_tokens`, of a kind of its own, that lives for 15 minutes.
    """

    def __init__(self, provider: "SQLAlchemyOAuthProvider", approval: "PasswordApproval", path: str) -> None:
        self.path = path
        self._provider = provider
        self._database = provider._database
        self._approval = approval
        self._url = provider.public_url(path)
        self._cookies = Cookies(str(provider.base_url))

    async def handle(self, request: Request) -> Response:
        """Show the sign-in form or the list, or do what one of their forms says."""
        session = self._cookies.get(request, SESSION_COOKIE)
        user = await self._user(session) if session else None
        if user is None or session is None:
            return await self._sign_in(request) if request.method == "POST" else self._form()
        csrf = derive(session, "apps")
        if request.method != "POST":
            return await self._list(user, csrf)
        form = await form_of(request)
        if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):
            return self._approval.pages.message(
                "This did not come from our page",
                "Nothing was changed.",
                server=self._provider.public_name,
                status_code=403,
            )
        if form.get("sign_out"):
            await self._end(session)
            response = self._to_page()
            self._cookies.delete(response, SESSION_COOKIE)
            return response
        said, said_of = await self._revoke(user, form.get("revoke", ""))
        return await self._list(user, csrf, said=said, said_of=said_of)

    async def _sign_in(self, request: Request) -> Response:
        form = await form_of(request)
        if "password" not in form or not from_our_page(request, self._url):
            return self._form("You were signed out meanwhile. Sign in again.")
        try:
            user = await self._approval.sign_in.check(request, form, self._cookies, self._provider.address_of(request))
        except SignInError as error:
            return self._form(
                str(error),
                username=form.get("username", ""),
                status_code=error.status_code,
                headers=error.headers,
            )
        response = self._to_page()
        session = self._approval.sign_in.sign(user, mint("session"))
        await self._begin(session, user)
        self._cookies.set(response, SESSION_COOKIE, session, max_age_seconds=SESSION_SECONDS, samesite="strict")
        self._approval.sign_in.remember(response, self._cookies, user)
        return response

    def _form(self, error: str = "", *, username: str = "", status_code: int = 200, **options: Any) -> Response:
        return self._approval.pages.render(
            "sign_in.html",
            server=self._provider.public_name,
            title="Connected apps",
            action=self._url,
            error=error,
            username=username,
            asks_user=self._approval.sign_in.asks_user,
            status_code=status_code,
            **options,
        )

    async def _list(self, user: str, csrf: str, *, said: str = "", said_of: str = "") -> Response:
        connected, total = await self._connected(user)
        return self._approval.pages.render(
            "apps.html",
            server=self._provider.public_name,
            title="Connected apps",
            action=self._url,
            csrf=csrf,
            user=user,
            said=said,
            said_of=said_of,
            apps=[self._described(grant) for grant in connected],
            more=total - len(connected),
        )

    def _described(self, grant: Connection) -> dict[str, Any]:
        since, used = moment(grant.granted_at), moment(grant.last_used_at)
        return {
            "grant_id": grant.grant_id.hex(),
            "name": shown_name(grant.client_name),
            "hosts": ", ".join(grant.hosts),
            "scopes": scopes_in_words(grant.scopes, self._approval.scope_descriptions),
            "subject": shown(grant.subject or ""),
            "since": f"{since.day} {since:%B %Y}",
            "since_iso": since.isoformat(),
            "used": f"{used.day} {used:%B %Y, %H:%M} UTC",
            "used_iso": used.isoformat(),
        }

    def _to_page(self) -> Response:
        return RedirectResponse(self._url, 303, headers={"Cache-Control": "no-store"})

    def _subject(self, user: str) -> str | None:
        return user if self._approval.sign_in.asks_user else None

    # In the database

    @flow_step
    async def _begin(self, session: str, user: str) -> None:
        now = int(time.time())
        row = {
            "token_hash": hash_secret(session),
            "kind": SESSION,
            "grant_id": mint_grant_id(),
            "subject": user,
            "resource": self._provider._own_resource,
            "scopes": "",
            "created_at": now,
            "expires_at": now + SESSION_SECONDS,
        }
        async with self._database.write() as database:
            await database.execute(insert(Token).values(row))

    @flow_step
    async def _user(self, session: str) -> str | None:
        async with self._database.read() as database:
            rows = await database.execute(_session_by_hash, {"b_hash": hash_secret(session), "b_now": int(time.time())})
            row = rows.one_or_none()
        if row is None or not is_for(row.resource, self._provider._own_resource):
            return None
        return str(row.subject) if self._approval.sign_in.signed(row.subject, session) else None

    @flow_step
    async def _end(self, session: str) -> None:
        async with self._database.write() as database:
            await database.execute(delete(Token).where(Token.token_hash == hash_secret(session), Token.kind == SESSION))

    @flow_step
    async def _connected(self, user: str) -> tuple[list[Connection], int]:
        async with self._database.read() as database:
            return await live_grants(
                database, subject=self._subject(user), resource=self._provider._own_resource, limit=SHOWN
            )

    @flow_step
    async def _revoke(self, user: str, which: str) -> tuple[str, str]:
        """Return what to say of it, and the name of the app that this is said of."""
        subject, own, now = self._subject(user), self._provider._own_resource, int(time.time())
        name = ""
        async with self._database.write() as database:
            if which == "all":
                chosen = await grants_to_end(database, now, subject=subject, resource=own)
            else:
                try:
                    grant_id = bytes.fromhex(which)
                except ValueError:
                    return "Nothing was revoked.", ""
                listed, _ = await live_grants(database, subject=subject, grant_id=grant_id, resource=own)
                chosen = [GrantName(grant.grant_id, grant.client_id) for grant in listed]
                name = "".join(shown_name(grant.client_name) for grant in listed)
            await database.run_sync(
                revoke_grants, [grant.grant_id for grant in chosen], f"revoked on the page by {user}"[:64], now
            )
        for grant in chosen:
            emit("revoked", grant_id=grant.grant_id, client_id=grant.client_id, by=user)
        if which == "all":
            return f"{len(chosen)} app{' has' if len(chosen) == 1 else 's have'} no access any more.", ""
        return ("has no access any more.", name) if chosen else ("It was revoked already.", "")
