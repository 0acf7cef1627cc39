"""The provider: settings, FastMCP's methods, each a line or two of a flow, and its routes and pages."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from fastmcp.server.auth import AccessToken, OAuthProvider
from fastmcp.server.auth.identity_assertion import IdentityAssertion
from mcp.server.auth.provider import AuthorizationCode, AuthorizationParams, IdentityAssertionParams, RefreshToken
from mcp.server.auth.settings import ClientRegistrationOptions, RevocationOptions
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from pydantic import AnyHttpUrl
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from oauth_store.approval import AuthorizationRequest, AutoApproval, LoopbackApproval, request_of, start
from oauth_store.browser import Cookies, request_cookie
from oauth_store.database import ephemeral, schema
from oauth_store.database.purge import Purger
from oauth_store.database.store import Store
from oauth_store.flows import access, authorization, clients, code, identity, refresh, registration, revocation
from oauth_store.flows.clients import StoredClient
from oauth_store.flows.documented_clients import client_documents
from oauth_store.flows.issuer import Issuer, ServerScopes, check_seconds
from oauth_store.notifications import Notifier, Notify
from oauth_store.pages.default import DEVICE_PATH, check_asks, default_approval, device_page
from oauth_store.pages.html import Pages, plain_pages
from oauth_store.rate_limits import FloodGuard, RateLimits
from oauth_store.server.authorize import Server
from oauth_store.server.middleware import ChallengeMiddleware, OutageMiddleware
from oauth_store.server.routes import server_routes
from oauth_store.urls import canonical, check_public_urls, check_resources


class Approval(Protocol):
    """Decides whether a client gets access. Any object with this method works.

    It may also have a method `routes(provider)` that returns a list of Starlette routes: its pages, each with its own
    middleware. They are served next to /authorize and /token, and respond 503 while the database is unavailable.
    docs/approval.md has an example.
    """

    async def authorize(self, provider: "SQLAlchemyOAuthProvider", request: AuthorizationRequest) -> str:
        """Return the URL to send the browser to.

        This is a page of yours, which looks up the request with `provider.pending(handle, request)`, asks the owner,
        and then calls `provider.approve(handle, subject=...)` or `provider.deny(handle)`. To decide at once, return
        the result of one of these two instead.
        """
        ...


class SQLAlchemyOAuthProvider(OAuthProvider):
    """An OAuth 2.1 authorization server for FastMCP that keeps its state in a database.

    Use it in place of `InMemoryOAuthProvider`::

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
        device_authorization: bool = False,
        notify: Notify | None = None,
        identity_assertion: IdentityAssertion | None = None,
        resources: Sequence[str] = (),
    ) -> None:
        """Check the settings. The database is opened at first use, and need not exist before.

        Args:
            database: The path of a file, ":memory:", a SQLAlchemy URL, or an AsyncEngine, which is used as it is and
                never disposed. None reads MCP_OAUTH_DB; if that is not set, "mcp_oauth.db" in the working directory.
            base_url: The public URL of the server. This and the next six mean the same as for `OAuthProvider`.
            client_registration_options: None enables registration.
            revocation_options: None enables revocation.
            approval: Decides which clients get access. None means `OidcApproval()` if MCP_OAUTH_OIDC_ISSUER is set,
                `PasswordApproval()` if MCP_OAUTH_PASSWORD_HASH is; otherwise, if all URLs are loopback, clients on this
                machine get in without approval.
            authorization_code_expiry_seconds: Lifetime of a code, from its approval to its exchange.
            access_token_expiry_seconds: Lifetime of an access token; clients refresh this often.
            refresh_token_expiry_seconds: Lifetime of a refresh token, counted from the last refresh.
            refresh_grace_seconds: How long a refresh token that was just used gets the same pair again; at most the
                access token's lifetime. 0 never returns a pair twice.
            rate_limits: Limits on registrations and authorization requests. None means the generous defaults.
            trusted_proxies: Addresses or networks whose X-Forwarded-For is trusted, if uvicorn does not handle it.
            metadata_documents: Whether a client may name itself by the URL of its metadata document, which this server
                then fetches. Set False if it cannot: clients then register. Clients already stored keep working, but
                for those whose keys are at a URL.
            device_authorization: Whether devices without a browser can sign in: they show a code, which the owner
                types at /device (RFC 8628).
            notify: A URL that gets a JSON POST, or a function that gets a `Notification`, when an app is allowed or
                denied, a sign-in fails, a token is used again after its successor, or a personal token is created.
            identity_assertion: The identity providers that may sign users in (SEP-990). None means none.
            resources: The MCP endpoints of other servers for which this one issues tokens too, such as
                "https://files.example.com/mcp". They verify them with `StoreResource`, or ask at /introspect.

        Raises:
            ConfigurationError: If a setting is missing, contradictory or unusable.
        """
        check_public_urls(
            base_url=base_url,
            resource_base_url=resource_base_url,
            issuer_url=issuer_url,
            service_documentation_url=service_documentation_url,
        )
        check_resources(resources)
        check_seconds(
            authorization_code_expiry_seconds=authorization_code_expiry_seconds,
            access_token_expiry_seconds=access_token_expiry_seconds,
            refresh_token_expiry_seconds=refresh_token_expiry_seconds,
            refresh_grace_seconds=refresh_grace_seconds,
        )
        super().__init__(
            base_url=base_url,
            resource_base_url=resource_base_url,
            issuer_url=issuer_url,
            service_documentation_url=service_documentation_url,
            client_registration_options=client_registration_options or ClientRegistrationOptions(enabled=True),
            revocation_options=revocation_options or RevocationOptions(enabled=True),
            required_scopes=required_scopes,
        )
        ephemeral.is_intended()  # raises now, if its variable has a value that it cannot have
        self._store = Store(database, schema.prepare)
        self._documents = client_documents() if metadata_documents else None
        self._identities = identity.Identities.of(identity_assertion, str(self.issuer_url))
        self._flood_guard = FloodGuard(rate_limits or RateLimits(), trusted_proxies)
        urls = [str(url) for url in (self.base_url, self.resource_base_url, self.issuer_url) if url is not None]
        self._approval = approval if approval is not None else default_approval(urls)
        self.cookies = Cookies(str(self.base_url))
        self.issuer = Issuer(
            store=self._store,
            url=str(self.issuer_url),
            scopes=ServerScopes.of(self.client_registration_options, self.required_scopes),
            code_expiry_seconds=authorization_code_expiry_seconds,
            access_expiry_seconds=access_token_expiry_seconds,
            refresh_expiry_seconds=refresh_token_expiry_seconds,
            grace_seconds=min(refresh_grace_seconds, access_token_expiry_seconds),
            after_commit=Purger(self._store).nudge,
            resources=tuple(canonical(str(url)) for url in resources),
            device_url=self.public_url(DEVICE_PATH) if device_authorization else None,
        )
        self._notifier = None if notify is None else Notifier(notify, self.public_name, self.get_client)
        self._store.listener = self._notifier
        if device_authorization:
            check_asks(self._approval)

    async def check_schema(self) -> None:
        """Open the database now, as in a server's lifespan. Raises `SchemaError` or `DatabaseUnavailable`."""
        await self._store.open()

    async def aclose(self) -> None:
        """Finish the steps in progress and close all connections. Using the provider again reopens them."""
        if self._notifier is not None:
            await self._notifier.close()
        await self._store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # The steps of the flows

    async def get_client(self, client_id: str) -> StoredClient | None:
        """Return a registered client, or None."""
        return await clients.find(self.issuer, client_id)

    async def register_client(self, client_info: OAuthClientInformationFull) -> None:
        """Store a registration (RFC 7591), or replace the one with the same client_id. Raises `RegistrationError`."""
        await registration.register(self.issuer, client_info)

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        """Store the request, and return the URL to which the approval sends the browser. Raises `AuthorizeError`."""
        request = await start(self.issuer, client, params)
        if isinstance(self._approval, LoopbackApproval):
            return await self._approval.authorize_from(self, request, params)
        return await self._approval.authorize(self, request)

    async def pending(self, handle: str, request: Request) -> AuthorizationRequest | None:
        """Return a request that can still be approved or denied, or None.

        Also None if `request`, the browser's HTTP request, lacks the cookie that /authorize gave to the browser that
        started the authorization: anyone can start one and send its link to the owner.
        """
        browser = self.cookies.get(request, request_cookie(handle))
        row = await authorization.pending(self.issuer, handle, browser)
        client = None if row is None else await self.get_client(row.client_id)
        return None if row is None or client is None else request_of(handle, client, row)

    async def approve(self, handle: str, *, subject: str | None = None, scopes: Collection[str] | None = None) -> str:
        """Approve a request, and return the URL that takes the browser and the code back to the client.

        A second call replaces the code, if it was not used yet. `subject` names the user who approved; every token
        carries it. `scopes` are the scopes to grant, also ones that the client did not request (RFC 6749, section
        3.3); None grants those of the request. The required scopes are always granted. Raises `AuthorizeError` if the
        request is unknown, expired or denied, if its code was used, or for a scope that this server does not have.
        """
        return await authorization.approve(self.issuer, handle, subject, scopes)

    async def deny(self, handle: str) -> str:
        """Deny a request, and return the URL that reports this to the client. Raises `AuthorizeError`, as `approve`."""
        return await authorization.deny(self.issuer, handle)

    async def load_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: str
    ) -> AuthorizationCode | None:
        """Return an approved code of this client until it expires, even if consumed, or None."""
        return await code.load(self.issuer, client.client_id, authorization_code)

    async def exchange_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: AuthorizationCode
    ) -> OAuthToken:
        """Exchange a code for a token pair, once. A second exchange ends the grant. Raises `TokenError`."""
        presented = code.PresentedCode(client.client_id, authorization_code.code, checked=True)
        return await code.exchange(self.issuer, presented)

    async def load_refresh_token(self, client: OAuthClientInformationFull, refresh_token: str) -> RefreshToken | None:
        """Return a refresh token of this client, even if consumed, so that its exchange can decide; or None."""
        return await refresh.load(self.issuer, client.client_id, refresh_token)

    async def exchange_refresh_token(
        self, client: OAuthClientInformationFull, refresh_token: RefreshToken, scopes: list[str]
    ) -> OAuthToken:
        """Rotate a refresh token, or repeat the response to it. Raises `TokenError`."""
        scope = "" if set(scopes) == set(refresh_token.scopes) else " ".join(scopes)  # all: those in the row by then
        presented = refresh.PresentedRefreshToken(client.client_id, refresh_token.token, scope=scope, checked=True)
        return await refresh.refresh(self.issuer, presented)

    async def exchange_identity_assertion(
        self, client: OAuthClientInformationFull, params: IdentityAssertionParams
    ) -> OAuthToken:
        """Issue an access token to the user whom an identity provider asserts. Raises `TokenError`."""
        return await identity.exchange(self.issuer, self._identities, client, params)

    async def load_access_token(self, token: str) -> AccessToken | None:
        """Return a live access token, or None. It has no side effects: the revocation endpoint calls it too."""
        return await access.load(self.issuer, token)

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return a live access token that was issued for this server (RFC 8707), or None."""
        return await access.verify(self.issuer, token)

    async def revoke_token(self, token: AccessToken | RefreshToken) -> None:
        """End the grant of a token (RFC 7009): the pair, everything rotated from it, and its code."""
        await revocation.revoke(self.issuer, token.client_id, token.token)

    # The server around it

    def set_mcp_path(self, mcp_path: str | None) -> None:
        """Set the path of the MCP endpoint, and so the resource that tokens are for. A known path is never unset."""
        if mcp_path is not None or self._mcp_path is None:
            super().set_mcp_path(mcp_path)
            self.issuer.resource = None if self._mcp_path is None else str(self._resource_url)

    @property
    def scopes_supported(self) -> list[str]:
        """The scopes of the protected resource, without `offline_access`, or None (RFC 9728, section 3.2)."""
        scopes = [scope for scope in super().scopes_supported if scope != clients.OFFLINE_ACCESS]
        return scopes or None  # type: ignore[return-value]  # FastMCP passes it on to code that accepts None

    def public_url(self, path: str) -> str:
        """Return the public URL of a path of this server."""
        return f"{str(self.base_url).rstrip('/')}{path}"

    @property
    def public_name(self) -> str:
        """The server's name, if its owner has not set one: host and path of its URL."""
        return self.public_url("").partition("//")[2]

    def address_of(self, request: Request) -> str:
        """Return the address that sent a request: the peer's, or the one that `trusted_proxies` report."""
        return self._flood_guard.address(request)

    def message_page(
        self, title: str, text: str, detail: str, status_code: int, headers: Mapping[str, str]
    ) -> Response:
        """Return a page that tells the user what is wrong, in the style of the approval's pages."""
        paragraphs = filter(None, (text, detail))
        return self._pages.message(
            title, *paragraphs, server=self.public_name, status_code=status_code, headers=headers
        )

    @property
    def _pages(self) -> Pages:
        return getattr(self._approval, "pages", None) or plain_pages()

    def get_routes(self, mcp_path: str | None = None) -> list[Route]:
        """Return FastMCP's routes, with ours where its handlers fall short, and the approval's pages."""
        routes = super().get_routes(mcp_path)
        routes_of: Callable[[SQLAlchemyOAuthProvider], list[Route]] | None = getattr(self._approval, "routes", None)
        pages = list(routes_of(self)) if routes_of else []
        if self.issuer.device_url is not None:
            pages.append(device_page(self, self._approval, self._pages))
        own = type(self).exchange_identity_assertion
        server = Server(
            provider=self,
            issuer=self.issuer,
            documents=self._documents,
            floods=self._flood_guard,
            message_page=self.message_page,
            listening=self._notifier,
            cookies=None if isinstance(self._approval, AutoApproval) else self.cookies,
            takes_identities=self._identities is not None
            or own is not SQLAlchemyOAuthProvider.exchange_identity_assertion,
        )
        return server_routes(server, routes, pages)

    def get_middleware(self) -> list[Middleware]:
        """Return FastMCP's middleware between ours: outages get 503, and every request without a token gets 401."""
        return [
            Middleware(OutageMiddleware),
            *super().get_middleware(),
            Middleware(ChallengeMiddleware, is_protected=lambda path: path == self._mcp_path),
        ]
