"""Our routes and middleware, where FastMCP's and the SDK's handlers fall short of the specification."""

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from mcp.server.auth.handlers.metadata import MetadataHandler
from mcp.server.auth.handlers.register import RegistrationHandler
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.server.transport_security import RequestBodyLimitMiddleware
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp

from oauth_store.browser import FORM, media_type
from oauth_store.flows.clients import OFFLINE_ACCESS
from oauth_store.flows.registration import is_valid_scope
from oauth_store.server.answers import error_answer
from oauth_store.server.authorize import AuthorizeEndpoint, Server
from oauth_store.server.client_assertion import ClientAuthentication
from oauth_store.server.device import DeviceAuthorizationEndpoint
from oauth_store.server.introspect import IntrospectionEndpoint
from oauth_store.server.metadata import server_metadata
from oauth_store.server.middleware import (
    CookieLimitMiddleware,
    FloodMiddleware,
    ListeningMiddleware,
    NoStoreMiddleware,
    OutageMiddleware,
    ProblemPages,
)
from oauth_store.server.register import JsonMiddleware, RegistrationEndpoint
from oauth_store.server.revoke import RevokeEndpoint
from oauth_store.server.token import TokenEndpoint

Handler = Callable[[Request], Awaitable[Response]]

BODY_BYTES = 64 * 1024
"""The largest body on any of our routes. A registration is at most half of it, and clients send a few kilobytes."""
_METADATA_PATH = "/.well-known/oauth-authorization-server"


def server_routes(server: Server, routes: list[Route], pages: list[Route]) -> list[Route]:
    """Return FastMCP's `routes`, with our own in place of those that need to change, and an approval's `pages`."""
    issuer = server.issuer
    registration = RegistrationEndpoint(
        RegistrationHandler(server.provider, _registration_options(server)).handle,
        lambda scope: is_valid_scope(issuer, scope),
        for_devices=issuer.device_url is not None,
    )
    authentication = ClientAuthentication(server)
    device = DeviceAuthorizationEndpoint(server, authentication)
    base_url = str(server.provider.base_url).rstrip("/")
    device_url = None if issuer.device_url is None else f"{base_url}{device.path}"
    introspection = IntrospectionEndpoint(issuer, server.provider, authentication)
    metadata = server_metadata(
        server.provider,
        takes_documents=server.documents is not None,
        takes_identities=server.takes_identities,
        device_url=device_url,
        introspection_url=f"{base_url}{introspection.path}" if issuer.resources else None,
    )
    replacements: dict[str, tuple[Handler, bool]] = {
        _METADATA_PATH: (MetadataHandler(metadata).handle, True),
        "/authorize": (AuthorizeEndpoint(server).handle, False),
        "/token": (TokenEndpoint(server, authentication).handle, True),
        "/revoke": (RevokeEndpoint(issuer, server.provider, authentication).handle, True),
        "/register": (registration.handle, True),
    }
    replaced = [
        _route(server, route, *replacements[route.path]) if route.path in replacements else route for route in routes
    ]
    if device_url is not None:
        replaced.append(_route(server, Route(device.path, str, methods=["POST", "OPTIONS"]), device.handle, True))
    if issuer.resources:
        replaced.append(_route(server, Route(introspection.path, str, methods=["POST"]), introspection.handle, False))
    # RFC 8414, section 3.1: an issuer's path follows the well-known part. A proxy that strips a prefix passes such a
    # request on unchanged.
    issuer_path = urlsplit(issuer.url).path.rstrip("/")
    if issuer_path:
        well_known = next(route for route in replaced if route.path == _METADATA_PATH)
        replaced.append(
            Route(f"{_METADATA_PATH}{issuer_path}", endpoint=well_known.endpoint, methods=well_known.methods)
        )
    return [*replaced, *(_page(server, route) for route in pages)]


def _page(server: Server, route: Route) -> Route:
    app = OutageMiddleware(CookieLimitMiddleware(RequestBodyLimitMiddleware(route.app, BODY_BYTES)))
    methods = sorted((route.methods or set()) - {"HEAD"})
    return Route(route.path, endpoint=_heard(server, ProblemPages(app, server.message_page)), methods=methods)


def _heard(server: Server, app: ASGIApp) -> ASGIApp:
    return app if server.listening is None else ListeningMiddleware(app, server.listening)


def _route(server: Server, route: Route, handler: Handler, cors: bool) -> Route:
    methods = sorted((route.methods or set()) - {"HEAD"})

    async def handle(request: Request) -> Response:
        if request.method == "OPTIONS":  # a preflight already has its response
            return Response(status_code=204, headers={"Allow": ", ".join(methods)})
        if request.method == "POST" and route.path != "/register":
            if media_type(request.headers) != FORM:
                return error_answer(
                    400, "invalid_request", f"the body is not a form: send it with Content-Type: {FORM}"
                )
            await request.form()  # an unreadable form is a 400 here; the SDK's handler would fail with it
        return await handler(request)

    app: ASGIApp = OutageMiddleware(request_response(handle))
    if route.path == "/register":
        app = FloodMiddleware(app, server.floods, route.path, refunds=lambda status: status != 201)
        app = JsonMiddleware(app)
    elif server.floods.guards(route.path):
        app = FloodMiddleware(app, server.floods, route.path)
    app = RequestBodyLimitMiddleware(app, BODY_BYTES)
    if route.path == "/authorize":
        app = ProblemPages(app, server.message_page)
    if "POST" in methods:
        app = NoStoreMiddleware(app)
    if cors:  # for clients that run in a browser; /authorize is navigated to
        app = CORSMiddleware(
            app,
            allow_origins=["*"],
            allow_methods=methods,
            allow_headers=[MCP_PROTOCOL_VERSION_HEADER, "Authorization"],
        )
    return Route(route.path, endpoint=_heard(server, app), methods=methods)


def _registration_options(server: Server) -> ClientRegistrationOptions:
    """Clients that name no scope get the server's; `offline_access` may always be named."""
    options = server.provider.client_registration_options or ClientRegistrationOptions()
    valid = None if options.valid_scopes is None else [*options.valid_scopes, OFFLINE_ACCESS]
    usual = list(server.issuer.scopes.usual) or None
    return options.model_copy(update={"default_scopes": usual, "valid_scopes": valid})
