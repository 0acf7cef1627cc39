"""What agent products send to a server, as recorded from the products themselves, in these versions.

Of each: what it registers, and the parameters of its requests, in their order. A parameter with a question mark is left
out where its value is empty. A new recording is one more entry.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BOTH_GRANTS = ("authorization_code", "refresh_token")
AUTHORIZATION = "response_type client_id code_challenge code_challenge_method redirect_uri state scope? resource"
EXCHANGE = "grant_type code code_verifier redirect_uri resource client_id"
REFRESH = "grant_type refresh_token resource client_id"


@dataclass(frozen=True)
class Product:
    """An agent product; lengths are in characters."""

    name: str
    package: str
    registered: dict[str, Any]
    """The metadata that it registers, beside its redirect URI, its grants and what `registration` names."""
    callback: str
    """The redirect URI. A * is a port that is another each time."""
    opening: dict[str, Any]
    """The first message that it sends with a token."""
    state_length: int
    verifier_length: int = 43
    grants: tuple[str, ...] = BOTH_GRANTS
    registration: str = ""
    authorization: str = AUTHORIZATION
    exchange: str = EXCHANGE
    refresh: str | None = REFRESH
    """None: it was not seen to refresh."""
    document: bool = False
    """It names itself by a metadata document, where the server takes one."""
    probes: bool = False
    """It asks for the MCP endpoint by GET or HEAD before it has a token."""
    agent: str | None = None
    """Its User-Agent."""
    accept: tuple[str | None, str | None, str] = ("*/*", "application/json", "application/json, text/event-stream")
    """At /register, at /token and at the MCP endpoint."""
    form_type: str = "application/x-www-form-urlencoded"
    headers: dict[str, str] = field(default_factory=dict)
    """More headers of the first message."""

    def callback_at(self, port: int) -> str:
        """The redirect URI, with this port where it is another each time."""
        return self.callback.replace("*", str(port))

    def __str__(self) -> str:
        return self.name


def initialize(protocol: str, **client: str) -> dict[str, Any]:
    """The message that opens a session."""
    return {
        "method": "initialize",
        "params": {"protocolVersion": protocol, "capabilities": {}, "clientInfo": client},
    }


def sent(names: str, values: Mapping[str, str]) -> dict[str, str]:
    """These parameters with their values, without those that are left out."""
    asked = [(name.rstrip("?"), name.endswith("?")) for name in names.split()]
    return {name: values[name] for name, optional in asked if values[name] or not optional}


def fresh(length: int) -> str:
    """A random string."""
    return secrets.token_urlsafe(length)[:length]


CODE = {"response_types": ["code"]}
PUBLIC = {**CODE, "token_endpoint_auth_method": "none"}
NATIVE = {**PUBLIC, "application_type": "native"}

PRODUCTS = [
    Product(
        "Claude Code",
        "@anthropic-ai/claude-code 2.1.332",
        registered={**NATIVE, "client_name": "Claude Code (wiki)"},
        callback="http://localhost:*/callback",
        document=True,
        state_length=43,
        agent="Bun/1.4.6",
        headers={"mcp-method": "server/discover", "mcp-protocol-version": "2026-07-28"},
        opening={
            "method": "server/discover",
            "params": {
                "_meta": {
                    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                    "io.modelcontextprotocol/clientInfo": {"name": "claude-code", "version": "2.1.332"},
                    "io.modelcontextprotocol/clientCapabilities": {},
                }
            },
        },
    ),
    Product(
        "Codex",
        "@openai/codex 0.171.0",
        registered={**NATIVE, "client_name": "Codex"},
        callback="http://127.0.0.1:*/callback",
        document=True,
        probes=True,
        state_length=22,
        authorization="response_type client_id state code_challenge code_challenge_method redirect_uri scope? resource",
        exchange="grant_type code code_verifier client_id redirect_uri resource",
        refresh="grant_type refresh_token scope client_id resource",
        agent="codex-mcp-client/0.171.0",
        accept=("*/*", "application/json", "text/event-stream, application/json"),
        opening=initialize("2025-06-18", name="codex-mcp-client", title="Codex", version="0.171.0"),
    ),
    Product(
        "Gemini CLI",
        "@google/gemini-cli 0.61.0",
        registered={**PUBLIC, "client_name": "Gemini CLI MCP Client"},
        registration="scope",
        callback="http://localhost:*/oauth/callback",
        probes=True,
        state_length=22,
        verifier_length=86,
        authorization="client_id response_type redirect_uri state code_challenge code_challenge_method scope? resource",
        exchange="grant_type code redirect_uri code_verifier client_id resource",
        refresh="grant_type refresh_token client_id resource",
        agent="node",
        accept=(
            "*/*",
            "application/json, application/x-www-form-urlencoded",
            "application/json, text/event-stream",
        ),
        opening=initialize("2025-06-18", name="gemini-cli-mcp-client", version="0.61.0"),
    ),
    Product(
        "langchain-mcp-adapters",
        "langchain-mcp-adapters 0.3.2, mcp 1.30.0",
        registered={**CODE, "client_name": "langchain agent"},
        registration="scope",
        callback="http://127.0.0.1:33033/callback",
        state_length=43,
        verifier_length=128,
        authorization="response_type client_id redirect_uri state code_challenge code_challenge_method resource scope?",
        exchange="grant_type code redirect_uri client_id code_verifier resource client_secret",
        refresh=None,
        accept=(None, None, "application/json, text/event-stream"),
        opening=initialize("2025-11-25", name="mcp", version="0.1.0"),
    ),
    Product(
        "mcporter",
        "mcporter 0.12.3",
        registered={**PUBLIC, "client_name": "mcporter (wiki)"},
        registration="scope?",
        callback="http://127.0.0.1:*/callback",
        state_length=36,
        agent="node",
        accept=(
            "application/json, text/event-stream",
            "application/json",
            "application/json, text/event-stream",
        ),
        opening=initialize("2025-11-25", name="mcporter", version="0.12.3"),
    ),
    Product(
        "mcp-remote",
        "mcp-remote 0.15.1",
        registered={
            **NATIVE,
            "client_name": "MCP CLI Proxy",
            "client_uri": "https://github.com/modelcontextprotocol/mcp-cli",
            "software_id": "2e6dc280-f3c3-4e01-99a7-8181dbd1d23d",
            "software_version": "0.15.1",
        },
        registration="scope?",
        callback="http://localhost:*/oauth/callback",
        probes=True,
        state_length=36,
        refresh="grant_type refresh_token resource client_id scope?",
        agent="undici",
        headers={"mcp-method": "initialize"},
        opening=initialize("2025-11-25", name="mcp-remote-fallback-test", version="0.0.0"),
    ),
    Product(
        "mcp-use",
        "mcp-use 1.7.1, mcp 1.30.0, Authlib 1.9.10",
        registered={**NATIVE, "client_name": "mcp-use"},
        callback="http://localhost:8080/callback",
        probes=True,
        grants=("authorization_code",),
        state_length=43,
        verifier_length=86,
        authorization="response_type client_id redirect_uri state resource code_challenge code_challenge_method",
        exchange="grant_type redirect_uri code_verifier code client_id",
        refresh=None,
        agent="python-httpx/0.28.1",
        form_type="application/x-www-form-urlencoded;charset=UTF-8",
        opening=initialize(
            "2025-11-25", name="mcp-use", version="1.7.1", websiteUrl="https://github.com/mcp-use/mcp-use"
        ),
    ),
    Product(
        "opencode",
        "opencode-ai 1.18.33",
        registered={**PUBLIC, "client_name": "OpenCode", "client_uri": "https://opencode.ai"},
        registration="scope?",
        callback="http://127.0.0.1:19876/mcp/oauth/callback",
        state_length=64,
        agent="opencode/1.18.33",
        opening=initialize("2025-11-25", name="opencode", version="1.18.33"),
    ),
]
