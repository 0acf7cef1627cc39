"""The routes and the middleware of ours, where FastMCP's and the SDK's handlers fall short of the specification."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastmcp.server.auth.handlers.authorize import AuthorizationHandler
from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.handlers.metadata import MetadataHandler
from mcp.server.auth.handlers.register import RegistrationHandler
from mcp.server.auth.provider import AuthorizationParams
from mcp.server.auth.routes import build_metadata
from mcp.server.auth.settings import ClientRegistrationOptions, RevocationOptions
from mcp.server.transport_security import RequestBodyLimitMiddleware
from mcp.shared.auth import OAuthClientInformationFull, OAuthMetadata
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from pydantic import AnyHttpUrl
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp

from oauth_store.approval import AutoApproval, current_request
from oauth_store.browser import REQUEST_COOKIE_SECONDS, Cookies, request_cookie
from oauth_store.database.models import CLIENT_ID_LENGTH
from oauth_store.errors import OAuthStoreError
from oauth_store.flows.clients import OFFLINE_ACCESS, SCOPES
from oauth_store.flows.metadata_documents import DocumentError, DocumentUnavailableError
from oauth_store.pages.html import wants_page
from oauth_store.rate_limits import FloodMiddleware, OverLimitError, too_many
from oauth_store.server.answers import error_answer
from oauth_store.server.middleware import CookieLimitMiddleware, NoStoreMiddleware, OutageMiddleware, ProblemPages
from oauth_store.server.parameters import FORM, ParameterError, media_type, single
from oauth_store.server.register import JsonMiddleware, RegistrationEndpoint
from oauth_store.server.token import RevokeEndpoint, TokenEndpoint

if TYPE_CHECKING:
    from oauth_store.provider import SQLAlchemyOAuthProvider

T = TypeVar("T")

BODY_BYTES = 64 * 1024
"""Of a request to any route of ours. A registration is at most half of it, and clients send a few kilobytes."""
SCOPE_LENGTH = 8 * 1024
REDIRECT_URI_LENGTH = 8 * 1024
"""Of what is asked for at /authorize, in characters."""
_METADATA_PATH = "/.well-known/oauth-authorization-server"


def replace_routes(provider: "SQLAlchemyOAuthProvider", routes: list[Route]) -> list[Route]:
    """Return `routes` with our own in the place of those that need to change."""
    registrations = RegistrationHandler(provider, _registration_options(provider))
    registration = RegistrationEndpoint(registrations.handle, provider._is_valid)
    replacements: dict[str, tuple[Callable[[Request], Awaitable[Response]], bool]] = {
        _METADATA_PATH: (MetadataHandler(_metadata(provider)).handle, True),
        "/authorize": (_AuthorizeEndpoint(provider).handle, False),
        "/token": (TokenEndpoint(provider).handle, True),
        "/revoke": (RevokeEndpoint(provider).handle, True),
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
    app = OutageMiddleware(CookieLimitMiddleware(RequestBodyLimitMiddleware(route.app, BODY_BYTES)))
    return Route(route.path, endpoint=ProblemPages(app, provider), methods=sorted((route.methods or set()) - {"HEAD"}))


def _route(
    provider: "SQLAlchemyOAuthProvider", route: Route, handler: Callable[[Request], Awaitable[Response]], cors: bool
) -> Route:
    async def handle(request: Request) -> Response:
        if request.method == "OPTIONS":  # a preflight has its answer already
            return Response(status_code=204, headers={"Allow": ", ".join(methods)})
        if request.method == "POST" and route.path != "/register":
            if media_type(request.headers) != FORM:
                return error_answer(400, "invalid_request", f"the body is no form: send it with Content-Type: {FORM}")
            await request.form()  # what cannot be read is a 400 here; the SDK's handler would fall over it
        return await handler(request)

    methods = sorted((route.methods or set()) - {"HEAD"})
    app: ASGIApp = OutageMiddleware(request_response(handle))
    if route.path == "/register":
        app = FloodMiddleware(app, provider._flood_guard, route.path, refunds=lambda status: status != 201)
        app = JsonMiddleware(app)
    elif provider._flood_guard.guards(route.path):
        app = FloodMiddleware(app, provider._flood_guard, route.path)
    app = RequestBodyLimitMiddleware(app, BODY_BYTES)
    if route.path == "/authorize":
        app = ProblemPages(app, provider)
    if "POST" in methods:
        app = NoStoreMiddleware(app)
    if cors:  # for clients that run in a browser; /authorize is navigated to
        app = CORSMiddleware(
            app,
            allow_origins=["*"],
            allow_methods=methods,
            allow_headers=[MCP_PROTOCOL_VERSION_HEADER, "Authorization"],
        )
    return Route(route.path, endpoint=app, methods=methods)


def _registration_options(provider: "SQLAlchemyOAuthProvider") -> ClientRegistrationOptions:
    """Clients that name no scope get the server's; `offline_access` may always be named."""
    options = provider._registration_options
    valid = None if options.valid_scopes is None else [*options.valid_scopes, OFFLINE_ACCESS]
    return options.model_copy(update={"default_scopes": provider._server_scopes or None, "valid_scopes": valid})


def _metadata(provider: "SQLAlchemyOAuthProvider") -> OAuthMetadata:
    """Return the server's metadata (RFC 8414), with what the SDK leaves out."""
    metadata = build_metadata(
        cast(AnyHttpUrl, provider.base_url),  # neither of the two is ever None here
        provider.service_documentation_url,
        provider._registration_options,
        provider.revocation_options or RevocationOptions(),
    )
    metadata.issuer = cast(AnyHttpUrl, provider.issuer_url)
    metadata.token_endpoint_auth_methods_supported = ["none", "client_secret_post", "client_secret_basic"]
    if metadata.revocation_endpoint is not None:
        metadata.revocation_endpoint_auth_methods_supported = metadata.token_endpoint_auth_methods_supported
    metadata.scopes_supported = metadata.scopes_supported or provider.required_scopes or None
    metadata.client_id_metadata_document_supported = provider.takes_documents or None
    metadata.authorization_response_iss_parameter_supported = True  # RFC 9207
    return metadata


