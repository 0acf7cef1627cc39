"""/device_authorization: a device asks for the code that its owner types elsewhere (RFC 8628, section 3.1)."""

from urllib.parse import urlencode, urlsplit

from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import TokenError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oauth_store.credentials import device_handle, user_code_in
from oauth_store.flows import devices
from oauth_store.flows.authorization import REQUEST_EXPIRY_SECONDS
from oauth_store.flows.devices import INTERVAL_SECONDS
from oauth_store.flows.metadata_documents import DocumentUnavailableError, InvalidDocumentError
from oauth_store.rate_limits import OverLimitError
from oauth_store.server.answers import error_answer
from oauth_store.server.authorize import Server, find_client
from oauth_store.server.client_assertion import ClientAuthentication, keys_unavailable
from oauth_store.server.client_auth import invalid_client
from oauth_store.server.middleware import too_many
from oauth_store.server.parameters import ParameterError, check_scope, single


class DeviceAuthorizationEndpoint:
    """The device authorization endpoint: a client in, a device code and a user code out."""

    path = "/device_authorization"

    def __init__(self, server: Server, authentication: ClientAuthentication) -> None:
        self._server = server
        self._authentication = authentication

    async def handle(self, request: Request) -> Response:
        issuer = self._server.issuer
        try:
            client_id = await self._authentication.client_id(request)
            fields = single((await request.form()).multi_items(), issuer.known)
            check_scope(fields)
            client = await find_client(self._server, client_id, request)  # with its keys, if its document has some
            try:
                _, secret = await self._authentication.credentials(request)
            except DocumentUnavailableError as error:
                return keys_unavailable(error)
            started = await devices.start(issuer, client, secret, fields.get("scope", ""), fields.get("resource"))
        except AuthenticationError as error:
            return invalid_client(request, error)
        except ParameterError as error:
            return error_answer(400, "invalid_request", str(error))
        except TokenError as error:
            return error_answer(400, error.error, error.error_description)
        except OverLimitError as error:
            return too_many(error.retry_after)
        except InvalidDocumentError as error:
            return error_answer(400, "invalid_client", f"the client's metadata document cannot be used: {error}")
        except DocumentUnavailableError as error:
            description = f"the client's metadata document could not be fetched from {urlsplit(client_id).netloc}"
            headers = {"Retry-After": str(error.retry_after)}
            return error_answer(503, "temporarily_unavailable", description, headers)
        user_code = user_code_in(device_handle(started.user_code))
        return JSONResponse(
            {
                "device_code": started.device_code,
                "user_code": user_code,
                "verification_uri": issuer.device_url,
                "verification_uri_complete": f"{issuer.device_url}?{urlencode({'user_code': user_code})}",
                "expires_in": REQUEST_EXPIRY_SECONDS,
                "interval": INTERVAL_SECONDS,
            }
        )
