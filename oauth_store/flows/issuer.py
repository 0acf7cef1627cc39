"""The store and the settings with which a server issues codes and tokens."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mcp.server.auth.settings import ClientRegistrationOptions

from oauth_store.database.store import Store
from oauth_store.errors import ConfigurationError
from oauth_store.urls import known_as, same_resource


@dataclass(frozen=True, slots=True)
class ServerScopes:
    """The scopes of a server."""

    usual: Sequence[str] = ()
    """For a client that names none."""
    required: Sequence[str] = ()
    """In every token."""
    listed: Collection[str] | None = None
    """Those that a registration may name, or None if the server does not list them."""

    @classmethod
    def of(cls, options: ClientRegistrationOptions | None, required: Sequence[str]) -> "ServerScopes":
        """Return the scopes that a server's settings name."""
        listed = None if options is None else options.valid_scopes
        usual = (options and options.default_scopes) or listed or required
        return cls(usual, required, listed)

    @property
    def valid(self) -> Mapping[str, None] | None:
        """All that exist, or None if the server does not list them."""
        return None if self.listed is None else dict.fromkeys([*self.listed, *self.usual])


MOST_SECONDS = 100 * 365 * 24 * 3600
"""More than any lifetime that makes sense, and few enough for every database."""


def check_seconds(**settings: int) -> None:
    """Raise `ConfigurationError` unless each setting is a number of seconds: 1 or more, or 0 for a grace."""
    for name, seconds in settings.items():
        least = 0 if "grace" in name else 1
        if isinstance(seconds, bool) or not isinstance(seconds, int) or not least <= seconds <= MOST_SECONDS:
            raise ConfigurationError(
                f"{name} is {seconds!r}; expected a whole number of seconds, from {least} to {MOST_SECONDS} (100 years)"
            )


class UnknownResourceError(Exception):
    """A request names a resource for which this server issues no tokens."""


@dataclass(slots=True)
class Issuer:
    """The store and the settings of a server that issues codes and tokens."""

    store: Store
    url: str
    """What RFC 9207 calls `iss`."""
    scopes: ServerScopes
    code_expiry_seconds: int
    access_expiry_seconds: int
    refresh_expiry_seconds: int
    grace_seconds: int
    after_commit: Callable[[], None]
    """Called when a step has left rows that will expire, so that the purge can run."""
    resources: Sequence[str] = ()
    """The MCP endpoints of other servers for which tokens are issued too."""
    device_url: str | None = None
    """The page where the user codes of devices are typed (RFC 8628), or None if devices cannot sign in."""
    uses: dict[bytes, float] = field(default_factory=dict, init=False, repr=False)
    """When access tokens were used, by their hashes, as far as that is stored already."""
    resource: str | None = field(default=None, init=False)
    """This server's own MCP endpoint, the resource of its tokens (RFC 8707). None until its path is known."""

    @property
    def known(self) -> tuple[str, ...] | None:
        """All resources for which this server issues tokens, or None while the MCP path is unknown."""
        if self.resource is None:
            return None
        return (self.resource, *(other for other in self.resources if not self.is_own(other)))

    def is_ours(self, resource: str | None) -> bool:
        """Return whether a row with this resource belongs to this server: several may share a database.

        A null one came from VS-2, and belongs to any server that reads it. While the MCP path is unknown, all are ours.
        """
        return self.is_own(resource) or known_as(resource, self.resources) is not None

    def is_own(self, resource: str | None) -> bool:
        """Return whether a token with this resource is good at this server's own MCP endpoint."""
        return resource is None or self.resource is None or same_resource(resource, self.resource)

    def target(self, asked: str | None) -> str | None:
        """Return the resource of a request that names one, or none: then it is this server's own.

        Raises `UnknownResourceError` for one that is not ours.
        """
        if not asked or self.resource is None:
            return self.resource or asked
        named = known_as(asked, self.known or ())
        if named is None:
            raise UnknownResourceError("resource does not name this server")
        return named
