"""Errors for operators. Each message says what was found, what was expected, and what to do."""


class OAuthStoreError(Exception):
    """The base class of all errors of `oauth_store`."""


class ConfigurationError(OAuthStoreError):
    """A setting is missing, contradictory or unusable. Raised at construction, or when the database is opened."""


class SchemaError(OAuthStoreError):
    """The database does not have the schema that this release needs, or does not belong to `oauth_store`."""


class DatabaseUnavailable(OAuthStoreError):
    """The database cannot be reached, opened or written right now. Clients get 503 with `Retry-After`."""


class LostRaceError(Exception):
    """An UPDATE found no row, because another writer was faster. The step runs again."""
