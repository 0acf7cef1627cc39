"""Checks that this machine can fetch client ID metadata documents, as a server that accepts them must."""

import asyncio

from oauth_store.doctor.finding import Finding, ok, warning
from oauth_store.flows.documented_clients import client_documents
from oauth_store.flows.metadata_documents import DocumentError

CLAUDE = "https://claude.ai/oauth/mcp-oauth-client-metadata"
"""The document of Claude.ai, which never registers with a server that accepts documents."""


def examine_documents(url: str = CLAUDE) -> Finding:
    """Fetch a document from this machine, as the server does. Blocks for at most ten seconds."""
    check = "client documents"
    try:
        asyncio.run(client_documents().fetch(url, address=""))
    except DocumentError as error:
        return warning(
            check,
            f"this machine cannot fetch {url}: {error}",
            "if the server cannot fetch it either, Claude cannot connect: let the server reach the internet, or pass "
            "metadata_documents=False to SQLAlchemyOAuthProvider, so that apps register instead",
        )
    return ok(check, f"this machine can fetch {url}")
