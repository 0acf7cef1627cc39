"""Error responses: JSON for clients, and pages for users."""

from collections.abc import Callable, Mapping

from starlette.responses import JSONResponse, Response

MessagePage = Callable[[str, str, str, int, Mapping[str, str]], Response]
"""Builds a page from a title, a text, a detail, a status and headers."""


def error_answer(
    status_code: int, error: str, description: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error response with a code and a description (RFC 6749, section 5.2; RFC 7591, section 3.2.2)."""
    return JSONResponse({"error": error, "error_description": description}, status_code, headers)
