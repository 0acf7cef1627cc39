"""What the approvals with pages share: `PasswordApproval`, `PasskeyApproval`, `OidcApproval`."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from starlette.routing import Route

from oauth_store.approval import Approver, AuthorizationRequest
from oauth_store.display import USER_LENGTH, is_user_name
from oauth_store.errors import ConfigurationError
from oauth_store.pages.apps import AppsPage
from oauth_store.pages.callback import CallbackPage
from oauth_store.pages.consent import ConsentPage, consent_url
from oauth_store.pages.default import DEVICE_PATH
from oauth_store.pages.enrollment import EnrollmentPage
from oauth_store.pages.html import Pages
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.wording import Wording

TAKEN = (
    *(ConsentPage.path, EnrollmentPage.path, CallbackPage.path),
    *("/authorize", "/token", "/register", "/revoke"),
)
"""Paths in use, except the MCP endpoint's, which is not known yet."""


class PageApproval:
    """Asks the owner on a consent page, which shows the client and where its access goes."""

    def __init__(
        self,
        sign_in: SignIn,
        *,
        name: str | None,
        logo_url: str | None,
        accent: str,
        templates: str | Path | None,
        scope_descriptions: Mapping[str, str] | None,
        known_hosts: Sequence[str],
        apps_path: str | None,
    ) -> None:
        """`sign_in` has the ways to sign in. Raises `ConfigurationError` for another setting that is not usable."""
        if apps_path is not None and (not re.fullmatch(r"(/[\w.~-]+)+", apps_path, re.ASCII) or apps_path in TAKEN):
            raise ConfigurationError(f"apps_path is {apps_path!r}; expected an unused path such as '/apps', or None")
        self.sign_in = sign_in
        self.pages = Pages(name=name, logo_url=logo_url, accent=accent, templates=templates)
        self._wording = Wording(dict(scope_descriptions or {}), frozenset(known_hosts))
        self._apps_path = apps_path

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Send the browser to the consent page."""
        return consent_url(provider, request.handle)

    def routes(self, provider: Approver) -> list[Route]:
        """Return the routes of the pages."""
        apps_url = None if self._apps_path is None else provider.public_url(self._apps_path)
        account = self.sign_in.account

        def page_of(handle: str) -> str | None:
            return consent_url(provider, handle) if handle else apps_url

        callback = None if account is None else CallbackPage(provider, self.sign_in, account, self.pages, page_of)
        consent = ConsentPage(provider, self.sign_in, self.pages, self._wording, callback)
        enrollment = EnrollmentPage(provider, self.sign_in, self.pages)
        pages: list[ConsentPage | EnrollmentPage | CallbackPage | AppsPage] = [consent, enrollment]
        if callback is not None:
            pages.append(callback)
        if self._apps_path in (DEVICE_PATH, "/device_authorization") and provider.issuer.device_url is not None:
            raise ConfigurationError(f"apps_path is {self._apps_path!r}, which devices need; choose another path")
        if self._apps_path is not None:
            pages.append(AppsPage(provider, self.sign_in, self.pages, self._wording, callback, self._apps_path))
        return [Route(page.path, page.handle, methods=["GET", "POST"]) for page in pages]


def check_users(users: Collection[str]) -> None:
    """Raise `ConfigurationError` unless these are the names of users."""
    if not users:
        raise ConfigurationError("users is empty, so no one could sign in; pass at least one user")
    for user in users:
        if not is_user_name(user):
            raise ConfigurationError(f"users has the name {user!r}; expected printable text")
        if len(user) > USER_LENGTH:
            raise ConfigurationError(f"users has the name {user[:20]!r}..., longer than {USER_LENGTH} characters")
