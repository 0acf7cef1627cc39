"""A persistent OAuth 2.1 provider for FastMCP servers: clients stay authorized through restarts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oauth_store.approval import AuthorizationRequest, AutoApproval
    from oauth_store.database.names import include_name
    from oauth_store.errors import ConfigurationError, DatabaseUnavailable, OAuthStoreError, SchemaError
    from oauth_store.notifications import Notification
    from oauth_store.pages.oidc import OidcApproval
    from oauth_store.pages.passkey import PasskeyApproval
    from oauth_store.pages.password import PasswordApproval
    from oauth_store.provider import Approval, SQLAlchemyOAuthProvider
    from oauth_store.rate_limits import RateLimits
    from oauth_store.resource import StoreResource

__all__ = [
    "Approval",
    "AuthorizationRequest",
    "AutoApproval",
    "ConfigurationError",
    "DatabaseUnavailable",
    "Notification",
    "OAuthStoreError",
    "OidcApproval",
    "PasskeyApproval",
    "PasswordApproval",
    "RateLimits",
    "SQLAlchemyOAuthProvider",
    "SchemaError",
    "StoreResource",
    "include_name",
]

_MODULES = {
    "approval": ("AuthorizationRequest", "AutoApproval"),
    "database.names": ("include_name",),
    "errors": ("ConfigurationError", "DatabaseUnavailable", "OAuthStoreError", "SchemaError"),
    "rate_limits": ("RateLimits",),
    "notifications": ("Notification",),
    "pages.oidc": ("OidcApproval",),
    "pages.passkey": ("PasskeyApproval",),
    "pages.password": ("PasswordApproval",),
    "provider": ("Approval", "SQLAlchemyOAuthProvider"),
    "resource": ("StoreResource",),
}
_HOMES = {name: f"oauth_store.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import an export on first access (PEP 562): the command line does not need FastMCP, which takes a second."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
