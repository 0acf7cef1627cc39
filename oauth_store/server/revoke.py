"""/revoke: a token ends its grant (RFC 7009), for public clients and for confidential ones by either method."""

from mcp.server.auth.middleware.client_auth import AuthenticationError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.flows import clients, revocation
from oauth_store.flows.issuer import Issuer
from oauth_store.server.answers import error_answer
from oauth_store.server.client_auth import credentials, invalid_client


class RevokeEndpoint:
    """The revocation endpoint."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    async def handle(self, request: Request) -> Response:
        form = await request.form()
        try:
            client_id, secret = await credentials(request)
            client = clients.authenticate(await clients.find(self._issuer, client_id), secret)
        except AuthenticationError as error:
            return invalid_client(request, error)
        token = form.get("token")
        if not isinstance(token, str) or not token:
            return error_answer(400, "invalid_request", "token is missing")
        # A token of either kind is looked up, whatever token_type_hint says (section 2.1)
        await revocation.revoke(self._issuer, client.client_id, token)
        return Response(status_code=200)
