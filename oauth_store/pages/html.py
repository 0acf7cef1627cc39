"""How the pages are rendered, branded, and isolated from the rest of the web."""

import functools
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import HTMLResponse, Response

from oauth_store.errors import ConfigurationError

TEMPLATES = (
    "base.html",
    "fields.html",
    "account.html",
    "again.html",
    "touch.html",
    "script.html",
    "passkey.html",
    "choices.html",
    "consent.html",
    "device.html",
    "sign_in.html",
    "apps.html",
    "message.html",
)
DEFAULT_ACCENT = "#1a56b0"


class Pages:
    """Renders the built-in templates, or yours of the same names."""

    def __init__(
        self,
        *,
        name: str | None = None,
        logo_url: str | None = None,
        accent: str = DEFAULT_ACCENT,
        templates: str | Path | None = None,
    ) -> None:
        """Raises `ConfigurationError` for a color, a logo or a directory that cannot be used."""
        from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined, TemplateError

        if not re.fullmatch(r"#[0-9a-fA-F]{6}", accent):
            raise ConfigurationError(f"accent is {accent!r}; expected a color such as {DEFAULT_ACCENT!r}")
        if templates is not None and not Path(templates).is_dir():
            raise ConfigurationError(f"templates is {str(templates)!r}, which is not a directory")
        self.name = name
        self._logo_url, self._logo_source = logo_url, _source(logo_url)
        own = [] if templates is None else [FileSystemLoader(templates)]
        self._environment = Environment(
            loader=ChoiceLoader([*own, PackageLoader("oauth_store.pages")]),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,  # it would check the files for every page, on the event loop
        )
        try:
            for template in TEMPLATES:
                self._environment.get_template(template)
        except (TemplateError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"templates: {template} cannot be read: {error}") from error
        self._environment.globals |= {"logo_url": logo_url, "accent": accent, "on_accent": _readable_on(accent)}

    def render(
        self,
        template: str,
        *,
        server: str,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        script: bool = False,
        **values: Any,
    ) -> Response:
        """Return a page that cannot be framed, is not cached, and runs no script, or only ours if it needs it."""
        nonce = secrets.token_urlsafe(16)
        html = self._environment.get_template(template).render(
            server=self.name or server, nonce=nonce, script=script, **values
        )
        # No form-action: Chromium applies it to the redirect after the form too, and so to the client's address.
        # No Cross-Origin-Opener-Policy: clients that opened a popup wait for a message from the page after ours.
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; img-src {self._logo_source}; "
            "base-uri 'none'; frame-ancestors 'none'"
        ) + (f"; script-src 'nonce-{nonce}'; connect-src 'self'" if script else "")
        return HTMLResponse(
            html,
            status_code,
            headers={
                "Content-Security-Policy": policy,
                "X-Frame-Options": "DENY",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
                "Pragma": "no-cache",
                **(headers or {}),
            },
        )

    def message(
        self,
        title: str,
        *paragraphs: str,
        server: str,
        status_code: int,
        headers: Mapping[str, str] | None = None,
        again: str | None = None,
    ) -> Response:
        """Return a page with a message: what happened, and what to do. `again` is the page to go back to."""
        return self.render(
            "message.html",
            server=server,
            status_code=status_code,
            headers=headers,
            title=title,
            paragraphs=paragraphs,
            again=again,
        )


@functools.cache
def plain_pages() -> Pages:
    """Return the pages for a server whose approval has none. Cached, because building them is slow."""
    return Pages()


def _source(logo_url: str | None) -> str:
    """Return the source that the content security policy must allow for a logo."""
    if logo_url is None:
        return "'none'"
    if logo_url.startswith("data:image/"):
        return "data:"
    url = urlsplit(logo_url)
    if url.scheme not in ("https", "http") or not re.fullmatch(r"[a-zA-Z0-9.:\[\]-]+", url.netloc):
        raise ConfigurationError(f"logo_url is {logo_url!r}; expected an https:// URL, or data:image/")
    return f"{url.scheme}://{url.netloc}"


def _readable_on(color: str) -> str:
    """Return black or white, whichever has more contrast on a color (WCAG 2.2, relative luminance)."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
