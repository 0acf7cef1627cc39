"""The persistent OAuth 2.1 provider for FastMCP servers: clients stay authorized through restarts."""

from oauth_store.approval import Approval, AuthorizationRequest, AutoApproval
from oauth_store.errors import ConfigurationError, DatabaseUnavailable, OAuthStoreError, SchemaError
from oauth_store.floods import RateLimits
from oauth_store.password import PasswordApproval
from oauth_store.provider import SQLAlchemyOAuthProvider

__all__ = [
    "Approval",
    "AuthorizationRequest",
    "AutoApproval",
    "ConfigurationError",
    "DatabaseUnavailable",
    "OAuthStoreError",
    "PasswordApproval",
    "RateLimits",
    "SQLAlchemyOAuthProvider",
    "SchemaError",
]
