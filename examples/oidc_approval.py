"""A server whose owner signs in with Google, Microsoft, GitHub or another identity provider.

docs/approval.md says what to set MCP_OAUTH_OIDC_ISSUER, _CLIENT_ID, _CLIENT_SECRET and _ALLOW to, for each provider.
"""

import os

from fastmcp import FastMCP

from oauth_store import OidcApproval, SQLAlchemyOAuthProvider

base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
mcp: FastMCP[None] = FastMCP("wiki", auth=SQLAlchemyOAuthProvider(base_url=base_url, approval=OidcApproval()))
mcp.tool(lambda title: f"{title}: for authorized clients only", name="read_page")

if __name__ == "__main__":
    mcp.run(transport="http", host="127.0.0.1", port=8000, stateless_http=True, show_banner=False)
