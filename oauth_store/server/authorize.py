"""/authorize: FastMCP's handler, but outages get 503, users get pages, and browsers get a cookie."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.handlers.authorize import AuthorizationHandler
from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import AuthorizationParams, AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.approval import RequestParams
from oauth_store.browser import REQUEST_COOKIE_SECONDS, Cookies, request_cookie, wants_page
from oauth_store.database.models import CLIENT_ID_LENGTH
from oauth_store.errors import OAuthStoreError
from oauth_store.events import Listener
from oauth_store.flows import documented_clients
from oauth_store.flows.authorization import Started
from oauth_store.flows.documented_clients import Documents
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.metadata_documents import DocumentError, DocumentUnavailableError, is_document_url
from oauth_store.rate_limits import FloodGuard, OverLimitError
from oauth_store.server.answers import MessagePage, error_answer
from oauth_store.server.middleware import too_many
from oauth_store.server.parameters import ParameterError, check_scope, single

REDIRECT_URI_LENGTH = 8 * 1024
"""The longest `redirect_uri`, in characters."""


@dataclass(frozen=True, slots=True)
class Server:
    """Everything that the routes need."""

    provider: OAuthProvider
    """For the SDK's handlers, and for its public methods, which an application may have overridden."""
    issuer: Issuer
    documents: Documents | None
    floods: FloodGuard
    message_page: MessagePage
    listening: Listener | None
    """Gets the events of the routes."""
    cookies: Cookies | None
    """For browsers that come back to an approval's pages; None if it has none."""
    takes_identities: bool
    """Whether /token takes identity providers' assertions of users."""


