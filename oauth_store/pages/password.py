"""`PasswordApproval`: who may let a client in is who knows a password."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.routing import Route

from oauth_store.approval import PASSWORD_HASH, Approver, AuthorizationRequest
from oauth_store.errors import ConfigurationError
from oauth_store.pages.apps import AppsPage
from oauth_store.pages.consent import ConsentPage, consent_url
from oauth_store.pages.html import DEFAULT_ACCENT, Pages
from oauth_store.pages.sign_in import OWNER, USER_LENGTH, SignIn, normalized
from oauth_store.pages.wording import Wording

TAKEN = (ConsentPage.path, "/authorize", "/token", "/register", "/revoke")
"""Paths that are in use beside the MCP endpoint's, which nobody knows yet."""


class PasswordApproval:
    """Asks for a password on a page of ours, which shows who wants in and where the access goes."""

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
            password_hash: The argon2 hash of the one password, as `oauth-store hash-password` prints it. None, where
                there are no `users` either, reads MCP_OAUTH_PASSWORD_HASH.
            users: Names and argon2 hashes instead, where several people may let clients in. The name becomes the
                `subject` of the tokens; with one password it is "owner".
            name: What the pages call the server. None is the host of its URL.
            logo_url: A picture for the pages: an https:// URL, or data:image/.
            accent: The colour of the main button, as in "#1a56b0".
            templates: A directory with templates of your own; those that are not in it are ours.
            scope_descriptions: What each scope allows, in words: "It will be able to ...".
            known_hosts: Hosts of clients that your users know, as in "app.example.com", or "app.example.com:8443" for
                another port than 443. The page warns of no https address there, whatever its path.
            apps_path: Where the connected apps are listed, and revoked. None is nowhere.

        Raises:
            ConfigurationError: If a setting is missing, contradictory or not usable. It never quotes a password.
        """
        if password_hash is not None and users is not None:
            raise ConfigurationError("password_hash and users are two ways to say who may sign in; pass one of them")
        source = "password_hash"
        if password_hash is None and users is None:
            source, password_hash = PASSWORD_HASH, os.environ.get(PASSWORD_HASH)
            if not password_hash:
                raise ConfigurationError(
                    "PasswordApproval() has no password; run `oauth-store hash-password`, and pass what it prints as "
                    f"password_hash, or set {PASSWORD_HASH} to it"
                )
        if users is not None and not users:
            raise ConfigurationError("users is empty: nobody could sign in")
        if apps_path is not None and (not re.fullmatch(r"(/[\w.~-]+)+", apps_path, re.ASCII) or apps_path in TAKEN):
            raise ConfigurationError(f"apps_path is {apps_path!r}; expected a free path such as '/apps', or None")
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
        """Send the browser to the page that asks."""
        return consent_url(provider, request.handle)

    def routes(self, provider: Approver) -> list[Route]:
        """Return the routes of the pages."""
        consent = ConsentPage(provider, self.sign_in, self.pages, self._wording)
        routes = [Route(consent.path, consent.handle, methods=["GET", "POST"])]
        if self._apps_path is not None:
            apps = AppsPage(provider, self.sign_in, self.pages, self._wording, self._apps_path)
            routes.append(Route(apps.path, apps.handle, methods=["GET", "POST"]))
        return routes
