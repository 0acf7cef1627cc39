"""Client authentication at /token and /revoke: the client_id and secret of a request (RFC 6749, section 2.3.1)."""

import base64
from urllib.parse import unquote

from mcp.server.auth.middleware.client_auth import AuthenticationError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.server.answers import error_answer


async def credentials(request: Request, claimed_id: str | None = None) -> tuple[str, str | None]:
    """Return the client_id and the secret of a request to /token or /revoke (RFC 6749, section 2.3.1).

    The secret comes from the Authorization header or from the body, whichever the client uses. `claimed_id` is the
    client_id if the request has none. Raises `AuthenticationError`.
    """
    form = await request.form()
    id_in_header, secret_in_header = _basic_credentials(request.headers.get("authorization", ""))
    id_in_body, secret_in_body = form.get("client_id"), form.get("client_secret")
    if id_in_header is not None and id_in_body not in (None, id_in_header):
        raise AuthenticationError("the Authorization header and client_id name different clients")
    if secret_in_header is not None and secret_in_body:
        raise AuthenticationError("the request uses two authentication methods at once")
    client_id, secret = id_in_header or id_in_body or claimed_id, secret_in_header or secret_in_body
    if not isinstance(client_id, str) or not client_id:
        raise AuthenticationError("client_id is missing")
    return client_id, secret if isinstance(secret, str) else None


def _basic_credentials(header: str) -> tuple[str | None, str | None]:
    """Return the client_id and secret of an Authorization header; an empty secret is None."""
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


def invalid_client(request: Request, error: AuthenticationError) -> Response:
    """Return the response to a client that fails to authenticate (RFC 6749, section 5.2)."""
    challenge = {"WWW-Authenticate": 'Basic realm="token"'} if "authorization" in request.headers else None
    return error_answer(401, "invalid_client", error.message, challenge)