class AuthorizeEndpoint:
    """The authorization endpoint (RFC 6749, section 3.1)."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def handle(self, request: Request) -> Response:
        try:
            fields = await self._fields(request)
        except ParameterError as error:
            return error_answer(400, "invalid_request", str(error))
        # The form of a POST is treated as the query of a GET (OpenID Connect Core, section 3.1.2.1).
        request = Request({**request.scope, "method": "GET", "query_string": urlencode(fields).encode()})
        client_id = fields.get("client_id", "")
        if len(client_id) > CLIENT_ID_LENGTH or not client_id.isprintable():  # FastMCP would log it, and color it
            return self._unknown(
                request, f"client_id is longer than {CLIENT_ID_LENGTH} characters, or cannot be printed"
            )
        attempt = _Attempt(self._server, request)
        handler = AuthorizationHandler(
            provider=attempt,  # type: ignore[arg-type]  # it calls these two methods
            base_url=str(self._server.provider.base_url),
            issuer_url=self._server.provider.issuer_url,
        )
        if client_id:
            await attempt.find(client_id)  # before the handler, to which every client that is not found is unknown
        if attempt.client is not None and "authorization_code" not in attempt.client.grant_types:
            return self._unauthorized(request)
        if attempt.failure is None:
            response = await handler.handle(request)
        if attempt.failure is not None:
            return self._failed(request, client_id, attempt.failure)
        if client_id and attempt.client is None and wants_page(request):
            return self._unknown(request, "")
        started = attempt.started
        if not attempt.decided and response.status_code == 302 and _leads_away(response.headers["location"]):
            answer = dict(parse_qsl(urlsplit(response.headers["location"]).query))
            return error_answer(400, answer["error"], answer.get("error_description") or answer["error"])
        if started is not None and self._server.cookies is not None:
            name = request_cookie(started.handle)
            self._server.cookies.set(response, name, started.browser, max_age_seconds=REQUEST_COOKIE_SECONDS)
        return response

    async def _fields(self, request: Request) -> dict[str, str]:
        """Return the parameters of a request. Raises `ParameterError` if they are too long."""
        parameters = await request.form() if request.method == "POST" else request.query_params
        fields = single(parameters.multi_items(), self._server.issuer.known)
        check_scope(fields)
        if len(fields.get("redirect_uri", "")) > REDIRECT_URI_LENGTH:
            raise ParameterError(f"redirect_uri has more than {REDIRECT_URI_LENGTH} characters")
        return fields

    def _unknown(self, request: Request, description: str) -> Response:
        if not wants_page(request):
            return error_answer(400, "invalid_request", description)
        return self._server.message_page(
            "This app is not registered here",
            "The app uses a registration that this server does not know. Remove this server from the app, then add it "
            "back: the app registers again.",
            "",
            400,
            {},
        )

    def _unauthorized(self, request: Request) -> Response:
        """Refuse a client without the code flow, such as a machine (RFC 6749, section 4.1.2.1)."""
        if not wants_page(request):
            return error_answer(400, "unauthorized_client", "the client did not register for authorization_code")
        return self._server.message_page(
            "This app cannot sign in here",
            "The app's registration is not for signing in with a browser. A machine gets its tokens with its client "
            "id and secret, and a device with the code that it shows.",
            "",
            400,
            {},
        )

    def _failed(
        self, request: Request, client_id: str, failure: OAuthStoreError | DocumentError | OverLimitError
    ) -> Response:
        if isinstance(failure, OverLimitError):
            return too_many(failure.retry_after)
        if isinstance(failure, DocumentError):
            return self._no_document(request, urlsplit(client_id).netloc, failure)
        raise failure

    def _no_document(self, request: Request, host: str, error: DocumentError) -> Response:
        """Report an unusable metadata document of a client as 400, or an unavailable one as 503 (RFC 9110)."""
        if isinstance(error, DocumentUnavailableError):
            status, code, headers = 503, "temporarily_unavailable", {"Retry-After": str(error.retry_after)}
            description = f"the client's metadata document could not be fetched from {host}"
            title = "This app's description could not be fetched"
            text = f"The app's description is at {host}, and this server cannot read it there right now. "
            advice = f"Wait {error.retry_after} seconds, then go back to your app and connect again."
            detail = (
                "If that does not help, ask the server's owner to set metadata_documents=False: apps then register."
            )
        else:
            status, code, headers = 400, "invalid_request", {}
            description = f"the client's metadata document at {host} cannot be used: {error}"
            title = "This app's description cannot be used"
            text = f"The document at {host} that describes the app has an error. "
            advice = "Report it to the developer of the app."
            detail = f"The document: {error}."
        if wants_page(request):
            return self._server.message_page(title, text + advice, detail, status, headers)
        return error_answer(status, code, description, headers)


async def find_client(server: Server, client_id: str, request: Request) -> OAuthClientInformationFull | None:
    """Return the client that starts an authorization, or None. One with a metadata document is read there.

    Raises `OAuthStoreError`, `DocumentError` or `OverLimitError`.
    """
    provider, documents, floods = server.provider, server.documents, server.floods
    if documents is None or not is_document_url(client_id):
        return await provider.get_client(client_id)
    return await documented_clients.find(
        server.issuer, provider, documents, client_id, floods.address(request), lambda: floods.count_document(request)
    )


def _leads_away(url: str) -> bool:
    """Return whether an error would send the browser off this machine before the owner is asked.

    Anyone may register any address, and this server must not become the link there (RFC 9700, section 4.11.2).
    """
    target = urlsplit(url)
    return not (target.scheme == "http" and is_loopback_host(target.hostname))


class _Attempt:
    """The provider as FastMCP's handler sees it, for one request.

    The handler logs a traceback for every error that it does not know, and redirects with `server_error`. So it sees a
    refused request, and the endpoint checks the `failure`.
    """

    def __init__(self, server: Server, request: Request) -> None:
        self._server = server
        self._request = request
        self.client: OAuthClientInformationFull | None = None
        self.started: Started | None = None
        self.decided = False
        self.failure: OAuthStoreError | DocumentError | OverLimitError | None = None

    async def find(self, client_id: str) -> None:
        try:
            self.client = await find_client(self._server, client_id, self._request)
        except (OAuthStoreError, DocumentError, OverLimitError) as error:
            self.failure = error

    async def get_client(self, _client_id: str) -> OAuthClientInformationFull | None:
        return self.client

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        own = RequestParams.of(params, self._request)
        try:
            url = await self._server.provider.authorize(client, own)
        except OAuthStoreError as error:
            self.failure = error
            raise AuthorizeError("temporarily_unavailable", None) from error
        self.started, self.decided = own.started, True
        return url
