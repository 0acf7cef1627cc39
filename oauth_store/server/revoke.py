"""/revoke: a token ends its grant (RFC 7009). Public clients can use it, and confidential ones by either method."""

from fastmcp.server.auth import OAuthProvider
from mcp.server.auth.middleware.client_auth import AuthenticationError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.flows import clients, revocation
from oauth_store.flows.clients import as_stored
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.metadata_documents import DocumentUnavailableError
from oauth_store.server.answers import error_answer
from oauth_store.server.client_assertion import ClientAuthentication, keys_unavailable
from oauth_store.server.client_auth import invalid_client


class RevokeEndpoint:
    """The revocation endpoint."""

    def __init__(self, issuer: Issuer, provider: OAuthProvider, authentication: ClientAuthentication) -> None:
        """`provider` for its public methods, which an application may have overridden."""
        self._authentication = authentication
        self._issuer = issuer
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        form = await request.form()
        token = form.get("token")
        try:
            client_id, secret = await self._authentication.credentials(request)
            found = await self._provider.get_client(client_id)
            client = clients.authenticate(None if found is None else as_stored(found, self._issuer.scopes), secret)
            if not isinstance(token, str) or not token:
                return error_answer(400, "invalid_request", "token is missing")
            # A token of either kind is looked up, whatever token_type_hint says (section 2.1)
            await revocation.revoke(self._issuer, client.client_id, token, secret)
        except AuthenticationError as error:
            return invalid_client(request, error)
        except DocumentUnavailableError as error:
            return keys_unavailable(error)
        return Response(status_code=200)
