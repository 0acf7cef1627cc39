"""The routes and the middleware of ours, where FastMCP's and the SDK's handlers fall short of the specification."""

import base64
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlencode

from fastmcp.server.auth import AccessToken
from fastmcp.server.auth.auth import TokenHandler
from mcp.server.auth.handlers.authorize import AuthorizationHandler
from mcp.server.auth.handlers.register import RegistrationHandler
from mcp.server.auth.middleware.client_auth import AuthenticationError, ClientAuthenticator
from mcp.server.auth.provider import AuthorizationParams, RefreshToken
from mcp.server.transport_security import DEFAULT_MAX_REQUEST_BODY_SIZE, RequestBodyLimitMiddleware
from mcp.shared.auth import OAuthClientInformationFull
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store.approval import current_request
from oauth_store.credentials import matches
from oauth_store.errors import OAuthStoreError

if TYPE_CHECKING:
    from oauth_store.provider import SQLAlchemyOAuthProvider

T = TypeVar("T")

NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
RETRY_AFTER_SECONDS = 5


def replace_routes(provider: "SQLAlchemyOAuthProvider", routes: list[Route]) -> list[Route]:
    """Return `routes` with our own in the place of those that need to change."""
    options = provider.client_registration_options
    replacements: dict[str, tuple[Callable[[Request], Awaitable[Response]], bool]] = {
        "/authorize": (_AuthorizeEndpoint(provider).handle, False),
        "/token": (_TokenEndpoint(provider).handle, True),
        "/revoke": (_RevokeEndpoint(provider).handle, True),
    }
    if options is not None:
        replacements["/register"] = (RegistrationHandler(provider, options).handle, True)
    return [_route(route, *replacements[route.path]) if route.path in replacements else route for route in routes]


def _route(route: Route, handler: Callable[[Request], Awaitable[Response]], cors: bool) -> Route:
    methods = sorted((route.methods or set()) - {"HEAD"})
    app: ASGIApp = RequestBodyLimitMiddleware(
        OutageMiddleware(request_response(handler)), DEFAULT_MAX_REQUEST_BODY_SIZE
    )
    if cors:  # for clients that run in a browser; /authorize is navigated to
        app = CORSMiddleware(
            app,
            allow_origins=["*"],
            allow_methods=methods,
            allow_headers=[MCP_PROTOCOL_VERSION_HEADER, "Authorization"],
        )
    return Route(route.path, endpoint=app, methods=methods)


class OutageMiddleware:
    """Answers 503 while the database is away (RFC 9110, section 15.6.4): to try again is right, to sign in is not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except OAuthStoreError:
            if started or scope["type"] != "http":
                raise
            await _unavailable()(scope, receive, send)


def _unavailable() -> Response:
    # what exactly is wrong stands in the log, for the operator
    return JSONResponse(
        {"error": "temporarily_unavailable", "error_description": "the authorization server's database is away"},
        status_code=503,
        headers={**NO_STORE, "Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class _AuthorizeEndpoint:
    """The SDK's handler, but for two things: approvals see the request, and an outage is no `server_error`."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        token = current_request.set(request)
        attempt = _Attempt(self._provider)
        try:
            response = await AuthorizationHandler(attempt).handle(request)  # type: ignore[arg-type]  # calls these two
        finally:
            current_request.reset(token)
        if attempt.outage is not None:
            raise attempt.outage
        return response


