"""The provider: every step of the OAuth flows is guard clauses, one transaction, and the answer."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastmcp.server import auth as fastmcp_auth
from fastmcp.server.auth import AccessToken, OAuthProvider
from fastmcp.server.auth.redirect_validation import build_client_redirect
from mcp.server.auth.provider import (
    AuthorizationCode,
    AuthorizationParams,
    AuthorizeError,
    RefreshToken,
    RegistrationError,
    TokenError,
)
from mcp.server.auth.settings import ClientRegistrationOptions, RevocationOptions
from mcp.shared.auth import InvalidScopeError, OAuthClientInformationFull, OAuthToken
from pydantic import AnyHttpUrl, AnyUrl
from sqlalchemy import Row, Select, bindparam, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from oauth_store.approval import (
    REQUEST_EXPIRY_SECONDS,
    Approval,
    AuthorizationRequest,
    current_request,
    default_approval,
)
from oauth_store.browser import Cookies, request_cookie
from oauth_store.credentials import hash_secret, matches, mint, mint_grant_id, seal
from oauth_store.database import schema
from oauth_store.database.models import CLIENT_ID_LENGTH, NEVER, Client, clients, tokens
from oauth_store.database.purge import Purger
from oauth_store.database.sqlite import FIRST, SEND
from oauth_store.database.store import Database, flow_step
from oauth_store.errors import ConfigurationError, DatabaseUnavailable, OAuthStoreError
from oauth_store.events import emit, emit_after_commit
from oauth_store.flows import authorization as authorizations
from oauth_store.flows import tokens as grants
from oauth_store.flows.clients import OFFLINE_ACCESS, ServerScopes, Standing, StoredClient, is_owners, is_scope
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.metadata_documents import DocumentUnavailableError, InvalidDocumentError, MetadataDocuments
from oauth_store.flows.registration import check_registration, store_registration
from oauth_store.pages.html import plain_pages
from oauth_store.rate_limits import FloodGuard, RateLimits
from oauth_store.server import routes as endpoints
from oauth_store.server.middleware import ChallengeMiddleware, OutageMiddleware
from oauth_store.urls import check_public_url, is_for, same_resource

logger = logging.getLogger("oauth_store")

STATE_LENGTH = 8 * 1024
CODE_CHALLENGE = r"[A-Za-z0-9_-]{43}"
"""RFC 7636, section 4.2."""

_client_by_id = select(clients).where(clients.c.client_id == bindparam("b_client_id"))
_token_by_hash = select(tokens).where(tokens.c.token_hash == bindparam("b_hash")).execution_options(**{SEND: FIRST})


class SQLAlchemyOAuthProvider(OAuthProvider):
    """An OAuth 2.1 authorization server for FastMCP that keeps its state in a database.

    In place of `InMemoryOAuthProvider`::

        mcp = FastMCP("wiki", auth=SQLAlchemyOAuthProvider(base_url="https://wiki.example.com"))
    """

    def __init__(
        self,
        database: str | Path | AsyncEngine | None = None,
        *,
        base_url: AnyHttpUrl | str,
        resource_base_url: AnyHttpUrl | str | None = None,
        issuer_url: AnyHttpUrl | str | None = None,
        service_documentation_url: AnyHttpUrl | str | None = None,
        client_registration_options: ClientRegistrationOptions | None = None,
        revocation_options: RevocationOptions | None = None,
        required_scopes: list[str] | None = None,
        approval: Approval | None = None,
        authorization_code_expiry_seconds: int = 600,
        access_token_expiry_seconds: int = 3600,
        refresh_token_expiry_seconds: int = 30 * 24 * 3600,
        refresh_grace_seconds: int = 120,
        rate_limits: RateLimits | None = None,
        trusted_proxies: Sequence[str] = (),
        metadata_documents: bool = True,
    ) -> None:
        """Check the settings. The database is opened at first use, and may not exist before.

        Args:
            database: A file's path, ":memory:", or a SQLAlchemy URL; or an AsyncEngine, which is used as it is and
                never disposed. None reads MCP_OAUTH_DB, else it is "mcp_oauth.db" in the working directory.
            base_url: The public URL of the server; this and the next six mean what they mean for `OAuthProvider`.
            client_registration_options: None switches registration on.
            revocation_options: None switches revocation on.
            approval: Who may let a client in. None is `PasswordApproval()` where MCP_OAUTH_PASSWORD_HASH is set; else
                it lets in clients on this machine, if all URLs are loopback.
            authorization_code_expiry_seconds: From the approval to the exchange of the code.
            access_token_expiry_seconds: From one refresh to the next.
            refresh_token_expiry_seconds: From the last refresh.
            refresh_grace_seconds: How long a refresh token that was just used is answered with the same pair again,
                at most the access token's lifetime. 0 never answers twice.
            rate_limits: How many registrations and authorization requests are accepted. None is generous.
            trusted_proxies: Addresses or networks whose X-Forwarded-For is believed, where uvicorn does not see to it.
            metadata_documents: Whether clients may be named by the URL of their metadata document, which this server
                then fetches. False where it cannot: clients register then. Those already stored go on.

        Raises:
            ConfigurationError: If a setting is missing, contradictory or not usable.
        """
        for name, url in (
            ("base_url", base_url),
            ("resource_base_url", resource_base_url),
            ("issuer_url", issuer_url),
            ("service_documentation_url", service_documentation_url),
        ):
            if url is not None:
                check_public_url(name, url)
        for name, seconds, least in (
            ("authorization_code_expiry_seconds", authorization_code_expiry_seconds, 1),
            ("access_token_expiry_seconds", access_token_expiry_seconds, 1),
            ("refresh_token_expiry_seconds", refresh_token_expiry_seconds, 1),
            ("refresh_grace_seconds", refresh_grace_seconds, 0),
        ):
            if isinstance(seconds, bool) or not isinstance(seconds, int) or seconds < least:
                raise ConfigurationError(f"{name} is {seconds!r}; expected a whole number of seconds, {least} or more")
        super().__init__(
            base_url=base_url,
            resource_base_url=resource_base_url,
            issuer_url=issuer_url,
            service_documentation_url=service_documentation_url,
            client_registration_options=client_registration_options or ClientRegistrationOptions(enabled=True),
            revocation_options=revocation_options or RevocationOptions(enabled=True),
            required_scopes=required_scopes,
        )
        self._database = Database(database, schema.prepare)
        self._purger = Purger(self._database)
        self._documents = MetadataDocuments() if metadata_documents else None
        self._flood_guard = FloodGuard(rate_limits or RateLimits(), trusted_proxies)
        urls = [str(url) for url in (self.base_url, self.resource_base_url, self.issuer_url) if url is not None]
        self._approval = approval if approval is not None else default_approval(urls)
        self._cookies = Cookies(str(self.base_url))
        self._code_expiry = authorization_code_expiry_seconds
        self._access_expiry = access_token_expiry_seconds
        self._refresh_expiry = refresh_token_expiry_seconds
        self._grace = min(refresh_grace_seconds, access_token_expiry_seconds)

    async def check_schema(self) -> None:
        """Open the database now, rather than at the first request. Meant for a server's lifespan.

        Raises `SchemaError` or `DatabaseUnavailable`, which say what to do.
        """
        await self._database.ready()

    async def aclose(self) -> None:
        """Finish the steps under way and close all connections. The provider opens them again if it is used again."""
        await self._database.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Clients

    @flow_step
    async def get_client(self, client_id: str) -> StoredClient | None:
        """Return a registered client, or None."""
        if not _is_client_id(client_id):
            return None
        row = await self._database.read().run(grants.lookup, _client_by_id, b_client_id=client_id)
        if row is None or row.client_id != client_id:  # MariaDB pads: 'abc ' equals 'abc'
            return None
        limited = row.last_used_at == NEVER or is_owners(row.client_metadata)
        return self._client(row, limited=limited)

    def _client(self, row: Row[Any], *, limited: bool = False) -> StoredClient:
        standing = Standing(row.client_secret_hash, self._scopes, limited)
        return StoredClient.load(row.client_metadata, standing)

    def _presented(
        self, session: Session, which: Select[Any], client_id: str, secret: str, now: int
    ) -> tuple[StoredClient | None, Row[Any] | None]:
        """Return a registered client, or None; and the row of a code or token of that client, or None."""
        if not _is_client_id(client_id):
            return None, None
        row = grants.lookup(session, which, b_client_id=client_id, b_hash=hash_secret(secret), b_now=now)
        if row is None or row.registered_id != client_id:
            return None, None
        return self._client(row), row if row.client_id == client_id else None

    @flow_step
    async def register_client(self, client_info: OAuthClientInformationFull) -> None:
        """Store a registration (RFC 7591), or replace the one of the same client_id. Its secret is stored as a hash.

        Raises `RegistrationError`.
        """
        check_registration(client_info)
        refused = [scope for scope in (client_info.scope or "").split() if not self._is_valid(scope)]
        if refused:
            raise RegistrationError("invalid_client_metadata", f"scopes not valid here: {' '.join(refused)}")
        await store_registration(self._database, client_info)
        emit("client_registered", client_id=client_info.client_id)
        self._purger.nudge()

    async def find_client(self, client_id: str) -> StoredClient | None:
        """Return the client of an authorization request, or None if it is unknown.

        A client whose client_id is the URL of a metadata document is looked up there, and stored: /token and /revoke
        ask the database alone, so that nobody can make this server fetch there, and a refresh works while the
        document's host is away.

        Raises `InvalidDocumentError`; `DocumentUnavailableError` where there is no stored client to go on with; and
        `OverLimitError` where there are too many new ones.
        """
        stored = await self.get_client(client_id)
        documents = self._documents
        if documents is None or len(client_id) > CLIENT_ID_LENGTH or not documents.names(client_id):
            return stored
        request = current_request.get()
        try:
            described = await documents.fetch(client_id, "" if request is None else self.address_of(request))
        except InvalidDocumentError as error:
            logger.warning("client metadata document %s is not usable: %s", client_id, error)
            if stored is not None and stored.redirect_uris:
                await self._withdraw(stored)
            raise
        except DocumentUnavailableError as error:
            logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
            if stored is None or not stored.redirect_uris:
                raise
            return stored
        if described.scope is not None:  # the document is for other servers too
            described.scope = " ".join(filter(self._is_valid, described.scope.split())) or None
        if stored is None and request is not None:
            self._flood_guard.count_document(request)
        if stored is None or stored.model_dump() != described.model_dump():
            await self.register_client(described)
        return await self.get_client(client_id)

    @flow_step
    async def _withdraw(self, client: StoredClient) -> None:
        """Keep a client for the grants that it has, without a redirect URI: it gets no more until its document is good.

        Otherwise an outage of the document's host would bring back what the document took away.
        """
        withdrawn = client.model_copy(update={"redirect_uris": None})
        metadata = withdrawn.model_dump_json(exclude={"client_secret"}, exclude_none=True)
        withdraw = update(Client).where(Client.client_id == client.client_id).values(client_metadata=metadata)
        await self._database.write().run(Session.execute, withdraw)

    # Authorization

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        """Store the request, and return the URL that the approval sends the browser to (RFC 6749, section 4.1.1).

        Raises `AuthorizeError`.
        """
        resource = self._own_resource
        if params.resource is not None and resource is not None and not same_resource(params.resource, resource):
            raise AuthorizeError("invalid_target", "resource is not this server")
        if len(params.state or "") > STATE_LENGTH or "\0" in (params.state or ""):
            raise AuthorizeError("invalid_request", f"state has more than {STATE_LENGTH} characters, or a NUL")
        if not re.fullmatch(CODE_CHALLENGE, params.code_challenge):
            raise AuthorizeError("invalid_request", "code_challenge is not one of S256: 43 characters of base64url")
        if not isinstance(client, StoredClient):
            client = StoredClient.load(client.model_dump_json(), Standing(scopes=self._scopes))
        try:
            scopes = client.validate_scope(" ".join(params.scopes or ())) or []
        except InvalidScopeError as error:
            raise AuthorizeError("invalid_scope", error.message) from error
        now = int(time.time())
        request = AuthorizationRequest(
            handle=mint("request"),
            client=client,
            redirect_uri=str(params.redirect_uri),
            scopes=scopes,
            resource=resource or params.resource,
            expires_at=now + REQUEST_EXPIRY_SECONDS,
        )
        browser = mint("browser")
        await self._store_request(request, params, browser, now)
        http_request = current_request.get()
        if http_request is not None:
            http_request.state.started = (request.handle, browser)  # for the endpoint to set the cookie
        return await self._approval.authorize(self, request)

    @flow_step
    async def _store_request(
        self, request: AuthorizationRequest, params: AuthorizationParams, browser: str, now: int
    ) -> None:
        grant_id = mint_grant_id()
        asked = {
            "handle_hash": hash_secret(request.handle),
            "browser_hash": hash_secret(browser),
            "client_id": request.client.client_id,
            "grant_id": grant_id,
            "redirect_uri": request.redirect_uri,
            "redirect_uri_provided_explicitly": params.redirect_uri_provided_explicitly,
            "code_challenge": params.code_challenge,
            "scopes": " ".join(request.scopes),
            "resource": request.resource,
            "state": params.state,
            "created_at": now,
            "expires_at": request.expires_at,
        }
        await self._database.write().run(Session.execute, authorizations.insert_request, asked)
        emit("approval_asked", grant_id=grant_id, client_id=request.client.client_id)
        self._purger.nudge()

    async def pending(self, handle: str, request: Request) -> AuthorizationRequest | None:
        """Return a request that may still be answered, or None.

        None too where `request`, of the browser that asks for it, lacks the cookie that /authorize gave to the browser
        that started it: anyone can start a request and send its link to the owner.
        """
        browser = self._cookies.get(request, request_cookie(handle))
        row = await self._pending_row(handle)
        if row is None or row.browser_hash is None or browser is None or not matches(browser, row.browser_hash):
            return None
        client = await self.get_client(row.client_id)
        if client is None:
            return None
        return AuthorizationRequest(
            handle=handle,
            client=client,
            redirect_uri=row.redirect_uri,
            scopes=row.scopes.split(),
            resource=row.resource,
            expires_at=row.expires_at,
        )

    @flow_step
    async def _pending_row(self, handle: str) -> Row[Any] | None:
        return await self._database.read().run(authorizations.pending, handle, self._own_resource, int(time.time()))

    @flow_step
    async def approve(self, handle: str, *, subject: str | None = None) -> str:
        """Approve a request, and return the URL that takes the browser, and the code, back to the client.

        Called again before the code was used, it replaces the code. `subject` names who approved; every token carries
        it. Raises `AuthorizeError` if the request is unknown, expired, denied, or its code was used.
        """
        now = int(time.time())
        code = mint("code")
        expires_at = now + self._code_expiry
        row = await self._database.write().run(
            authorizations.approve, handle, code, self._own_resource, subject=subject, expires_at=expires_at, now=now
        )
        emit("approval_granted", grant_id=row.grant_id, client_id=row.client_id, subject=subject)
        return self._redirect(row, code=code)

    @flow_step
    async def deny(self, handle: str) -> str:
        """Deny a request, and return the URL that tells the client so (RFC 6749, section 4.1.2.1).

        Raises `AuthorizeError` if the request is unknown, expired, denied, or its code was used.
        """
        now = int(time.time())
        row = await self._database.write().run(authorizations.deny, handle, self._own_resource, now)
        emit("approval_denied", grant_id=row.grant_id, client_id=row.client_id)
        return self._redirect(row, error="access_denied", error_description="the owner of this server said no")

    def _redirect(self, row: Row[Any], **params: str) -> str:
        if row.state is not None:
            params["state"] = row.state
        return build_client_redirect(row.redirect_uri, params, iss=str(self.issuer_url))

    # Codes

    @flow_step
    async def load_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: str
    ) -> AuthorizationCode | None:
        """Return an approved code of this client until it expires, or None.

        A consumed one too: the handler checks client, redirect_uri and PKCE, only then the exchange sees the replay.
        """
        parameters = {"b_hash": hash_secret(authorization_code), "b_now": int(time.time())}
        row = await self._database.read().run(grants.lookup, grants.code_by_hash, **parameters)
        if row is None or row.client_id != client.client_id:
            return None
        return _authorization_code(authorization_code, row)

    async def exchange_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: AuthorizationCode
    ) -> OAuthToken:
        """Exchange a code for a token pair, once (RFC 6749, section 4.1.3). A second time it ends the grant.

        Raises `TokenError`.
        """
        return await self._exchange_authorization_code(client.client_id, authorization_code.code, _anyone, _any_code)

    @flow_step
    async def _exchange_authorization_code(
        self,
        client_id: str,
        presented: str,
        admit: Callable[[StoredClient | None], None],
        check: Callable[[AuthorizationCode], None],
    ) -> OAuthToken:
        """Look the client up, load a code and exchange it in one step, which spares /token two.

        `admit` is given the client, or None, and raises unless it may come in; `check` is given the code, and raises
        unless it may be exchanged.
        """
        now = int(time.time())

        def exchange(session: Session) -> tuple[OAuthToken | None, Row[Any]]:
            client, row = self._presented(session, grants.client_and_code, client_id, presented, now)
            admit(client)
            if client is None:  # or the database would say so
                raise TokenError("invalid_client", "the client is not registered any more")
            if row is None:
                raise TokenError("invalid_grant", "the authorization code is unknown or expired")
            code = _authorization_code(presented, row)
            check(code)
            if not self._is_ours(code.resource):
                raise TokenError("invalid_grant", "the code is for another resource")
            if row.consumed_at is None:
                grants.consume_code(session, row, now)
                pair = grants.Pair.mint(with_refresh_token="refresh_token" in client.grant_types)
                return self._issue(session, pair, row, code.scopes, now), row
            emit_after_commit(
                session, "code_replayed", grant_id=row.grant_id, client_id=row.client_id, subject=row.subject
            )
            revoke_grants(session, [row.grant_id], "code replayed", now)
            return None, row

        try:
            issued, row = await self._database.write().run(exchange)
        except IntegrityError as error:
            raise TokenError("invalid_client", "the client is not registered any more") from error
        if issued is None:
            raise TokenError("invalid_grant", "the authorization code was used already")
        emit("tokens_issued", grant_id=row.grant_id, client_id=row.client_id, subject=row.subject)
        return issued

    # Tokens

    @flow_step
    async def load_refresh_token(self, client: OAuthClientInformationFull, refresh_token: str) -> RefreshToken | None:
        """Return a refresh token of this client, or None. A consumed one too, so that its exchange can decide."""
        parameters = {"b_hash": hash_secret(refresh_token), "b_now": int(time.time())}
        row = await self._database.read().run(grants.lookup, grants.known_refresh_token, **parameters)
        if row is None or row.client_id != client.client_id:
            return None
        return RefreshToken(
            token=refresh_token,
            client_id=row.client_id,
            scopes=row.scopes.split(),
            expires_at=row.expires_at,
            resource=row.resource,
            subject=row.subject,
        )

    async def exchange_refresh_token(
        self, client: OAuthClientInformationFull, refresh_token: RefreshToken, scopes: list[str]
    ) -> OAuthToken:
        """Rotate a refresh token (RFC 6749, section 6). Every answer to one refresh token is the same answer.

        Raises `TokenError`: always `invalid_grant` for a dead refresh token, since any other code strands clients.
        """
        return await self._refresh(client.client_id, refresh_token.token, _anyone, lambda _granted, _resource: scopes)

    @flow_step
    async def _refresh(
        self,
        client_id: str,
        presented: str,
        admit: Callable[[StoredClient | None], None],
        narrowed: Callable[[list[str], str | None], list[str]],
        address: str | None = None,
    ) -> OAuthToken:
        """Look the client up, load a refresh token and exchange it in one step, which spares /token two.

        `admit` is given the client, or None, and raises unless it may come in; `narrowed` is given the scopes and the
        resource of the token, and returns the scopes to grant, or raises. `address` is for the log.
        """
        now = int(time.time())

        def rotate(session: Session) -> tuple[OAuthToken | None, Row[Any]]:
            client, row = self._presented(session, grants.client_and_refresh_token, client_id, presented, now)
            admit(client)
            if row is None:
                raise TokenError("invalid_grant", "the refresh token is unknown, expired or revoked")
            granted = row.scopes.split()
            scopes = narrowed(granted, row.resource)
            if not set(scopes) <= set(granted):
                raise TokenError("invalid_scope", "the scopes exceed those that were granted")
            if not self._is_ours(row.resource):
                raise TokenError("invalid_grant", "the refresh token is for another resource")
            if row.consumed_at is not None:
                again = grants.answer_again(
                    session, presented, row, scopes, grace=self._grace, now=now, address=address
                )
                return again, row
            pair = grants.Pair.mint(with_refresh_token=True)
            replay = seal(presented, pair.access_token, str(pair.refresh_token)) if self._grace else None
            grants.consume_refresh_token(session, row, replay, now)
            granted_at = row.granted_at or row.created_at
            return self._issue(session, pair, row, scopes, now, granted_at=granted_at), row

        issued, row = await self._database.write().run(rotate)
        if issued is None:
            raise TokenError("invalid_grant", "the refresh token was used already")
        if row.consumed_at is None:
            told = {"grant_id": row.grant_id, "client_id": row.client_id, "subject": row.subject}
            emit("tokens_refreshed", **told, address=address)
        return issued

    def _issue(
        self,
        session: Session,
        pair: grants.Pair,
        grant: Row[Any],
        scopes: list[str],
        now: int,
        *,
        granted_at: int | None = None,
    ) -> OAuthToken:
        self._purger.nudge()
        return grants.issue(
            session,
            pair,
            grant,
            scopes=scopes,
            resource=grant.resource or self._own_resource,
            granted_at=granted_at,
            now=now,
            access_expiry=self._access_expiry,
            refresh_expiry=self._refresh_expiry,
        )

    async def load_access_token(self, token: str) -> AccessToken | None:
        """Return a live access token, or None. It has no side effects: the revocation endpoint calls it too."""
        row = await self._live_access_token(token)
        return None if row is None else AccessToken(token=token, **_fields(row))

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return a live access token that was issued for this server (RFC 8707), or None."""
        verified = self._database.verified
        known = verified.recall(hash_secret(token)) if verified is not None else None
        if known is None or known["expires_at"] <= time.time():
            try:
                row = await self._live_access_token(token)
            except OAuthStoreError as error:
                raise _Unverifiable(*error.args) from error
            if row is None:
                return None
            known = _fields(row)
            if row.first_used_at is None and self._is_ours(row.resource):
                self._database.start(lambda: self._stamp_first_use(row), "stamp_first_use")
        return AccessToken(token=token, **known) if self._is_ours(known["resource"]) else None

    @flow_step
    async def _live_access_token(self, token: str) -> Row[Any] | None:
        parameters = {"b_hash": hash_secret(token), "b_now": int(time.time())}
        verified = self._database.verified
        version = verified.version() if verified is not None else None  # before the row: see Memory.remember
        row = await self._database.read().run(grants.lookup, grants.live_access_token, **parameters)
        if verified is not None and row is not None and row.first_used_at is not None:
            verified.remember(row.token_hash, _fields(row), version)
        return row

    async def _stamp_first_use(self, row: Row[Any]) -> None:
        await self._database.write().run(grants.stamp_first_use, row, int(time.time()))

    async def revoke_token(self, token: AccessToken | RefreshToken) -> None:
        """End the grant of a token (RFC 7009): the pair, everything rotated from it, and its code."""
        await self._revoke_token(token.client_id, token.token)

    @flow_step
    async def _revoke_token(self, client_id: str, presented: str) -> None:
        """End the grant of a token of this client and this server, whether the token is live, consumed or expired.

        An unknown one is revoked already (RFC 7009, section 2.2).
        """

        def revoke(session: Session) -> Row[Any] | None:
            row = grants.lookup(session, _token_by_hash, b_hash=hash_secret(presented))
            if row is None or row.client_id != client_id or row.revoked_at is not None:
                return None
            if not self._is_ours(row.resource):
                return None
            revoke_grants(session, [row.grant_id], "revoked by the client", int(time.time()))
            return row

        row = await self._database.write().run(revoke)
        if row is not None:
            emit("revoked", grant_id=row.grant_id, client_id=row.client_id, by="the client")

    # The server around it

    def set_mcp_path(self, mcp_path: str | None) -> None:
        """Learn where the MCP endpoint is, and so the resource that tokens are for. A known path is never unset."""
        if mcp_path is not None or self._mcp_path is None:
            super().set_mcp_path(mcp_path)

    @property
    def _own_resource(self) -> str | None:
        return None if self._mcp_path is None else str(self._resource_url)

    def _is_ours(self, resource: str | None) -> bool:
        return is_for(resource, self._own_resource)

    @property
    def _registration_options(self) -> ClientRegistrationOptions:
        return self.client_registration_options or ClientRegistrationOptions()

    @property
    def _server_scopes(self) -> list[str]:
        options = self._registration_options
        return options.default_scopes or options.valid_scopes or self.required_scopes

    @property
    def _scopes(self) -> ServerScopes:
        valid = self._registration_options.valid_scopes
        every = None if valid is None else dict.fromkeys([*valid, *self._server_scopes])
        return ServerScopes(self._server_scopes, self.required_scopes, every)

    def _is_valid(self, scope: str) -> bool:
        valid = self._registration_options.valid_scopes
        return is_scope(scope) and (valid is None or scope in valid or scope == OFFLINE_ACCESS)

    @property
    def scopes_supported(self) -> list[str]:
        """The scopes of the protected resource: `offline_access` is for the authorization server alone.

        None where there are none: an empty list is left out of the metadata (RFC 9728, section 3.2).
        """
        scopes = [scope for scope in super().scopes_supported if scope != OFFLINE_ACCESS]
        return scopes or None  # type: ignore[return-value]  # FastMCP hands it on to where None is right

    def public_url(self, path: str) -> str:
        """Return the URL of a path of this server, as browsers reach it."""
        return f"{str(self.base_url).rstrip('/')}{path}"

    @property
    def public_name(self) -> str:
        """What people call the server where its owner has not named it: host and path of its URL."""
        return self.public_url("").partition("//")[2]

    def address_of(self, request: Request) -> str:
        """Return the address that sent a request: the peer's, or what `trusted_proxies` say of it."""
        return self._flood_guard.address(request)

    def message_page(
        self, title: str, text: str, detail: str, status_code: int, headers: Mapping[str, str]
    ) -> Response:
        """Return a page that tells a person what is wrong, in the look of the approval's pages."""
        pages = getattr(self._approval, "pages", None) or plain_pages()
        return pages.message(
            title, *filter(None, (text, detail)), server=self.public_name, status_code=status_code, headers=headers
        )

    @property
    def takes_documents(self) -> bool:
        """Whether clients may be named by the URL of their metadata document."""
        return self._documents is not None

    @property
    def expiry_seconds(self) -> tuple[int, int]:
        """How long an access token and a refresh token are good for."""
        return self._access_expiry, self._refresh_expiry

    def get_routes(self, mcp_path: str | None = None) -> list[Route]:
        """Return FastMCP's routes, with ours where its handlers fall short, and those of the approval's pages."""
        return endpoints.replace_routes(self, super().get_routes(mcp_path))

    def get_middleware(self) -> list[Middleware]:
        """Return FastMCP's middleware between ours: for outages, which are 503, and for all that lacks a token: 401."""
        return [
            Middleware(OutageMiddleware),
            *super().get_middleware(),
            Middleware(ChallengeMiddleware, is_protected=lambda path: path == self._mcp_path),
        ]


