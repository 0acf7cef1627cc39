"""The approval of a server whose owner has not chosen one."""

import logging
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host

from oauth_store.approval import PASSWORD_HASH, LoopbackApproval
from oauth_store.errors import ConfigurationError

if TYPE_CHECKING:
    from oauth_store.pages.password import PasswordApproval

logger = logging.getLogger("oauth_store")


def default_approval(urls: list[str]) -> "LoopbackApproval | PasswordApproval":
    """Return the approval for a server with these public URLs whose owner has not chosen one.

    Raises `ConfigurationError` if there is no password and one of the URLs is not loopback.
    """
    if os.environ.get(PASSWORD_HASH):
        from oauth_store.pages.password import PasswordApproval  # imports argon2 and jinja2 only where needed

        return PasswordApproval()
    public = [url for url in urls if not is_loopback_host(urlsplit(url).hostname)]
    if public:
        raise ConfigurationError(
            f"no approval is set for the public URL {public[0]}, so anyone who finds it could get a token; set "
            f"{PASSWORD_HASH} to the output of `oauth-store hash-password`, pass approval=<your own Approval> to ask "
            "the owner in another way, or pass approval=AutoApproval() to approve every client"
        )
    logger.warning("no approval is set: clients on this machine get in without one, all others are refused")
    return LoopbackApproval()
