"""Can client ID metadata documents be fetched from here? A server that offers to take them has to."""

import asyncio

from oauth_store.doctor.finding import Finding, ok, warning
from oauth_store.flows.documented_clients import DocumentError
from oauth_store.flows.metadata_documents import MetadataDocuments

CLAUDE = "https://claude.ai/oauth/mcp-oauth-client-metadata"
"""The document of Claude.ai, which never registers where documents are offered."""


def examine_documents(url: str = CLAUDE) -> Finding:
    """Fetch a document as the server does, from this machine. Blocks, for ten seconds at most."""
    check = "client documents"
    try:
        asyncio.run(MetadataDocuments().fetch(url, address=""))
    except DocumentError as error:
        return warning(
            check,
            f"{url} cannot be had from this machine: {error}",
            "if the server is on this machine, or no better off, Claude cannot connect: let the server reach the "
            "internet, or pass metadata_documents=False to SQLAlchemyOAuthProvider, and apps register",
        )
    return ok(check, f"{url} can be fetched from this machine")
