"""The parameters of a request: each counts once, and an empty one not at all (RFC 6749, sections 3.1 and 3.2)."""

from collections.abc import Iterable, Mapping, Sequence

from oauth_store.flows.clients import SCOPES
from oauth_store.urls import known_as

SCOPE_LENGTH = 8 * 1024
"""The longest `scope`, in characters."""


class ParameterError(Exception):
    """A request cannot be parsed; the message says why, and quotes nothing."""


def check_scope(fields: Mapping[str, str]) -> None:
    """Raise `ParameterError` if a request names more scopes than anyone needs."""
    scope = fields.get("scope", "")
    if len(scope) > SCOPE_LENGTH or len(scope.split()) > SCOPES:
        raise ParameterError(f"scope has more than {SCOPES} scopes or {SCOPE_LENGTH} characters")


def single(pairs: Iterable[tuple[str, object]], known: Sequence[str] | None) -> dict[str, str]:
    """Return the value of each parameter.

    A parameter repeated with the same value counts once. Of several resources (RFC 8707, section 2), the first that
    this server knows is used, else the first. Raises `ParameterError` for any other parameter with two values.
    """
    values: dict[str, str] = {}
    for name, value in pairs:
        if not isinstance(value, str) or not value:
            continue
        earlier = values.setdefault(name, value)
        if earlier == value:
            continue
        if name != "resource":
            raise ParameterError("a parameter is given twice, with different values")
        if known_as(value, known or ()) is not None and known_as(earlier, known or ()) is None:
            values[name] = value
    return values
