"""What goes wrong for an operator. Each message says what was found, what was expected, and what to do."""


class OAuthStoreError(Exception):
    """The base of all errors of `oauth_store`."""


class ConfigurationError(OAuthStoreError):
    """A setting is missing, contradictory or not usable. Raised at construction."""


class SchemaError(OAuthStoreError):
    """The database is not at the schema that this release needs, or is no database of ours."""


class DatabaseUnavailable(OAuthStoreError):
    """The database cannot be reached, opened or written just now. Clients are told to try again."""


class LostRaceError(Exception):
    """An UPDATE found nothing of what was there a moment ago: somebody else was faster. The step is taken again."""
