"""The server's metadata (RFC 8414), with what the SDK leaves out."""

from typing import cast

from fastmcp.server.auth import OAuthProvider
from fastmcp.server.auth.identity_assertion import ID_JAG_GRANT_PROFILE
from mcp.server.auth.routes import build_metadata
from mcp.server.auth.settings import ClientRegistrationOptions, RevocationOptions
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthMetadata
from pydantic import AnyHttpUrl

from oauth_store.flows.assertions import ALGORITHMS
from oauth_store.flows.clients import PRIVATE_KEY_JWT
from oauth_store.flows.connected import CLIENT_CREDENTIALS, DEVICE_CODE


class ServerMetadata(OAuthMetadata):
    """The metadata, with a field that the SDK does not know (RFC 8628, section 4)."""

    device_authorization_endpoint: AnyHttpUrl | None = None


def server_metadata(
    provider: OAuthProvider,
    *,
    takes_documents: bool,
    takes_identities: bool,
    device_url: str | None,
    introspection_url: str | None,
) -> ServerMetadata:
    """Return the metadata of a server. `device_url` is where devices ask for their codes, if they can.

    `introspection_url` is where other servers ask about tokens, if there are others.
    """
    built = build_metadata(
        cast(AnyHttpUrl, provider.base_url),  # neither of the two is ever None here
        provider.service_documentation_url,
        provider.client_registration_options or ClientRegistrationOptions(),
        provider.revocation_options or RevocationOptions(),
    )
    metadata = ServerMetadata(**dict(built))
    metadata.issuer = cast(AnyHttpUrl, provider.issuer_url)
    # Always: the owner may add a machine while the server runs, and clients keep the metadata that they have read.
    metadata.grant_types_supported = [*(metadata.grant_types_supported or ()), CLIENT_CREDENTIALS]
    if device_url is not None:
        metadata.device_authorization_endpoint = AnyHttpUrl(device_url)
        metadata.grant_types_supported.append(DEVICE_CODE)
    if introspection_url is not None:
        metadata.introspection_endpoint = AnyHttpUrl(introspection_url)
        metadata.introspection_endpoint_auth_methods_supported = ["client_secret_post", "client_secret_basic"]
    if takes_identities:
        metadata.grant_types_supported.append(JWT_BEARER_GRANT_TYPE)
        metadata.authorization_grant_profiles_supported = [ID_JAG_GRANT_PROFILE]
    metadata.token_endpoint_auth_methods_supported = ["none", "client_secret_post", "client_secret_basic"]
    if takes_documents:
        metadata.token_endpoint_auth_methods_supported.append(PRIVATE_KEY_JWT)
        metadata.token_endpoint_auth_signing_alg_values_supported = ALGORITHMS
    if metadata.revocation_endpoint is not None:
        algorithms = metadata.token_endpoint_auth_signing_alg_values_supported
        metadata.revocation_endpoint_auth_signing_alg_values_supported = algorithms
        metadata.revocation_endpoint_auth_methods_supported = metadata.token_endpoint_auth_methods_supported
    metadata.scopes_supported = metadata.scopes_supported or provider.required_scopes or None
    metadata.client_id_metadata_document_supported = takes_documents or None
    metadata.authorization_response_iss_parameter_supported = True  # RFC 9207
    return metadata
