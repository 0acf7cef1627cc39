"""What a browser carries: the cookies that bind a request, a session and an allowance to it."""

from starlette.requests import Request
from starlette.responses import Response

from oauth_store.credentials import hash_secret


def request_cookie(handle: str) -> str:
    """Return the name of the cookie of one authorization request: two tabs do not get into each other's way."""
    return f"oauth_store_{hash_secret(handle).hex()[:16]}"


class Cookies:
    """Cookies of this server alone: no script reads them, no other host sets them, https keeps them."""

    def __init__(self, base_url: str) -> None:
        self._secure = base_url.startswith("https://")

    def get(self, request: Request, name: str) -> str | None:
        return request.cookies.get(self._name(name))

    def set(self, response: Response, name: str, value: str, *, max_age_seconds: int, samesite: str = "lax") -> None:
        response.set_cookie(
            self._name(name),
            value,
            max_age=max_age_seconds,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite=samesite,  # type: ignore[arg-type]  # one of its literals
        )

    def delete(self, response: Response, name: str) -> None:
        response.delete_cookie(self._name(name), path="/", secure=self._secure, httponly=True)

    def _name(self, name: str) -> str:
        return f"__Host-{name}" if self._secure else name


def from_our_page(request: Request) -> bool:
    """Tell whether a form was sent by a page of ours, as far as the browser says.

    Its `Origin` says nothing, since `Referrer-Policy: no-referrer` makes it "null"; the token in the form proves it.
    """
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