class _AuthorizeEndpoint:
    """FastMCP's handler, but for three things: approvals see the request, an outage is no `server_error`, and people
    get pages."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self._cookies = Cookies(str(provider.base_url))

    async def handle(self, request: Request) -> Response:
        try:
            fields = await self._fields(request)
        except ParameterError as error:
            return error_answer(400, "invalid_request", str(error))
        # The form of a POST is read as the query of a GET is (OpenID Connect Core, section 3.1.2.1).
        request = Request({**request.scope, "method": "GET", "query_string": urlencode(fields).encode()})
        token = current_request.set(request)
        attempt = _Attempt(self._provider)
        try:
            response = await AuthorizationHandler(
                provider=attempt,  # type: ignore[arg-type]  # it calls these two methods
                base_url=str(self._provider.base_url),
                issuer_url=self._provider.issuer_url,
            ).handle(request)
        except _Outage as outage:
            if isinstance(outage.error, OverLimitError):
                return too_many(outage.error.retry_after)
            if isinstance(outage.error, DocumentError):
                return self._no_document(request, urlsplit(attempt.client_id).netloc, outage.error)
            raise outage.error from None
        except _NoClientIdError:
            attempt.unknown_client = True
            description = f"client_id is longer than {CLIENT_ID_LENGTH} characters, or cannot be printed"
            response = error_answer(400, "invalid_request", description)
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
        if response.status_code == 302 and attempt.leads_away(response.headers["location"]):
            answer = dict(parse_qsl(urlsplit(response.headers["location"]).query))
            return error_answer(400, answer["error"], answer.get("error_description") or answer["error"])
        started: tuple[str, str] | None = getattr(request.state, "started", None)
        if started is not None and not isinstance(self._provider._approval, AutoApproval):
            handle, browser = started
            self._cookies.set(response, request_cookie(handle), browser, max_age_seconds=REQUEST_COOKIE_SECONDS)
        return response

    async def _fields(self, request: Request) -> dict[str, str]:
        """Return the parameters of a request. Raises `ParameterError` where they are more than anyone needs."""
        parameters = await request.form() if request.method == "POST" else request.query_params
        fields = single(parameters.multi_items(), self._provider._own_resource)
        scope = fields.get("scope", "")
        if len(scope) > SCOPE_LENGTH or len(scope.split()) > SCOPES:
            raise ParameterError(f"scope has more than {SCOPES} scopes, or {SCOPE_LENGTH} characters")
        if len(fields.get("redirect_uri", "")) > REDIRECT_URI_LENGTH:
            raise ParameterError(f"redirect_uri has more than {REDIRECT_URI_LENGTH} characters")
        return fields

    def _no_document(self, request: Request, host: str, error: DocumentError) -> Response:
        """Say what is wrong with a client's metadata document, or that it cannot be had: 400, or 503 (RFC 9110)."""
        if isinstance(error, DocumentUnavailableError):
            status, code, headers = 503, "temporarily_unavailable", {"Retry-After": str(error.retry_after)}
            description = f"the client's metadata document could not be fetched from {host}"
            title = "This app's description could not be fetched"
            text = f"The app is described at {host}, and this server cannot read it there now. "
            advice = f"Wait {error.retry_after} seconds, then go back to your app, and connect again."
            detail = "If that does not help, tell the server's owner: apps can do without (metadata_documents=False)."
        else:
            status, code, headers = 400, "invalid_request", {}
            description = f"the client's metadata document at {host} cannot be used: {error}"
            title = "This app's description cannot be used"
            text = f"The app is described by a document at {host}, and something is wrong with it. "
            advice = "Tell the app's maker what it is."
            detail = f"The document: {error}."
        if wants_page(request):
            return self._provider.message_page(title, text + advice, detail, status, headers)
        return error_answer(status, code, description, headers)


class _Outage(BaseException):
    """Carries an error past a handler that logs a traceback for every `Exception`, and redirects `server_error`."""

    def __init__(self, error: OAuthStoreError | DocumentError | OverLimitError) -> None:
        self.error = error


class _NoClientIdError(BaseException):
    """Ends a request before FastMCP would log its client_id, line breaks and all, and take seconds to color it."""


class _Attempt:
    """The provider for one request to /authorize."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider
        self._decided = False
        self.unknown_client = False
        self.client_id = ""

    def leads_away(self, url: str) -> bool:
        """Tell whether an error would send the browser off this machine before the owner was asked.

        Anyone may register any address: this server is not to be the link that leads there (RFC 9700, section 4.11.2).
        """
        target = urlsplit(url)
        return not self._decided and not (target.scheme == "http" and is_loopback_host(target.hostname))

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        if len(client_id) > CLIENT_ID_LENGTH or not client_id.isprintable():
            raise _NoClientIdError
        self.client_id = client_id
        client = await self._watched(self._provider.find_client(client_id))
        self.unknown_client = client is None
        return client

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        url = await self._watched(self._provider.authorize(client, params))
        self._decided = True
        return url

    async def _watched(self, step: Awaitable[T]) -> T:
        try:
            return await step
        except (OAuthStoreError, DocumentError, OverLimitError) as error:
            raise _Outage(error) from None
