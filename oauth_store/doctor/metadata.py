"""What clients look for in the metadata of an authorization server (RFC 8414)."""

from collections.abc import Iterator
from typing import Any

from oauth_store.doctor.finding import Finding, ok, problem, warning

_OURS = "SQLAlchemyOAuthProvider says it: is this the server that you meant, and does a proxy rewrite its metadata?"


def examine_metadata(server: dict[str, Any]) -> Iterator[Finding]:
    """Look for what clients need, and for what spares their users a question."""
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
        yield problem(check, "no S256 in code_challenge_methods_supported: clients refuse that", _OURS)


def _grants(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if "refresh_token" not in _list(server, "grant_types_supported"):
        yield warning(check, "no refresh_token in grant_types_supported: users sign in again every hour", _OURS)


def _authentication(server: dict[str, Any], check: str) -> Iterator[Finding]:
    if "none" not in _list(server, "token_endpoint_auth_methods_supported"):
        yield warning(
            check,
            "no `none` in token_endpoint_auth_methods_supported: Claude registers anew at every connection",
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
            "no client_id_metadata_document_supported: Claude registers anew at every connection",
            f"with metadata_documents=False that is as it should be. Else: {_OURS}",
        )
    if not registration and not documents:
        yield problem(
            check,
            "no registration_endpoint: no client can make itself known",
            "pass client_registration_options=ClientRegistrationOptions(enabled=True) to the provider",
        )
    elif not registration:
        yield warning(
            check,
            "no registration_endpoint: clients that have no metadata document cannot connect",
            "switch registration on in client_registration_options, unless that is what you want",
        )


def _list(server: dict[str, Any], name: str) -> list[Any]:
    value = server.get(name)
    return value if isinstance(value, list) else []
