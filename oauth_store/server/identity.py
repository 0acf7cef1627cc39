"""The grant of an identity provider's assertion at /token (SEP-990; RFC 7523, section 2.1)."""

from mcp.server.auth.provider import TokenError
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthToken

from oauth_store.flows import clients, identity
from oauth_store.flows.assertions import Secret
from oauth_store.flows.clients import as_stored, is_client_id
from oauth_store.flows.identity import PresentedIdentity
from oauth_store.server.authorize import Server


async def identity_tokens(server: Server, client_id: str, secret: Secret, fields: dict[str, str]) -> OAuthToken:
    """Return the access token of a user, from the provider's public method, which an application may have overridden.

    The checks and their order are the SDK's: only a confidential client that registered for the grant gets as far.
    Raises `TokenError` or `AuthenticationError`.
    """
    found = await server.provider.get_client(client_id) if is_client_id(client_id) else None
    client = clients.authenticate(None if found is None else as_stored(found, server.issuer.scopes), secret)
    if "assertion" not in fields:
        raise TokenError("invalid_request", "assertion is missing")
    if JWT_BEARER_GRANT_TYPE not in client.grant_types or client.is_public:  # which the owner alone adds
        raise TokenError("unauthorized_client", "the owner of this server did not add the client for this grant_type")
    params = PresentedIdentity.of(fields["assertion"], fields.get("scope", ""), fields.get("resource"), secret)
    tokens = await server.provider.exchange_identity_assertion(client, params)
    if not params.is_spent:
        await identity.use_up(server.issuer, secret)
    return tokens
