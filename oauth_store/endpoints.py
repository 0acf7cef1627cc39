"""The routes and the middleware of ours, where FastMCP's and the SDK's handlers fall short of the specification."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import unquote, urlsplit

from fastmcp.server.auth import AccessToken
from fastmcp.server.auth.handlers.authorize import AuthorizationHandler
from mcp.server.auth.handlers.metadata import MetadataHandler
from mcp.server.auth.handlers.register import RegistrationHandler
from mcp.server.auth.json_response import PydanticJSONResponse
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import AuthorizationCode, AuthorizationParams, RefreshToken, TokenError
from mcp.server.auth.routes import build_metadata
from mcp.server.auth.settings import ClientRegistrationOptions, RevocationOptions
from mcp.server.transport_security import DEFAULT_MAX_REQUEST_BODY_SIZE, RequestBodyLimitMiddleware
from mcp.shared.auth import OAuthClientInformationFull, OAuthMetadata, OAuthToken
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from pydantic import AnyHttpUrl, AnyUrl, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store.approval import AutoApproval, current_request
from oauth_store.browser import REQUEST_COOKIE_SECONDS, Cookies, request_cookie
from oauth_store.clients import OFFLINE_ACCESS, StoredClient
from oauth_store.credentials import matches
from oauth_store.errors import OAuthStoreError
from oauth_store.floods import FloodMiddleware
from oauth_store.pages import wants_page
from oauth_store.text import shown
from oauth_store.urls import same_resource

if TYPE_CHECKING:
    from oauth_store.provider import SQLAlchemyOAuthProvider

T = TypeVar("T")
Admit = Callable[[StoredClient | None], None]

NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
RETRY_AFTER_SECONDS = 5
PAGE_BODY_BYTES = 64 * 1024
_METADATA_PATH = "/.well-known/oauth-authorization-server"


def replace_routes(provider: "SQLAlchemyOAuthProvider", routes: list[Route]) -> list[Route]:
    """Return `routes` with our own in the place of those that need to change."""
    options = provider.client_registration_options or ClientRegistrationOptions()
    registration = RegistrationHandler(provider, _registration_options(provider, options))
    replacements: dict[str, tuple[Callable[[Request], Awaitable[Response]], bool]] = {
        _METADATA_PATH: (MetadataHandler(_metadata(provider)).handle, True),
        "/authorize": (_AuthorizeEndpoint(provider).handle, False),
        "/token": (_TokenEndpoint(provider).handle, True),
        "/revoke": (_RevokeEndpoint(provider).handle, True),
        "/register": (registration.handle, True),
    }
    replaced = [
        _route(provider, route, *replacements[route.path]) if route.path in replacements else route for route in routes
    ]
    # RFC 8414, section 3.1: an issuer's path stands behind the well-known part. A proxy that takes a prefix away hands
    # such a request on as it is.
    issuer_path = urlsplit(str(provider.issuer_url)).path.rstrip("/")
    if issuer_path:
        metadata = next(route for route in replaced if route.path == _METADATA_PATH)
        replaced.append(Route(f"{_METADATA_PATH}{issuer_path}", endpoint=metadata.endpoint, methods=metadata.methods))
    pages: Callable[[SQLAlchemyOAuthProvider], list[Route]] | None = getattr(provider._approval, "routes", None)
    return [*replaced, *(_page(provider, route) for route in (pages(provider) if pages else ()))]


def _page(provider: "SQLAlchemyOAuthProvider", route: Route) -> Route:
    app = OutageMiddleware(RequestBodyLimitMiddleware(route.app, PAGE_BODY_BYTES))
    return Route(route.path, endpoint=_ProblemPages(app, provider), methods=sorted((route.methods or set()) - {"HEAD"}))


def _route(
    provider: "SQLAlchemyOAuthProvider", route: Route, handler: Callable[[Request], Awaitable[Response]], cors: bool
) -> Route:
    async def handle(request: Request) -> Response:
        try:
            if request.method == "POST" and route.path != "/register":
                await request.form()  # what cannot be read is a 400 here; the SDK's handler would fall over it
            return await handler(request)
        finally:
            await request.close()  # of uploaded files, which nobody wants

    methods = sorted((route.methods or set()) - {"HEAD"})
    app: ASGIApp = RequestBodyLimitMiddleware(OutageMiddleware(request_response(handle)), DEFAULT_MAX_REQUEST_BODY_SIZE)
    if provider._flood_guard.guards(route.path):
        app = FloodMiddleware(app, partial(provider._flood_guard.retry_after, route.path))
    if route.path == "/authorize":
        app = _ProblemPages(app, provider)
    if "POST" in methods:
        app = _NoStoreMiddleware(app)
    if cors:  # for clients that run in a browser; /authorize is navigated to
        app = CORSMiddleware(
            app,
            allow_origins=["*"],
            allow_methods=methods,
            allow_headers=[MCP_PROTOCOL_VERSION_HEADER, "Authorization"],
        )
    return Route(route.path, endpoint=app, methods=methods)


def _registration_options(
    provider: "SQLAlchemyOAuthProvider", options: ClientRegistrationOptions
) -> ClientRegistrationOptions:
    """Clients that name no scope get the server's; `offline_access` may always be named."""
    valid = None if options.valid_scopes is None else [*options.valid_scopes, OFFLINE_ACCESS]
    return options.model_copy(update={"default_scopes": provider._server_scopes or None, "valid_scopes": valid})


