"""/token: parse a client's request, and run the flow that it names (RFC 6749, section 3.2)."""

from mcp.server.auth.json_response import PydanticJSONResponse
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import TokenError
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthToken
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.flows import code, devices, machine, refresh
from oauth_store.flows.assertions import Secret
from oauth_store.flows.code import PresentedCode
from oauth_store.flows.connected import CLIENT_CREDENTIALS, DEVICE_CODE
from oauth_store.flows.devices import PendingError, PresentedDeviceCode
from oauth_store.flows.machine import PresentedSecret
from oauth_store.flows.metadata_documents import DocumentUnavailableError
from oauth_store.flows.refresh import PresentedRefreshToken
from oauth_store.rate_limits import Polls
from oauth_store.server.answers import error_answer
from oauth_store.server.authorize import Server
from oauth_store.server.client_assertion import ClientAuthentication, keys_unavailable
from oauth_store.server.client_auth import invalid_client
from oauth_store.server.identity import identity_tokens
from oauth_store.server.parameters import ParameterError, single


class TokenEndpoint:
    """The token endpoint: a code or a refresh token in, a pair out; for other grants, an access token."""

    def __init__(self, server: Server, authentication: ClientAuthentication) -> None:
        self._server = server
        self._authentication = authentication
        self._issuer = server.issuer
        self._floods = server.floods
        self._polls = Polls()

    async def handle(self, request: Request) -> Response:
        try:
            client_id, secret = await self._authentication.credentials(request)
            fields = single((await request.form()).multi_items(), self._issuer.known)
            tokens = await self._tokens(client_id, secret, fields, self._floods.address(request))
        except AuthenticationError as error:
            return invalid_client(request, error)
        except DocumentUnavailableError as error:
            return keys_unavailable(error)
        except ParameterError as error:
            return error_answer(400, "invalid_request", str(error))
        except TokenError as error:
            # MCP wants 401 for a dead token, and FastMCP responds so to a dead grant; clients look at the code
            status = 401 if error.error in ("invalid_grant", "invalid_client") else 400
            return error_answer(status, error.error, error.error_description)
        except PendingError:
            if self._polls.is_early(fields["device_code"]):
                return error_answer(400, "slow_down", "wait 5 seconds longer between two requests")
            return error_answer(400, "authorization_pending", "the owner has not answered yet")
        return PydanticJSONResponse(tokens)

    async def _tokens(self, client_id: str, secret: Secret, fields: dict[str, str], address: str) -> OAuthToken:
        grant_type, resource = _required(fields, "grant_type"), fields.get("resource")
        if grant_type == "authorization_code":
            presented = PresentedCode(
                client_id,
                _required(fields, "code"),
                secret,
                code_verifier=_required(fields, "code_verifier"),
                redirect_uri=fields.get("redirect_uri", ""),
                resource=resource,
            )
            return await code.exchange(self._issuer, presented)
        if grant_type == "refresh_token":
            token, scope = _required(fields, "refresh_token"), fields.get("scope", "")
            return await refresh.refresh(
                self._issuer, PresentedRefreshToken(client_id, token, secret, scope, resource, address)
            )
        if grant_type == CLIENT_CREDENTIALS:
            asked = PresentedSecret(client_id, secret, fields.get("scope", ""), resource)
            return await machine.grant(self._issuer, asked)
        if grant_type == JWT_BEARER_GRANT_TYPE and self._server.takes_identities:
            return await identity_tokens(self._server, client_id, secret, fields)
        if grant_type == DEVICE_CODE and self._issuer.device_url is not None:
            device = PresentedDeviceCode(client_id, _required(fields, "device_code"), secret, resource)
            return await devices.exchange(self._issuer, device)
        raise TokenError("unsupported_grant_type", "this server does not support this grant_type")


def _required(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise TokenError("invalid_request", f"{name} is missing")
    return fields[name]
