"""Cookies that bind a request, a session and an allowance to a browser, and the forms that it sends."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from oauth_store.credentials import hash_secret

FORM = "application/x-www-form-urlencoded"
"""The only form encoding accepted. In the other, the sender chooses a charset, which can yield unencodable text."""


def request_cookie(handle: str) -> str:
    """Return the name of the cookie of one authorization request, so that two tabs do not collide."""
    return f"oauth_store_{hash_secret(handle).hex()[:16]}"


REQUEST_COOKIE_SECONDS = 3600
"""Longer than a request waits, so that a user who is too late reads that, and not that the browser is another one."""


class Cookies:
    """Cookies of this server alone: scripts cannot read them, other hosts cannot set them, and https ones stay private.

    Their names tell apart the servers of one host, under different paths or, on loopback, on different ports: browsers
    send a cookie to every port, and `__Host-` requires the path "/".
    """

    def __init__(self, base_url: str) -> None:
        self._secure = base_url.startswith("https://")
        self._server = hash_secret(base_url).hex()[:8]

    def get(self, request: Request, name: str) -> str | None:
        """Return the value of one of our cookies. They are never quoted, and parsing a quoted one can take seconds."""
        pairs = ";".join(request.headers.getlist("cookie")).split(";")
        values = dict(pair.strip().partition("=")[::2] for pair in pairs)
        return values.get(self._name(name))

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
        return f"{'__Host-' if self._secure else ''}{name}_{self._server}"


Form = ImmutableMultiDict[str, str]
"""The fields of a form; several may have one name."""


async def form_of(request: Request) -> Form:
    """Return the fields of one of our forms, which browsers send urlencoded, or none for any other body."""
    if media_type(request.headers) != FORM:
        return Form()
    return Form([(name, str(value)) for name, value in (await request.form()).multi_items()])


def from_our_page(request: Request, page_url: str) -> bool:
    """Return whether a form came from one of our pages, as far as the browser says. The token in the form proves it.

    `Referrer-Policy: no-referrer` makes the `Origin` of our own forms "null".
    """
    page = urlsplit(page_url)
    origins = ("null", f"{page.scheme}://{page.netloc}")
    sites = ("same-origin", "none")
    return request.headers.get("origin", "null") in origins and request.headers.get("sec-fetch-site", "none") in sites


def redirect(url: str) -> Response:
    """Return the response to a form that sends a browser on, and gives away neither this page's URL nor that one."""
    return RedirectResponse(url, 303, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})


def media_type(headers: Headers) -> str:
    """Return the media type of a body, without parameters, in lowercase (RFC 9110, section 8.3.1)."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def wants_page(request: Request) -> bool:
    """Return whether a request is from a user's browser: browsers ask for HTML when they navigate, clients do not."""
    return "text/html" in request.headers.get("accept", "")
