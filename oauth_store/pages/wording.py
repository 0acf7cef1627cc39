"""How the pages describe an app: where its code goes, its scopes, and for how long."""

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
"""The exact redirect URIs of well-known clients: elsewhere on their hosts there may be pages of others, or an open
redirect. The page warns of all others."""
CHATGPT_CONNECTOR = re.compile(r"https://chatgpt\.com/connector/oauth/[\w-]+", re.ASCII)
"""ChatGPT's redirect URIs with an id for each connector."""


@dataclass(frozen=True, slots=True)
class Wording:
    """The scope descriptions and hosts that the owner has configured."""

    scope_descriptions: Mapping[str, str] = field(default_factory=dict)
    known_hosts: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a code will be sent, for display."""

    kind: str
    """`web`, `loopback`, `app` for an application's own scheme, or `device`."""
    host: str
    """The host, with its port unless it is the default; for an application's own scheme, the start of its links; for a
    device, the code that it shows."""
    known_as: str | None
    """Whose address it is, for display: of a well-known callback, or of a host that the owner configured."""

    @property
    def ending(self) -> str:
        """The end of a long host, which decides whose it is: `claude.ai.evil.example` belongs to `evil.example`."""
        labels = self.host.split(".")
        return ".".join(labels[-3:]) if len(labels) > 3 and self.kind == "web" else ""

    @classmethod
    def of(cls, redirect_uri: str, known_hosts: Collection[str] = ()) -> "Target":
        """Return where a redirect URI leads. `known_hosts` are hosts, or `host:port`, that the owner trusts."""
        uri = urlsplit(redirect_uri)
        host, named = uri.hostname or "", uri.netloc.rpartition("@")[2]
        if uri.scheme not in ("http", "https"):
            return cls("app", link_start(uri), None)
        if is_loopback_host(host):
            return cls("loopback", named, None)
        if uri.scheme != "https":  # registered before these were refused: anyone on the network could steal the code
            return cls("web", named, None)
        if CHATGPT_CONNECTOR.fullmatch(redirect_uri):
            return cls("web", named, "ChatGPT")
        known_as = "an app that this server knows" if named in known_hosts else None
        return cls("web", named, KNOWN_CALLBACKS.get(redirect_uri, known_as))


def document_host(client_id: str) -> str | None:
    """Return the host of a client ID metadata document, which was fetched from it; None for other clients."""
    return urlsplit(client_id).netloc if client_id.startswith("https://") else None


def scopes_in_words(scopes: Sequence[str], descriptions: Mapping[str, str]) -> list[str]:
    """Return what a client may do, in words."""
    words = [scope_in_words(scope, descriptions) for scope in scopes]
    return words or ["use everything that this server offers to apps"]


def scope_in_words(scope: str, descriptions: Mapping[str, str]) -> str:
    """Return what one scope allows, in words."""
    phrases = {OFFLINE_ACCESS: "stay connected while you are away", **descriptions}
    return short_line(phrases.get(scope, scope))


def in_words(seconds: int) -> str:
    """Return a duration in words, in the largest unit that fits at least twice or exactly."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((unit, length) for unit, length in units if seconds >= 2 * length or seconds == length)
    count = round(seconds / length)
    return f"{count} {unit}{'s' if count != 1 else ''}"
