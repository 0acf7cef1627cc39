"""The parameters of a request: each counts once, and an empty one not at all (RFC 6749, sections 3.1 and 3.2)."""

from collections.abc import Iterable

from oauth_store.urls import same_resource


class ParameterError(Exception):
    """A request cannot be parsed; the message says why, and quotes nothing."""


def single(pairs: Iterable[tuple[str, object]], own_resource: str | None) -> dict[str, str]:
    """Return the value of each parameter.

    A parameter repeated with the same value counts once. Of several resources (RFC 8707, section 2), this server's own
    is used, else the first. Raises `ParameterError` for any other parameter with two values.
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
        if own_resource is not None and same_resource(value, own_resource):
            values[name] = value
    return values
