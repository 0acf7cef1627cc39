"""The grant of an identity provider's assertion at /token (SEP-990; RFC 7523, section 2.1)."""

from mcp.server.auth.provider import TokenError
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthToken

from oauth_store.flows import clients, identity
from oauth_store.flows.assertions import Secret
from oauth_store.flows.clients import StoredClient, is_client_id
from oauth_store.flows.identity import PresentedIdentity
from oauth_store.server.authorize import Server


async def identity_tokens(server: Server, client_id: str, secret: Secret, fields: dict[str, str]) -> OAuthToken:
    """Return the access token of a user, from the provider's public method, which an application may have overridden.

    The checks and their order are the SDK's: only a confidential client that registered for the grant gets as far.
    Raises `TokenError` or `AuthenticationError`.
    """
    found = await server.provider.get_client(client_id) if is_client_id(client_id) else None
    client = clients.authenticate(found if isinstance(found, StoredClient) else None, secret)
    if "assertion" not in fields:
        raise TokenError("invalid_request", "assertion is missing")
    if JWT_BEARER_GRANT_TYPE not in client.grant_types:
        raise TokenError("unauthorized_client", f"the client did not register for {JWT_BEARER_GRANT_TYPE}")
    if client.is_public:
        raise TokenError("unauthorized_client", "identity assertions are for clients that authenticate")
    params = PresentedIdentity.of(fields["assertion"], fields.get("scope", ""), fields.get("resource"), secret)
    tokens = await server.provider.exchange_identity_assertion(client, params)
    if not params.is_spent:
        await identity.use_up(server.issuer, secret)
    return tokens