def _metadata(provider: "SQLAlchemyOAuthProvider") -> OAuthMetadata:
    """Return the server's metadata (RFC 8414), with what the SDK leaves out."""
    metadata = build_metadata(
        cast(AnyHttpUrl, provider.base_url),  # neither of the two is ever None here
        provider.service_documentation_url,
        provider.client_registration_options or ClientRegistrationOptions(),
        provider.revocation_options or RevocationOptions(),
    )
    metadata.issuer = cast(AnyHttpUrl, provider.issuer_url)
    metadata.token_endpoint_auth_methods_supported = ["none", "client_secret_post", "client_secret_basic"]
    if metadata.revocation_endpoint is not None:
        metadata.revocation_endpoint_auth_methods_supported = metadata.token_endpoint_auth_methods_supported
    metadata.scopes_supported = metadata.scopes_supported or provider.required_scopes or None
    metadata.client_id_metadata_document_supported = True
    metadata.authorization_response_iss_parameter_supported = True  # RFC 9207
    return metadata


class _NoStoreMiddleware:
    """Says on every answer that it is for nobody else (RFC 6749, section 5.1; RFC 7591, section 3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(NO_STORE)
            await send(message)

        await self.app(scope, receive, marked)


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


class _ProblemPages:
    """Says in a page what went wrong where a browser navigates; clients get what they always get."""

    def __init__(self, app: ASGIApp, provider: "SQLAlchemyOAuthProvider") -> None:
        self.app = app
        self._provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not wants_page(Request(scope)):
            await self.app(scope, receive, send)
            return
        problem: Message | None = None
        body = b""

        async def watch(message: Message) -> None:
            nonlocal problem, body
            if message["type"] == "http.response.start" and _is_problem(message):
                problem = message
            elif problem is None:
                await send(message)
            else:
                body += message.get("body", b"")

        await self.app(scope, receive, watch)
        if problem is not None:
            await self._page(problem, body)(scope, receive, send)

    def _page(self, problem: Message, body: bytes) -> Response:
        status, headers = problem["status"], Headers(raw=problem["headers"])
        kept = {"Retry-After": headers["retry-after"]} if "retry-after" in headers else {}
        if status == 503:
            title, text = (
                "Not available right now",
                "The server cannot reach its database. Reload this page in a moment.",
            )
        elif status == 429:
            title = "Too many requests"
            text = f"Wait {headers['retry-after']} seconds, then go back to your app, and connect again."
        else:
            title = "This request cannot be answered"
            text = "Go back to your app, and connect again. If that does not help, remove the server there, and add it."
        return self._provider.message_page(title, text, _description(body) if status == 400 else "", status, kept)


def _is_problem(start: Message) -> bool:
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and not content_type.startswith("text/html")


def _description(body: bytes) -> str:
    try:
        return shown(str(json.loads(body)["error_description"]))
    except (ValueError, KeyError, TypeError):
        return ""


class _AuthorizeEndpoint:
    """FastMCP's handler, but for three things: approvals see the request, an outage is no `server_error`, and people
    get pages."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self._cookies = Cookies(str(provider.base_url))

    async def handle(self, request: Request) -> Response:
        token = current_request.set(request)
        attempt = _Attempt(self._provider)
        try:
            response = await AuthorizationHandler(
                provider=attempt,  # type: ignore[arg-type]  # it calls these two methods
                base_url=str(self._provider.base_url),
                issuer_url=self._provider.issuer_url,
            ).handle(request)
        except _Outage as outage:
            raise outage.error from None
        finally:
            current_request.reset(token)
        if response.status_code == 400 and attempt.unknown_client and wants_page(request):
            return self._provider.message_page(
                "This app is not registered here",
                "It holds a registration that this server does not know. Remove this server from the app, and add it "
                "again: the app then registers anew.",
                "",
                400,
                {},
            )
        started: tuple[str, str] | None = getattr(request.state, "started", None)
        if started is not None and not isinstance(self._provider._approval, AutoApproval):
            handle, browser = started
            self._cookies.set(response, request_cookie(handle), browser, max_age_seconds=REQUEST_COOKIE_SECONDS)
        return response


class _Outage(BaseException):
    """Carries an error past a handler that logs a traceback for every `Exception`, and redirects `server_error`."""

    def __init__(self, error: OAuthStoreError) -> None:
        self.error = error


class _Attempt:
    """The provider for one request to /authorize."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self.unknown_client = False

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        client = await self._watched(self._provider.find_client(client_id))
        self.unknown_client = client is None
        return client

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        return await self._watched(self._provider.authorize(client, params))

    async def _watched(self, step: Awaitable[T]) -> T:
        try:
            return await step
        except OAuthStoreError as error:
            raise _Outage(error) from None


async def _credentials(request: Request) -> tuple[str, str | None]:
    """Return the client_id and the secret of a request to /token or /revoke (RFC 6749, section 2.3.1).

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
    return client_id, secret if isinstance(secret, str) else None


