"""What a server has by default: an approval, and the page for devices that goes with any approval."""

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from starlette.routing import Route

from oauth_store.approval import OIDC, PASSWORD_HASH, Approver, LoopbackApproval, is_provider_set
from oauth_store.errors import ConfigurationError

if TYPE_CHECKING:
    from oauth_store.pages.approval import PageApproval
    from oauth_store.pages.html import Pages

DEVICE_PATH = "/device"

logger = logging.getLogger("oauth_store")


def default_approval(urls: list[str]) -> "PageApproval | LoopbackApproval":
    """Return the approval for a server with these public URLs whose owner has not chosen one.

    Raises `ConfigurationError` if there is no password and no identity provider, and one of the URLs is not loopback.
    """
    if is_provider_set():
        from oauth_store.pages.oidc import OidcApproval

        return OidcApproval()
    if os.environ.get(PASSWORD_HASH):
        from oauth_store.pages.password import PasswordApproval  # imports argon2 and jinja2 only where needed

        return PasswordApproval()
    public = [url for url in urls if not is_loopback_host(urlsplit(url).hostname)]
    if public:
        raise ConfigurationError(
            f"no approval is set for the public URL {public[0]}, so anyone who finds it could get a token; set "
            f"{PASSWORD_HASH} to the output of `oauth-store hash-password`, set {OIDC}_ISSUER to an identity provider, "
            "pass approval=<your own Approval> to ask the owner in another way, or pass approval=AutoApproval() to "
            "approve every client"
        )
    logger.warning("no approval is set: clients on this machine get in without one, all others are refused")
    return LoopbackApproval()


def check_asks(approval: object) -> None:
    """Raise `ConfigurationError` if an approval lets in this machine alone: devices are elsewhere."""
    if isinstance(approval, LoopbackApproval):
        raise ConfigurationError(
            "device_authorization lets in devices on other machines, and no approval is set; "
            f"set {PASSWORD_HASH} to the output of `oauth-store hash-password`, or pass an approval that asks you"
        )


def device_page(provider: Approver, approval: Any, pages: "Pages") -> Route:
    """Return the page where the owner types the code of a device, and from which the browser goes to the approval."""
    from oauth_store.pages.device import DevicePage  # imports what the pages need only where devices can sign in
    from oauth_store.pages.sign_in import SignIn

    sign_in = getattr(approval, "sign_in", None)
    known = sign_in if isinstance(sign_in, SignIn) else None
    page = DevicePage(provider, partial(approval.authorize, provider), pages, known)
    return Route(DEVICE_PATH, page.handle, methods=["GET", "POST"])
