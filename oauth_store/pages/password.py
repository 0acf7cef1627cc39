"""`PasswordApproval`: to approve a client, the owner enters a password."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.routing import Route

from oauth_store.approval import PASSWORD_HASH, Approver, AuthorizationRequest
from oauth_store.errors import ConfigurationError
from oauth_store.pages.apps import AppsPage
from oauth_store.pages.consent import ConsentPage, consent_url
from oauth_store.pages.default import DEVICE_PATH
from oauth_store.pages.html import DEFAULT_ACCENT, Pages
from oauth_store.pages.sign_in import OWNER, USER_LENGTH, SignIn, normalized
from oauth_store.pages.wording import Wording

TAKEN = (ConsentPage.path, "/authorize", "/token", "/register", "/revoke")
"""Paths in use, except the MCP endpoint's, which is not known yet."""


class PasswordApproval:
    """Asks for a password on a consent page, which shows the client and where its access goes."""

    def __init__(
        self,
        *,
        password_hash: str | None = None,
        users: Mapping[str, str] | None = None,
        name: str | None = None,
        logo_url: str | None = None,
        accent: str = DEFAULT_ACCENT,
        templates: str | Path | None = None,
        scope_descriptions: Mapping[str, str] | None = None,
        known_hosts: Sequence[str] = (),
        apps_path: str | None = "/apps",
    ) -> None:
        """Check the settings.

        Args:
            password_hash: The argon2 hash of the one password, as printed by `oauth-store hash-password`. If this and
                `users` are None, MCP_OAUTH_PASSWORD_HASH is used.
            users: Instead of one password, a mapping of user names to argon2 hashes, if several people may approve
                clients. The name becomes the `subject` of the tokens; with one password, it is "owner".
            name: The name of the server on the pages. Default: the host of its URL.
            logo_url: A logo for the pages: an https:// URL, or data:image/.
            accent: The color of the main button, such as "#1a56b0".
            templates: A directory with your own templates; any that are missing there are the built-in ones.
            scope_descriptions: A description of each scope, to follow "It will be able to ...".
            known_hosts: Hosts of clients that your users know, such as "app.example.com", or "app.example.com:8443" for
                a port other than 443. The page shows no warning for https addresses there, whatever the path.
            apps_path: The path of the connected apps page, which lists and revokes grants. None disables the page.

        Raises:
            ConfigurationError: If a setting is missing, contradictory or not usable. It never quotes a password.
        """
        if password_hash is not None and users is not None:
            raise ConfigurationError("both password_hash and users were passed; pass only one of them")
        source = "password_hash"
        if password_hash is None and users is None:
            source, password_hash = PASSWORD_HASH, os.environ.get(PASSWORD_HASH)
            if not password_hash:
                raise ConfigurationError(
                    "PasswordApproval() has no password; run `oauth-store hash-password`, and pass the hash it prints "
                    f"as password_hash, or set {PASSWORD_HASH} to it"
                )
        if users is not None and not users:
            raise ConfigurationError("users is empty, so no one could sign in; pass at least one user")
        if apps_path is not None and (not re.fullmatch(r"(/[\w.~-]+)+", apps_path, re.ASCII) or apps_path in TAKEN):
            raise ConfigurationError(f"apps_path is {apps_path!r}; expected an unused path such as '/apps', or None")
        for user in users or ():
            if not user or user != user.strip() or not user.isprintable():
                raise ConfigurationError(f"users has the name {user!r}; expected printable text")
            if len(user) > USER_LENGTH:
                raise ConfigurationError(f"users has the name {user[:20]!r}..., longer than {USER_LENGTH} characters")
        named = {normalized(user): (f"users[{user!r}]", hashed) for user, hashed in (users or {}).items()}
        self.sign_in = SignIn(named or {OWNER: (source, str(password_hash))}, asks_user=users is not None)
        self.pages = Pages(name=name, logo_url=logo_url, accent=accent, templates=templates)
        self._wording = Wording(dict(scope_descriptions or {}), frozenset(known_hosts))
        self._apps_path = apps_path

    async def authorize(self, provider: Approver, request: AuthorizationRequest) -> str:
        """Send the browser to the consent page."""
        return consent_url(provider, request.handle)

    def routes(self, provider: Approver) -> list[Route]:
        """Return the routes of the pages."""
        consent = ConsentPage(provider, self.sign_in, self.pages, self._wording)
        routes = [Route(consent.path, consent.handle, methods=["GET", "POST"])]
        if self._apps_path in (DEVICE_PATH, "/device_authorization") and provider.issuer.device_url is not None:
            raise ConfigurationError(f"apps_path is {self._apps_path!r}, which devices need; choose another path")
        if self._apps_path is not None:
            apps = AppsPage(provider, self.sign_in, self.pages, self._wording, self._apps_path)
            routes.append(Route(apps.path, apps.handle, methods=["GET", "POST"]))
        return routes
