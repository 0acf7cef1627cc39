"""Client ID metadata documents: a client whose client_id is the https URL of its own description."""

import logging
import re
from urllib.parse import urlsplit

from fastmcp.server.auth.cimd import CIMDFetcher, CIMDFetchError, CIMDValidationError
from fastmcp.server.auth.ssrf import SSRFError
from mcp.server.auth.provider import RegistrationError
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import ValidationError

from oauth_store.clients import check_redirect_uris

logger = logging.getLogger("oauth_store")

# FastMCP has one exception for a host that cannot be reached and for one whose answer is no document.
_REFUSED = re.compile(r"HTTP (404|410) |Response too large")


class InvalidDocumentError(Exception):
    """A document was retrieved, and describes no client that can be let in."""


class MetadataDocuments:
    """Fetches documents and keeps them as long as their cache headers say; FastMCP guards it against SSRF."""

    def __init__(self) -> None:
        self._fetcher = CIMDFetcher()

    def names(self, client_id: str) -> bool:
        """Tell whether a client_id is the URL of a document: https, with a path, without fragment, user or dots.

        In ASCII, as URLs are (RFC 3986, section 2): the consent page shows its host, and letters of other scripts look
        like ours.
        """
        if not self._fetcher.is_cimd_client_id(client_id) or not re.fullmatch(r"[!-~]+", client_id) or "#" in client_id:
            return False
        url = urlsplit(client_id)
        return "@" not in url.netloc and not {".", ".."} & set(url.path.split("/"))

    async def fetch(self, client_id: str) -> OAuthClientInformationFull | None:
        """Return the client that a document describes, or None if the document cannot be retrieved now.

        Raises `InvalidDocumentError`.
        """
        try:
            document = await self._fetcher.fetch(client_id)
        except CIMDFetchError as error:
            if _REFUSED.match(str(error)):
                raise InvalidDocumentError(str(error)) from error
            logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
            return None
        except CIMDValidationError as error:
            if isinstance(error.__cause__, SSRFError):  # no name, or an address that is not public: nothing was read
                logger.warning("client metadata document %s cannot be retrieved: %s", client_id, error)
                return None
            raise InvalidDocumentError(str(error)) from error
        except (ValueError, RecursionError) as error:  # a port or a name that cannot be, or bytes that are no JSON
            raise InvalidDocumentError(f"the URL or the document cannot be read: {error}") from error
        if str(document.client_id) != client_id:  # FastMCP overlooks a trailing slash
            raise InvalidDocumentError("the document is of another client_id")
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
