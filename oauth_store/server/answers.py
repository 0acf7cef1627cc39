"""Errors as clients read them."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


def error_answer(
    status_code: int, error: str, description: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error's code and description (RFC 6749, section 5.2; RFC 7591, section 3.2.2)."""
    return JSONResponse({"error": error, "error_description": description}, status_code, headers)
