"""Client ID metadata documents: a client whose client_id is the https URL of its own description."""

import logging

from fastmcp.server.auth.cimd import CIMDFetcher, CIMDFetchError, CIMDValidationError
from fastmcp.server.auth.ssrf import SSRFError
from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import ValidationError

from oauth_store.clients import check_redirect_uris

logger = logging.getLogger("oauth_store")


class InvalidDocumentError(Exception):
    """A document was retrieved, and describes no client that can be let in."""


class MetadataDocuments:
    """Fetches documents and keeps them as long as their cache headers say; FastMCP guards it against SSRF."""

    def __init__(self) -> None:
        self._fetcher = CIMDFetcher()

    def names(self, client_id: str) -> bool:
        """Tell whether a client_id is the URL of a document."""
        return self._fetcher.is_cimd_client_id(client_id)

    async def fetch(self, client_id: str) -> OAuthClientInformationFull | None:
        """Return the client that a document describes, or None if the document cannot be retrieved now.

        Raises `InvalidDocumentError`.
        """
        try:
            document = await self._fetcher.fetch(client_id)
        except CIMDFetchError as error:
            logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
            return None
        except CIMDValidationError as error:
            if isinstance(error.__cause__, SSRFError):  # no name, or an address that is not public: nothing was read
                logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
                return None
            raise InvalidDocumentError(str(error)) from error
        if document.token_endpoint_auth_method != "none":  # noqa: S105 (a method, no password)
            raise InvalidDocumentError("the client wants to authenticate by private_key_jwt, which is not supported")
        try:
            client = OAuthClientInformationFull.model_validate(
                {**document.model_dump(mode="json", exclude_none=True), "client_id": client_id}
            )
            check_redirect_uris(client)
        except (ValidationError, RegistrationError) as error:
            reason = error.error_description if isinstance(error, RegistrationError) else "a redirect URI is no URL"
            raise InvalidDocumentError(reason) from error
        return client