def _authenticated(client: StoredClient | None, secret: str | None) -> StoredClient:
    """Return the client if the secret is its own, by the hash of it; the SDK's authenticator would need it in clear.

    Raises `AuthenticationError`.
    """
    if client is None:
        raise AuthenticationError("client_id is not registered")
    if client.secret_hash is None:
        if client.token_endpoint_auth_method in (None, "none"):
            return client
        raise AuthenticationError("this server has lost the client's secret; register again")
    if secret is None or not matches(secret, client.secret_hash):
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
    """The token endpoint (RFC 6749, section 3.2): a code or a refresh token in, a pair out."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        try:
            tokens = await self._tokens(*await _credentials(request), await _fields(request))
        except AuthenticationError as error:
            return _invalid_client(request, error)
        except TokenError as error:
            # MCP wants 401 for a token that is dead, and FastMCP answers a dead grant so; clients look at the code
            status = 401 if error.error in ("invalid_grant", "invalid_client") else 400
            return _error(status, error.error, error.error_description)
        return PydanticJSONResponse(tokens)

    async def _tokens(self, client_id: str, secret: str | None, fields: dict[str, str]) -> OAuthToken:
        grant_type = _required(fields, "grant_type")

        def admit(client: StoredClient | None) -> None:
            if grant_type not in _authenticated(client, secret).grant_types:
                raise TokenError("unauthorized_client", f"the client did not register for {grant_type}")

        if grant_type == "authorization_code":
            return await self._exchange_code(client_id, admit, fields)
        if grant_type == "refresh_token":
            return await self._refresh(client_id, admit, fields)
        raise TokenError("unsupported_grant_type", "grant_type is neither authorization_code nor refresh_token")

    async def _exchange_code(self, client_id: str, admit: Admit, fields: dict[str, str]) -> OAuthToken:
        presented, verifier = _required(fields, "code"), _required(fields, "code_verifier")
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")  # RFC 7636, 4.6

        def check(code: AuthorizationCode) -> None:
            if code.redirect_uri_provided_explicitly and not _is_uri(fields.get("redirect_uri", ""), code.redirect_uri):
                raise TokenError("invalid_grant", "redirect_uri is not the one of the authorization request")
            if not hmac.compare_digest(challenge, code.code_challenge.encode()):
                raise TokenError("invalid_grant", "code_verifier is not the one of the authorization request")
            self._check_resource(fields, code.resource)

        return await self._provider._exchange_authorization_code(client_id, presented, admit, check)

    async def _refresh(self, client_id: str, admit: Admit, fields: dict[str, str]) -> OAuthToken:
        def narrowed(granted: list[str], resource: str | None) -> list[str]:
            self._check_resource(fields, resource)
            # White space is any, and offline_access alone asks for nothing less: claude.ai sends " offline_access"
            # (RFC 6749, sections 3.3 and 6).
            asked = fields.get("scope", "").split()
            if not set(asked) - {OFFLINE_ACCESS}:
                asked = granted
            return [scope for scope in asked if scope in granted or scope != OFFLINE_ACCESS]

        return await self._provider._refresh(client_id, _required(fields, "refresh_token"), admit, narrowed)

    def _check_resource(self, fields: dict[str, str], granted: str | None) -> None:
        asked, own = fields.get("resource"), granted or self._provider._own_resource  # RFC 8707, section 2.2
        if asked and own and not same_resource(asked, own):
            raise TokenError("invalid_target", "resource is not the one that was granted")


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form, each given once (RFC 6749, section 3.2); an empty one counts as left out."""
    form = await request.form()
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value}
    if len(form.multi_items()) != len(form.keys()):
        raise TokenError("invalid_request", "a parameter is given twice")
    return fields


def _is_uri(presented: str, uri: AnyUrl) -> bool:
    """Compare as URLs: what was stored is normalized, and clients repeat their own spelling."""
    try:
        return AnyUrl(presented) == uri
    except ValidationError:
        return False


def _required(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise TokenError("invalid_request", f"{name} is missing")
    return fields[name]


class _RevokeEndpoint:
    """Token revocation (RFC 7009), for public clients and for confidential ones by either method."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        form = await request.form()
        try:
            client_id, secret = await _credentials(request)
            client = _authenticated(await self._provider.get_client(client_id), secret)
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
        return Response(status_code=200)


def _invalid_client(request: Request, error: AuthenticationError) -> Response:
    response = _error(401, "invalid_client", error.message)
    _challenge(request, response)
    return response


def _challenge(request: Request, response: Response) -> None:
    if "authorization" in request.headers:  # RFC 6749, section 5.2
        response.headers["WWW-Authenticate"] = 'Basic realm="token"'


def _error(status_code: int, error: str, description: str | None) -> Response:
    return JSONResponse({"error": error, "error_description": description}, status_code=status_code)
