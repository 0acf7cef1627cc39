"""Checks of the authorization server metadata (RFC 8414) that clients rely on."""

from collections.abc import Iterator
from typing import Any

from oauth_store.doctor.finding import Finding, ok, problem, warning

_OURS = "SQLAlchemyOAuthProvider has it: is this the right server, and does a proxy rewrite its metadata?"


def examine_metadata(server: dict[str, Any]) -> Iterator[Finding]:
    """Check for what clients need, and for what saves their users a step."""
    check = "server metadata"
    missing = [
        *_pkce(server, check),
        *_grants(server, check),
        *_authentication(server, check),
        *_iss(server, check),
        *_registration(server, check),
    ]
    yield from missing or [ok(check, "S256, none, refresh_token, client ID metadata documents, iss and registration")]


def _pkce(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if "S256" not in _list(server, "code_challenge_methods_supported"):
        yield problem(check, "no S256 in code_challenge_methods_supported: clients refuse to connect", _OURS)


def _grants(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if "refresh_token" not in _list(server, "grant_types_supported"):
        yield warning(check, "no refresh_token in grant_types_supported: users sign in again every hour", _OURS)


def _authentication(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if "none" not in _list(server, "token_endpoint_auth_methods_supported"):
        yield warning(
            check,
            "no `none` in token_endpoint_auth_methods_supported: Claude registers again at every connection",
            _OURS,
        )


def _iss(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if server.get("authorization_response_iss_parameter_supported") is not True:
        yield warning(check, "no authorization_response_iss_parameter_supported (RFC 9207)", _OURS)


def _registration(server: dict[str, Any], check: str) -> Iterator[Finding]:
    documents = server.get("client_id_metadata_document_supported") is True
    registration = bool(server.get("registration_endpoint"))
    if not documents:
        yield warning(
            check,
            "no client_id_metadata_document_supported: Claude registers again at every connection",
            f"expected with metadata_documents=False. Otherwise: {_OURS}",
        )
    if not registration and not documents:
        yield problem(
            check,
            "no registration_endpoint: no client can register",
            "pass client_registration_options=ClientRegistrationOptions(enabled=True) to the provider",
        )
    elif not registration:
        yield warning(
            check,
            "no registration_endpoint: clients without a metadata document cannot connect",
            "enable registration in client_registration_options, unless you turned it off on purpose",
        )


def _list(server: dict[str, Any], name: str) -> list[Any]:
    value = server.get(name)
    return value if isinstance(value, list) else []