def _anyone(_client: StoredClient | None) -> None:
    """Admit whom the SDK's handlers have admitted."""


def _any_code(_code: AuthorizationCode) -> None:
    """Accept what the SDK's handlers have accepted."""


def _is_client_id(client_id: str) -> bool:
    return len(client_id) <= CLIENT_ID_LENGTH and "\0" not in client_id  # PostgreSQL has no text with a NUL


def _authorization_code(presented: str, row: Row[Any]) -> AuthorizationCode:
    return AuthorizationCode(
        code=presented,
        client_id=row.client_id,
        redirect_uri=AnyUrl(row.redirect_uri),
        redirect_uri_provided_explicitly=row.redirect_uri_provided_explicitly,
        code_challenge=row.code_challenge,
        scopes=row.scopes.split(),
        expires_at=row.expires_at,
        resource=row.resource,
        subject=row.subject,
    )


_VerificationError: Any = getattr(fastmcp_auth, "TokenVerificationError", RuntimeError)
"""What `MultiAuth` does not swallow. FastMCP has it from 4.2 on."""


class _Unverifiable(DatabaseUnavailable, _VerificationError):  # type: ignore[misc]  # a class of Any
    """An outage, inside `MultiAuth` too: a token of which nothing is known is not refused."""


def _fields(row: Row[Any]) -> dict[str, Any]:
    """Return what an `AccessToken` says beside the token itself."""
    return {
        "client_id": row.client_id,
        "scopes": row.scopes.split(),
        "expires_at": row.expires_at,
        "resource": row.resource,
        "subject": row.subject,
    }
