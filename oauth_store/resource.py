"""`StoreResource`: an MCP server that takes the tokens of an authorization server on the same database."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fastmcp.server.auth import AccessToken, RemoteAuthProvider, TokenVerifier
from pydantic import AnyHttpUrl
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.middleware import Middleware

from oauth_store.database import schema
from oauth_store.database.store import Store
from oauth_store.errors import ConfigurationError
from oauth_store.flows import access
from oauth_store.flows.issuer import Issuer, ServerScopes
from oauth_store.server.middleware import ChallengeMiddleware, OutageMiddleware
from oauth_store.urls import check_public_urls


class _Verifier(TokenVerifier):
    """Verifies tokens in the database."""

    def __init__(self, issuer: Issuer, required_scopes: list[str] | None) -> None:
        super().__init__(required_scopes=required_scopes)
        self._issuer = issuer

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return a live access token for this server, or None, also while the path of its MCP endpoint is unknown."""
        resource = self._issuer.resource
        return None if resource is None else await access.verify(self._issuer, token, resource)


class StoreResource(RemoteAuthProvider):
    """Protects an MCP server with the tokens that a `SQLAlchemyOAuthProvider` elsewhere issues for it.

    Both use one database. That provider names this server's MCP endpoint in `resources`. A revoked token is refused at
    its next call, without a request to the authorization server and without a cache::

        auth = StoreResource(database, authorization_server="https://auth.example.com", base_url="https://files.example.com")
        mcp = FastMCP("files", auth=auth)
    """

    def __init__(
        self,
        database: str | Path | AsyncEngine | None = None,
        *,
        authorization_server: AnyHttpUrl | str,
        base_url: AnyHttpUrl | str,
        resource_base_url: AnyHttpUrl | str | None = None,
        required_scopes: Sequence[str] | None = None,
        scopes_supported: Sequence[str] | None = None,
        resource_name: str | None = None,
    ) -> None:
        """Check the settings. The database is opened at first use. It has to exist: the other server creates it.

        Args:
            database: As for `SQLAlchemyOAuthProvider`.
            authorization_server: The `issuer_url` of the provider that issues the tokens, or else its `base_url`.
            base_url: The public URL of this server.
            resource_base_url: The public URL of its MCP endpoint, if that is elsewhere.
            required_scopes: The scopes that every token must have.
            scopes_supported: The scopes that clients should ask for. Default: the required ones.
            resource_name: A name of this server for clients to show.

        Raises:
            ConfigurationError: If a setting is missing or unusable.
        """
        check_public_urls(
            authorization_server=authorization_server, base_url=base_url, resource_base_url=resource_base_url
        )
        for name, scopes in (("required_scopes", required_scopes), ("scopes_supported", scopes_supported)):
            if isinstance(scopes, str):
                raise ConfigurationError(f"{name} is {scopes!r}; expected a list, such as [{scopes!r}]")
        required = list(required_scopes or ())
        self._store = Store(database, schema.require)
        if self._store.in_memory and self._store.owned:
            raise ConfigurationError(
                "database is in memory, which no authorization server can share; name the file or server that it uses"
            )
        self.issuer = Issuer(
            store=self._store,
            url=str(authorization_server),
            scopes=ServerScopes(required=required),
            code_expiry_seconds=0,
            access_expiry_seconds=0,
            refresh_expiry_seconds=0,
            grace_seconds=0,
            after_commit=lambda: None,
        )
        super().__init__(
            token_verifier=_Verifier(self.issuer, required),
            authorization_servers=[AnyHttpUrl(str(authorization_server))],
            base_url=base_url,
            resource_base_url=resource_base_url,
            scopes_supported=None if scopes_supported is None else list(scopes_supported),
            resource_name=resource_name,
        )

    async def check_schema(self) -> None:
        """Open the database now, as in a server's lifespan. Raises `SchemaError` or `DatabaseUnavailable`."""
        await self._store.open()

    async def aclose(self) -> None:
        """Finish the steps in progress and close all connections. Using the server again reopens them."""
        await self._store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def set_mcp_path(self, mcp_path: str | None) -> None:
        """Set the path of the MCP endpoint, and so the resource that tokens are for. A known path is never unset."""
        if mcp_path is not None or self._mcp_path is None:
            super().set_mcp_path(mcp_path)
            self.issuer.resource = None if self._mcp_path is None else str(self._resource_url)

    def get_middleware(self) -> list[Middleware]:
        """Return FastMCP's middleware between ours: outages get 503, and every request without a token gets 401."""
        return [
            Middleware(OutageMiddleware),
            *super().get_middleware(),
            Middleware(ChallengeMiddleware, is_protected=lambda path: path == self._mcp_path),
        ]
