"""What the pages say of apps: where a code goes, what it is for, and for how long."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host

from oauth_store.display import link_start, short_line
from oauth_store.flows.clients import OFFLINE_ACCESS

KNOWN_CALLBACKS = {
    "https://claude.ai/api/mcp/auth_callback": "Claude",
    "https://claude.com/api/mcp/auth_callback": "Claude",
    "https://chatgpt.com/connector_platform_oauth_redirect": "ChatGPT",
    "https://vscode.dev/redirect": "Visual Studio Code",
    "https://insiders.vscode.dev/redirect": "Visual Studio Code",
    "https://www.cursor.com/agents/mcp/oauth/callback": "Cursor",
}
"""Where well-known clients have their codes sent, to the letter: elsewhere on their hosts may stand pages of others, or
one that leads on. The page warns of all others."""
CHATGPT_CONNECTOR = re.compile(r"https://chatgpt\.com/connector/oauth/[\w-]+", re.ASCII)
"""Where ChatGPT has them sent that has an id for each connector."""


@dataclass(frozen=True, slots=True)
class Wording:
    """What the owner of a server has added to our words."""

    scope_descriptions: Mapping[str, str] = field(default_factory=dict)
    known_hosts: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a code will be sent, for people to read."""

    kind: str
    """`web`, `loopback`, or `app` for an application's own scheme."""
    host: str
    """The host, with a port that is not the usual one; of an application's own scheme, how its links begin."""
    known_as: str | None
    """Whose address it is, as the page says it: of a well-known callback, or of a host that the owner named."""

    @property
    def ending(self) -> str:
        """How a long host ends, which is what counts: `claude.ai.evil.example` belongs to `evil.example`."""
        labels = self.host.split(".")
        return ".".join(labels[-3:]) if len(labels) > 3 and self.kind == "web" else ""

    @classmethod
    def of(cls, redirect_uri: str, known_hosts: Collection[str] = ()) -> "Target":
        """Return where a redirect URI leads. `known_hosts` are hosts, or `host:port`, that the owner knows."""
        uri = urlsplit(redirect_uri)
        host, named = uri.hostname or "", uri.netloc.rpartition("@")[2]
        if uri.scheme not in ("http", "https"):
            return cls("app", link_start(uri), None)
        if is_loopback_host(host):
            return cls("loopback", named, None)
        if uri.scheme != "https":  # registered before such were refused: anyone on the way could take the code
            return cls("web", named, None)
        if CHATGPT_CONNECTOR.fullmatch(redirect_uri):
            return cls("web", named, "ChatGPT")
        known_as = "an app that this server knows" if named in known_hosts else None
        return cls("web", named, KNOWN_CALLBACKS.get(redirect_uri, known_as))


def document_host(client_id: str) -> str | None:
    """Return the host of a client ID metadata document, which was asked and so verified; None for other clients."""
    return urlsplit(client_id).netloc if client_id.startswith("https://") else None


def scopes_in_words(scopes: Sequence[str], descriptions: Mapping[str, str]) -> list[str]:
    """Return what a client may do, as people read it."""
    words = [scope_in_words(scope, descriptions) for scope in scopes]
    return words or ["use everything that this server offers to apps"]


def scope_in_words(scope: str, descriptions: Mapping[str, str]) -> str:
    """Return what one scope allows, as people read it."""
    phrases = {OFFLINE_ACCESS: "stay connected when you are not there", **descriptions}
    return short_line(phrases.get(scope, scope))


def in_words(seconds: int) -> str:
    """Return a duration in the largest unit that it is a few of."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((unit, length) for unit, length in units if seconds >= 2 * length or seconds == length)
    count = round(seconds / length)
    return f"{count} {unit}{'s' if count != 1 else ''}"
