"""A provider with an owner, who lets clients in: what the command line is tried on."""

from mcp.shared.auth import OAuthToken

from tests.approvals import Asks
from tests.databases import grant_id_of
from tests.steps import Provider, authorization_params, new_client, query_of, redeem
from tests.workers import settle


class House:
    """A provider with clients, and grants that somebody approved."""

    def __init__(self, make_provider: Provider) -> None:
        self.asks = Asks()
        self.provider = make_provider(approval=self.asks)
        self.client = new_client(client_id="client-of-the-house")

    async def code(self, subject: str | None = None, client_id: str = "client-of-the-house") -> str:
        """A code that waits for its client."""
        client = new_client(client_id=client_id)
        await self.provider.register_client(client)
        await self.provider.authorize(client, authorization_params())
        return query_of(await self.provider.approve(self.asks.handle, subject=subject))["code"]

    async def grant(self, subject: str | None = None, client_id: str = "client-of-the-house") -> OAuthToken:
        """The tokens of a grant."""
        code = await self.code(subject, client_id)
        return await redeem(self.provider, new_client(client_id=client_id), code)

    async def lives(self, token: OAuthToken) -> bool:
        """Whether the server accepts a token.

        A command that a test runs then blocks this event loop: a stamp under way would keep its lock from the command.
        """
        accepted = await self.provider.verify_token(token.access_token)
        await settle(self.provider)
        return accepted is not None

    async def grant_id(self, token: OAuthToken) -> str:
        """The id of a token's grant."""
        return (await grant_id_of(self.provider, token)).hex()