class _Attempt:
    """The provider for one request to /authorize, whose handler turns every exception into a redirect."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self.outage: OAuthStoreError | None = None

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        return await self._watched(self._provider.get_client(client_id))

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        return await self._watched(self._provider.authorize(client, params))

    async def _watched(self, step: Awaitable[T]) -> T:
        try:
            return await step
        except OAuthStoreError as error:
            self.outage = error
            raise


class _HashedSecretAuthenticator(ClientAuthenticator):
    """Authenticates a client by the hash of its secret (RFC 6749, section 2.3.1); the SDK would need it in clear."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        super().__init__(provider)
        self._store = provider

    async def authenticate_request(self, request: Request) -> OAuthClientInformationFull:
        """Return the client of a request to /token or /revoke.

        A secret is taken from the Authorization header or from the body, whichever the client uses. Raises
        `AuthenticationError`.
        """
        form = await request.form()
        id_in_header, secret_in_header = _basic_credentials(request.headers.get("authorization", ""))
        id_in_body, secret_in_body = form.get("client_id"), form.get("client_secret")
        if id_in_header is not None and id_in_body not in (None, id_in_header):
            raise AuthenticationError("the Authorization header and client_id name two clients")
        if secret_in_header is not None and secret_in_body:
            raise AuthenticationError("two ways of authentication at once")
        client_id, secret = id_in_header or id_in_body, secret_in_header or secret_in_body
        if not isinstance(client_id, str) or not client_id:
            raise AuthenticationError("client_id is missing")
        client = await self._store.get_client(client_id)
        if client is None:
            raise AuthenticationError("client_id is not registered")
        if client.secret_hash is None:
            if client.token_endpoint_auth_method in (None, "none"):
                return client
            raise AuthenticationError("this server has lost the client's secret; register again")
        if not isinstance(secret, str) or not matches(secret, client.secret_hash):
            raise AuthenticationError("client_secret is missing or wrong")
        if client.client_secret_expires_at and client.client_secret_expires_at < time.time():
            raise AuthenticationError("client_secret has expired")
        return client


def _basic_credentials(header: str) -> tuple[str | None, str | None]:
    """Return client_id and secret of an Authorization header; the secret is None if it is empty."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        client_id, separator, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError as error:
        raise AuthenticationError("the Authorization header cannot be read") from error
    if not separator:
        raise AuthenticationError("the Authorization header cannot be read")
    return unquote(client_id), unquote(secret) or None


class _TokenEndpoint:
    """FastMCP's handler, with our authenticator in it and a form that it can read."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._handler = TokenHandler(provider, _HashedSecretAuthenticator(provider))

    async def handle(self, request: Request) -> Response:
        fields = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}
        if "client_id" not in fields:  # RFC 6749, section 2.3.1: with HTTP Basic it need not be in the body
            try:
                client_id, _ = _basic_credentials(request.headers.get("authorization", ""))
            except AuthenticationError as error:
                return _invalid_client(request, error)
            if client_id is not None:
                fields["client_id"] = client_id
        if "scope" in fields:  # RFC 6749, section 3.3; claude.ai sends " offline_access"
            fields["scope"] = " ".join(fields["scope"].split())
        response: Response = await self._handler.handle(_with_form(request, fields))
        if response.status_code == 401:
            _challenge(request, response)
        return response


def _with_form(request: Request, fields: dict[str, str]) -> Request:
    body = urlencode(fields).encode()
    headers = [
        (name, value) for name, value in request.scope["headers"] if name not in (b"content-type", b"content-length")
    ]
    headers += [(b"content-type", b"application/x-www-form-urlencoded"), (b"content-length", str(len(body)).encode())]

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({**request.scope, "headers": headers}, receive)


class _RevokeEndpoint:
    """Token revocation (RFC 7009), for public clients and for confidential ones by either method."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self._authenticator = _HashedSecretAuthenticator(provider)

    async def handle(self, request: Request) -> Response:
        form = await request.form()
        try:
            client = await self._authenticator.authenticate_request(request)
        except AuthenticationError as error:
            return _invalid_client(request, error)
        presented = form.get("token")
        if not isinstance(presented, str) or not presented:
            return _error(400, "invalid_request", "token is missing")
        # Both kinds are looked up, whatever token_type_hint says; an unknown token is revoked already (section 2.2).
        token: RefreshToken | AccessToken | None = await self._provider.load_refresh_token(client, presented)
        if token is None:
            token = await self._provider.load_access_token(presented)
        if token is not None and token.client_id == client.client_id:
            await self._provider.revoke_token(token)
        return Response(status_code=200, headers=NO_STORE)


def _invalid_client(request: Request, error: AuthenticationError) -> Response:
    response = _error(401, "invalid_client", error.message)
    _challenge(request, response)
    return response


def _challenge(request: Request, response: Response) -> None:
    if "authorization" in request.headers:  # RFC 6749, section 5.2
        response.headers["WWW-Authenticate"] = 'Basic realm="token"'


def _error(status_code: int, error: str, description: str) -> Response:
    return JSONResponse({"error": error, "error_description": description}, status_code=status_code, headers=NO_STORE)
