"""/introspect: another server asks whether a token is good there (RFC 7662). The owner adds each such server."""

from fastmcp.server.auth import AccessToken, OAuthProvider
from mcp.server.auth.middleware.client_auth import AuthenticationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oauth_store.flows import access, clients
from oauth_store.flows.clients import as_stored
from oauth_store.flows.issuer import Issuer
from oauth_store.flows.metadata_documents import DocumentUnavailableError
from oauth_store.server.answers import error_answer
from oauth_store.server.client_assertion import ClientAuthentication, keys_unavailable
from oauth_store.server.client_auth import invalid_client


class IntrospectionEndpoint:
    """The introspection endpoint: for each client, the tokens of the one resource that the owner set."""

    path = "/introspect"

    def __init__(self, issuer: Issuer, provider: OAuthProvider, authentication: ClientAuthentication) -> None:
        """`provider` for its public methods, which an application may have overridden."""
        self._authentication = authentication
        self._issuer = issuer
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        token = (await request.form()).get("token")
        try:
            client_id, secret = await self._authentication.credentials(request)
            found = await self._provider.get_client(client_id)
            client = clients.authenticate(None if found is None else as_stored(found, self._issuer.scopes), secret)
        except AuthenticationError as error:
            return invalid_client(request, error)
        except DocumentUnavailableError as error:
            return keys_unavailable(error)
        resource = None if client.secret_hash is None else client.introspects
        if resource is None or not self._issuer.is_ours(resource):
            return error_answer(403, "access_denied", "the owner of this server did not add the client to introspect")
        if not isinstance(token, str) or not token:
            return error_answer(400, "invalid_request", "token is missing")
        return JSONResponse(self._described(await access.verify(self._issuer, token, resource)))

    def _described(self, token: AccessToken | None) -> dict[str, object]:
        """Return the response (section 2.2). Of a token that is not good there, it reveals nothing."""
        if token is None:
            return {"active": False}
        described = {
            "active": True,
            "scope": " ".join(token.scopes),
            "client_id": token.client_id,
            "token_type": "Bearer",
            "exp": token.expires_at,
            "sub": token.subject,
            "aud": token.resource,
            "iss": self._issuer.url,
        }
        return {name: value for name, value in described.items() if value is not None}
