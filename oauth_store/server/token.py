"""/token and /revoke: who asks, and for what. The answers are the provider's."""

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from mcp.server.auth.json_response import PydanticJSONResponse
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import AuthorizationCode, TokenError
from mcp.shared.auth import OAuthToken
from pydantic import AnyUrl, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.credentials import matches
from oauth_store.flows.clients import OFFLINE_ACCESS, StoredClient
from oauth_store.server.answers import error_answer
from oauth_store.server.parameters import ParameterError, single
from oauth_store.urls import same_resource

if TYPE_CHECKING:
    from oauth_store.provider import SQLAlchemyOAuthProvider

CODE_VERIFIER = r"[A-Za-z0-9._~-]{43,128}"
"""RFC 7636, section 4.1."""
Admit = Callable[[StoredClient | None], None]


class TokenEndpoint:
    """The token endpoint (RFC 6749, section 3.2): a code or a refresh token in, a pair out."""

    def __init__(self, provider: "SQLAlchemyOAuthProvider") -> None:
        self._provider = provider

    async def handle(self, request: Request) -> Response:
        try:
            credentials = await _credentials(request)
            fields = await _fields(request, self._provider._own_resource)
            tokens = await self._tokens(*credentials, fields, self._provider.address_of(request))
        except AuthenticationError as error:
            return _invalid_client(request, error)
        except TokenError as error:
            # MCP wants 401 for a token that is dead, and FastMCP answers a dead grant so; clients look at the code
            status = 401 if error.error in ("invalid_grant", "invalid_client") else 400
            return error_answer(status, error.error, error.error_description)
        return PydanticJSONResponse(tokens)

    async def _tokens(self, client_id: str, secret: str | None, fields: dict[str, str], address: str) -> OAuthToken:
        grant_type = _required(fields, "grant_type")

        def admit(client: StoredClient | None) -> None:
            if grant_type not in _authenticated(client, secret).grant_types:
                raise TokenError("unauthorized_client", f"the client did not register for {grant_type}")

        if grant_type == "authorization_code":
            return await self._exchange_code(client_id, admit, fields)
        if grant_type == "refresh_token":
            return await self._refresh(client_id, admit, fields, address)
        raise TokenError("unsupported_grant_type", "grant_type is neither authorization_code nor refresh_token")

    async def _exchange_code(self, client_id: str, admit: Admit, fields: dict[str, str]) -> OAuthToken:
        presented, verifier = _required(fields, "code"), _required(fields, "code_verifier")
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")  # RFC 7636, 4.6

        def check(code: AuthorizationCode) -> None:
            if code.redirect_uri_provided_explicitly and not _is_uri(fields.get("redirect_uri", ""), code.redirect_uri):
                raise TokenError("invalid_grant", "redirect_uri is not the one of the authorization request")
            if not re.fullmatch(CODE_VERIFIER, verifier):
                raise TokenError("invalid_grant", "code_verifier is not 43 to 128 letters, digits and -._~")
            if not hmac.compare_digest(challenge, code.code_challenge.encode()):
                raise TokenError("invalid_grant", "code_verifier is not the one of the authorization request")
            self._check_resource(fields, code.resource)

        return await self._provider._exchange_authorization_code(client_id, presented, admit, check)

    async def _refresh(self, client_id: str, admit: Admit, fields: dict[str, str], address: str) -> OAuthToken:
        def narrowed(granted: list[str], resource: str | None) -> list[str]:
            self._check_resource(fields, resource)
            # White space is any, and offline_access alone asks for nothing less: claude.ai sends " offline_access".
            # Clients repeat what they once asked for, granted or not (RFC 6749, sections 3.3 and 6).
            asked = dict.fromkeys(fields.get("scope", "").split())
            if not asked.keys() - {OFFLINE_ACCESS}:
                return granted
            kept = [scope for scope in granted if scope in asked]
            if not set(kept) - {OFFLINE_ACCESS}:
                raise TokenError("invalid_scope", "none of the scopes was granted")
            return kept

        presented = _required(fields, "refresh_token")
        return await self._provider._refresh(client_id, presented, admit, narrowed, address)

    def _check_resource(self, fields: dict[str, str], granted: str | None) -> None:
        asked, own = fields.get("resource"), granted or self._provider._own_resource  # RFC 8707, section 2.2
        if asked and own and not same_resource(asked, own):
            raise TokenError("invalid_target", "resource is not the one that was granted")


class RevokeEndpoint:
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
            return error_answer(400, "invalid_request", "token is missing")
        # A token of either kind is looked up, whatever token_type_hint says (section 2.1)
        await self._provider._revoke_token(str(client.client_id), presented)
        return Response(status_code=200)


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


async def _fields(request: Request, own_resource: str | None) -> dict[str, str]:
    """Return the fields of a form. Raises `TokenError`."""
    try:
        return single((await request.form()).multi_items(), own_resource)
    except ParameterError as error:
        raise TokenError("invalid_request", str(error)) from error


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


def _invalid_client(request: Request, error: AuthenticationError) -> Response:
    response = error_answer(401, "invalid_client", error.message)
    _challenge(request, response)
    return response


def _challenge(request: Request, response: Response) -> None:
    if "authorization" in request.headers:  # RFC 6749, section 5.2
        response.headers["WWW-Authenticate"] = 'Basic realm="token"'
