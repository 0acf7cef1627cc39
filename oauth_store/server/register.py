"""/register: the requests that may reach the SDK's handler, and the response to all others (RFC 7591, section 3)."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store.browser import media_type
from oauth_store.flows.connected import AUTHORIZATION_CODE, CLIENT_CREDENTIALS, DEVICE_CODE
from oauth_store.server.answers import error_answer

LIST_LENGTH = 100
"""The most entries in a list of a registration."""
DESCRIPTION_LENGTH = 300
"""The longest error, in characters: the SDK's lists everything that is wrong."""


class RegistrationEndpoint:
    """Dynamic client registration, for clients that send JSON."""

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Response]],
        is_valid_scope: Callable[[str], bool],
        *,
        for_devices: bool,
    ) -> None:
        """`handle` is the SDK's handler. `for_devices` is whether devices can sign in (RFC 8628)."""
        self._handle = handle
        self._is_valid_scope = is_valid_scope
        self._for_devices = for_devices

    async def handle(self, request: Request) -> Response:
        """Register a client. Null values count as absent.

        Scopes and grant types that this server lacks are dropped, and so is `client_credentials`, which only the owner
        gives (RFC 7591, section 3.2.1). A registration for nothing else is refused.
        """
        try:
            metadata = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _refused("the registration is not JSON")
        if not isinstance(metadata, dict):
            return _refused("the registration is not a JSON object")
        if any(isinstance(value, list) and len(value) > LIST_LENGTH for value in metadata.values()):
            return _refused(f"a list has more than {LIST_LENGTH} entries")
        metadata = {name: value for name, value in metadata.items() if value is not None}
        self._drop_scopes(metadata)
        device_alone = False
        if isinstance(grant_types := metadata.get("grant_types"), list):
            dropped = (CLIENT_CREDENTIALS,) if self._for_devices else (CLIENT_CREDENTIALS, DEVICE_CODE)
            metadata["grant_types"] = [grant for grant in grant_types if grant not in dropped]
            if DEVICE_CODE in metadata["grant_types"]:
                _complete(metadata)
                device_alone = metadata["redirect_uris"] is None
        response = await self._handle(_with_body(request, json.dumps(metadata).encode()))
        if response.status_code == 400:
            return _shortened(response)
        return _without_code(response) if device_alone else response

    def _drop_scopes(self, metadata: dict[str, Any]) -> None:
        """Keep the scopes that this server has, if it has any of them; otherwise, the handler reports the error."""
        scope = metadata.get("scope")
        if not isinstance(scope, str):
            return
        valid = " ".join(filter(self._is_valid_scope, scope.split()))
        if not scope.split():
            del metadata["scope"]
        elif valid:
            metadata["scope"] = valid


def _complete(metadata: dict[str, Any]) -> None:
    """Add what the SDK's handler expects of every client to a device's registration.

    A device that has a redirect URI may use the code flow too.
    """
    if AUTHORIZATION_CODE not in metadata["grant_types"]:
        metadata["grant_types"].append(AUTHORIZATION_CODE)
    metadata["response_types"] = metadata.get("response_types") or ["code"]
    metadata["redirect_uris"] = metadata.get("redirect_uris") or None


def _without_code(response: Response) -> Response:
    """Return the response to the registration of a device without a redirect URI as it was stored."""
    registered = json.loads(bytes(response.body))
    registered["grant_types"].remove(AUTHORIZATION_CODE)
    registered["response_types"] = []
    return JSONResponse(registered, response.status_code)


class JsonMiddleware:
    """Refuses requests that a web page can send to any server without its consent: all but JSON, and `no-cors`.

    Otherwise, a page could use up its visitor's allowance of registrations.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if media_type(headers) == "application/json" and headers.get("sec-fetch-mode") != "no-cors":
            await self.app(scope, receive, send)
        else:
            refused = _refused("a registration must be JSON: send it with Content-Type: application/json")
            await refused(scope, receive, send)


def _refused(description: str) -> Response:
    return error_answer(400, "invalid_client_metadata", description)


def _shortened(response: Response) -> Response:
    answer = json.loads(bytes(response.body))
    description = str(answer.get("error_description") or "")
    if len(description) <= DESCRIPTION_LENGTH:
        return response
    return error_answer(400, answer["error"], f"{description[: DESCRIPTION_LENGTH - 1]}…")


def _with_body(request: Request, body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)
