"""A company's identity provider over HTTP, and servers that let its users in (SEP-990)."""

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastmcp.server.auth.identity_assertion import ID_JAG_TYP, IdentityAssertion
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthClientInformationFull
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.flows.identity import Identities
from tests.assertions import Algorithm, Signer, usual_signer
from tests.deployments import wiki
from tests.example import ExampleServer
from tests.serving import free_port, serving
from tests.workers import Answer, send_forms

CLIENT_ID, SECRET = "assistant", "the-secret-of-the-assistant"


class Company:
    """An identity provider: it serves discovery and keys, and signs assertions of its users."""

    def __init__(self, algorithm: Algorithm = "RS256") -> None:
        self.port = free_port()
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.signer = usual_signer(algorithm)
        self.requests: list[str] = []

    def settings(self, **more: Any) -> IdentityAssertion:
        """What a server that trusts it has."""
        return IdentityAssertion(trusted_issuers=[self.issuer], algorithm=self.signer.algorithm, **more)

    def claims(self, audience: str, resource: str, /, **changed: Any) -> dict[str, Any]:
        """The claims of a good assertion for the assistant, with these changes. None leaves one out."""
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "sub": "ada@example.com",
            "aud": audience,
            "resource": resource,
            "client_id": CLIENT_ID,
            "scope": "read write",
            "iat": now,
            "exp": now + 120,
            "jti": secrets.token_hex(8),
        }
        return {name: value for name, value in (claims | changed).items() if value is not None}

    def sign(self, claims: dict[str, Any], signer: Signer | None = None, typ: str | None = ID_JAG_TYP) -> str:
        """An assertion with these claims."""
        return (signer or self.signer).sign(claims, typ=typ)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Company"]:
        """Serve."""

        async def discovery(request: Request) -> JSONResponse:
            self.requests.append(request.url.path)
            return JSONResponse({"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"})

        async def keys(request: Request) -> JSONResponse:
            self.requests.append(request.url.path)
            return JSONResponse({"keys": [self.signer.public]})

        routes = [Route("/.well-known/openid-configuration", discovery), Route("/keys", keys)]
        async with serving(Starlette(routes=routes), self.port):
            yield self


def assistant(**metadata: Any) -> OAuthClientInformationFull:
    """A client of the company, as the owner of a server registers it."""
    values = {
        "client_id": CLIENT_ID,
        "client_name": "Assistant",
        "client_secret": SECRET,
        "token_endpoint_auth_method": "client_secret_post",
        "grant_types": [JWT_BEARER_GRANT_TYPE],
    }
    return OAuthClientInformationFull.model_validate({**values, **metadata})


async def send_to_enterprise(
    provider: SQLAlchemyOAuthProvider, config: IdentityAssertion, forms: list[dict[str, str]]
) -> list[Answer]:
    """Send forms to /token of a server that has this setting, all at once: the work of a process."""
    provider._identities = Identities(config, str(provider.issuer_url))
    return await send_forms(provider, forms)


def serve_enterprise() -> None:
    """Serve a wiki on PORT for the users of the identity provider ISSUER, until stopped."""
    port = int(os.environ["PORT"])
    trusted = IdentityAssertion(trusted_issuers=[os.environ["ISSUER"]])
    provider = SQLAlchemyOAuthProvider(base_url=f"http://127.0.0.1:{port}", identity_assertion=trusted)
    wiki(provider).run(transport="http", host="127.0.0.1", port=port, stateless_http=True, show_banner=False)


class EnterpriseServer(ExampleServer):
    """A process that serves the users of an identity provider."""

    program = staticmethod(serve_enterprise)
