"""The contenders of the in-process benchmarks: providers, and code that does the same work without one."""

import time
from abc import ABC, abstractmethod
from typing import Any

import asyncpg
from fastmcp.server.auth import OAuthProvider
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from oauth_store import AutoApproval, RateLimits, SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.flows import access
from tests.steps import BASE_URL, authorization_params, query_of, redeem, refresh
from tests.workers import settle

IN_MEMORY = "InMemoryOAuthProvider"
SQLITE = "SQLite"
POSTGRESQL = "PostgreSQL"
MARIADB = "MariaDB"
PLAIN_SQLITE = "plain sqlite3"
BARE_ASYNCPG = "bare asyncpg"

UNLIMITED = RateLimits(
    registrations_per_address=None, registrations=None, authorizations_per_address=None, authorizations=None
)
_PARAMS = authorization_params()


class Contender(ABC):
    """The work of one client. `refresh` and `revoke` load the token first, like the handlers."""

    client: OAuthClientInformationFull
    verifies_only = False

    @abstractmethod
    async def register(self, client: OAuthClientInformationFull) -> None: ...
    @abstractmethod
    async def sign_in(self, client: OAuthClientInformationFull) -> OAuthToken: ...
    @abstractmethod
    async def verify(self, token: OAuthToken) -> Any: ...
    @abstractmethod
    async def get_client(self, client: OAuthClientInformationFull) -> Any: ...
    @abstractmethod
    async def refresh(self, token: OAuthToken) -> OAuthToken: ...
    @abstractmethod
    async def revoke(self, token: OAuthToken) -> None: ...
    @abstractmethod
    async def close(self) -> None: ...

    async def flow(self, client: OAuthClientInformationFull) -> None:
        """Register, authorize, and exchange the code."""
        await self.register(client)
        await self.sign_in(client)

    async def settle(self) -> None:
        """Wait for background work to finish."""
        return


class Provider(Contender):
    """A provider, called the way FastMCP and the SDK's handlers call it."""

    def __init__(self, provider: OAuthProvider) -> None:
        provider.set_mcp_path("/mcp")
        self.provider = provider

    async def register(self, client: OAuthClientInformationFull) -> None:
        await self.provider.register_client(client)

    async def sign_in(self, client: OAuthClientInformationFull) -> OAuthToken:
        code = query_of(await self.provider.authorize(client, _PARAMS))["code"]
        return await redeem(self.provider, client, code)

    async def verify(self, token: OAuthToken) -> Any:
        return await self.provider.verify_token(token.access_token)

    async def get_client(self, client: OAuthClientInformationFull) -> Any:
        return await self.provider.get_client(client.client_id)

    async def refresh(self, token: OAuthToken) -> OAuthToken:
        return await refresh(self.provider, self.client, token)

    async def revoke(self, token: OAuthToken) -> None:
        loaded = await self.provider.load_refresh_token(self.client, str(token.refresh_token))
        assert loaded is not None
        await self.provider.revoke_token(loaded)

    async def settle(self) -> None:
        if isinstance(self.provider, SQLAlchemyOAuthProvider):
            await settle(self.provider)

    async def close(self) -> None:
        if isinstance(self.provider, SQLAlchemyOAuthProvider):
            await self.provider.aclose()


def new_provider(url: str) -> SQLAlchemyOAuthProvider:
    """Return a provider that approves every client, without rate limits."""
    return SQLAlchemyOAuthProvider(url, base_url=BASE_URL, approval=AutoApproval(), rate_limits=UNLIMITED)


class BareAsyncpg(Provider):
    """One round trip to PostgreSQL with the select that a verification sends. asyncpg keeps it prepared."""

    verifies_only = True

    def __init__(self, provider: OAuthProvider, connection: asyncpg.Connection) -> None:
        super().__init__(provider)
        self._connection = connection
        compiled = access._live_token_by_hash.compile(dialect=dialect())  # type: ignore[no-untyped-call]  # of SQLAlchemy
        self._sql, self._built_in, self._names = str(compiled), compiled.params, compiled.positiontup or []

    @classmethod
    async def connect(cls, url: str) -> "BareAsyncpg":
        return cls(new_provider(url), await asyncpg.connect(url))

    async def verify(self, token: OAuthToken) -> Any:
        values = {**self._built_in, "b_hash": hash_secret(token.access_token), "b_now": int(time.time())}
        return await self._connection.fetchrow(self._sql, *(values[name] for name in self._names))

    async def close(self) -> None:
        await self._connection.close()
        await super().close()
