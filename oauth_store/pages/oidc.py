"""`OidcApproval`: to approve a client, the owner signs in at an identity provider."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from oauth_store.approval import OIDC
from oauth_store.display import USER_LENGTH, is_user_name, nfc
from oauth_store.errors import ConfigurationError
from oauth_store.github import GITHUB, GitHub
from oauth_store.openid import IdentityProvider, OpenIdProvider, is_provider_url
from oauth_store.pages.accounts import GROUP, KINDS, LOGIN, SUBJECT, Accounts, address
from oauth_store.pages.approval import PageApproval
from oauth_store.pages.html import DEFAULT_ACCENT
from oauth_store.pages.passkeys import Passkeys
from oauth_store.pages.password import passwords_of
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import Way

LABELS = {
    "accounts.google.com": "Google",
    "login.microsoftonline.com": "Microsoft",
    "gitlab.com": "GitLab",
}
"""What users call well-known providers."""


class OidcApproval(PageApproval):
    """Asks the owner to sign in with an account at an identity provider: OpenID Connect, or GitHub.

    With a password or passkeys of this server, the page has them too, and a provider that is down locks nobody out.
    """

    def __init__(
        self,
        *,
        issuer: str | None = None,
        client_id: str | None = None,
        client_secret: str | None = None,
        allow: Sequence[str] | None = None,
        provider_name: str | None = None,
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
        """Check the settings. The provider is contacted when the first user signs in.

        Args:
            issuer: The provider's issuer, spelled as in its metadata, such as "https://accounts.google.com"; or
                "https://github.com". None reads MCP_OAUTH_OIDC_ISSUER.
            client_id: This server's client at the provider, with the redirect URI `<base_url>/sign-in/callback`. None
                reads MCP_OAUTH_OIDC_CLIENT_ID.
            client_secret: Its secret. None reads MCP_OAUTH_OIDC_CLIENT_SECRET.
            allow: Who gets in: e-mail addresses that the provider has verified, "sub:..." for a user's id there,
                "group:..." for a group, and "login:..." for a login at GitHub. A user's `subject` is the e-mail
                address, if it is in the list, or else "sub:" and the id. None reads MCP_OAUTH_OIDC_ALLOW, separated by
                commas.
            provider_name: What the page calls the provider. Default: its name if it is well known, or else its host.
            password_hash: A password of this server for "owner", who sees the apps of all. If this and `users` are
                None, MCP_OAUTH_PASSWORD_HASH is used; without it, there is no password.
            users: Instead, names and hashes of users, as for `PasswordApproval`. Take the names of `allow`, as
                "ada@example.com", for those who use both.
            name: This and the others mean the same as for `PasswordApproval`.

        Raises:
            ConfigurationError: If a setting is missing, contradictory or not usable. It never quotes a secret.
        """
        issuer, client_id, client_secret = (
            _setting(name, given)
            for name, given in (("ISSUER", issuer), ("CLIENT_ID", client_id), ("CLIENT_SECRET", client_secret))
        )
        if issuer.rstrip("/") == GITHUB:
            issuer = GITHUB
        entries = _entries(_setting("ALLOW", None).split(",") if allow is None else allow, issuer)
        passwords = passwords_of(password_hash, users)
        for user in users or ():
            if address(user) in entries and user not in entries:
                raise ConfigurationError(
                    f"users has {user!r}, and allow has {address(user)!r}, which would be two users; spell both alike"
                )
        accounts = Accounts(_provider(issuer, client_id, client_secret, entries, provider_name), client_secret, entries)
        known = [*accounts.users, *(() if passwords is None else passwords.users)]
        ways: list[Way] = [accounts, *([] if passwords is None else [passwords]), Passkeys(known)]
        super().__init__(
            SignIn(ways, asks_user=users is not None),
            name=name,
            logo_url=logo_url,
            accent=accent,
            templates=templates,
            scope_descriptions=scope_descriptions,
            known_hosts=known_hosts,
            apps_path=apps_path,
        )


def _setting(name: str, given: str | None) -> str:
    """Return a setting, or that of the environment. Raises `ConfigurationError` if there is none."""
    value = os.environ.get(f"{OIDC}_{name}", "") if given is None else given
    if not isinstance(value, str) or not value.isprintable():
        raise ConfigurationError(f"{name.lower()} is not a text that can be printed")
    if not value.strip():
        raise ConfigurationError(
            f"OidcApproval() has no {name.lower()}; pass it, or set {OIDC}_{name}. docs/approval.md says where to find "
            "it at each provider"
        )
    return value.strip()


def _entries(allow: Sequence[str], issuer: str) -> list[str]:
    """Return the entries of `allow`, as they are compared. Raises `ConfigurationError`."""
    if isinstance(allow, str):
        raise ConfigurationError(f"allow is {allow!r}; expected a list, such as [{allow!r}]")
    if not all(isinstance(entry, str) for entry in allow):
        raise ConfigurationError("allow has an entry that is not a text")
    entries = [nfc(entry.strip()) for entry in allow]
    if not any(entries):
        raise ConfigurationError("allow is empty, so nobody could sign in; name at least one user")
    return [_entry(entry, is_github=issuer == GITHUB) for entry in entries if entry]


def _entry(entry: str, *, is_github: bool) -> str:
    kinds = (SUBJECT, LOGIN) if is_github else (SUBJECT, GROUP)
    kind = next((kind for kind in kinds if entry.startswith(kind)), None)
    rest = entry.removeprefix(kind or "")
    if not is_user_name(rest) or len(entry) > USER_LENGTH:
        raise ConfigurationError(f"allow has the entry {entry[:40]!r}; expected printable text")
    if kind is not None:
        return entry.lower() if kind == LOGIN else entry
    if is_github or entry.lower().startswith(KINDS) or not re.fullmatch(r"[^\s@*,;]+@[^\s@*,;]+", entry):
        expected = "'sub:583231' or 'login:octocat'" if is_github else "'me@example.com', 'sub:...' or 'group:...'"
        raise ConfigurationError(f"allow has the entry {entry!r}; expected one such as {expected}")
    return address(entry)


def _provider(
    issuer: str, client_id: str, client_secret: str, entries: Sequence[str], name: str | None
) -> IdentityProvider:
    """Return the provider at an issuer. Raises `ConfigurationError`."""
    if issuer == GITHUB:
        return GitHub(client_id, client_secret, label=name)
    if not is_provider_url(issuer) or "?" in issuer:
        raise ConfigurationError(f"the issuer is {issuer!r}; expected one like https://accounts.google.com")
    host = urlsplit(issuer).netloc
    return OpenIdProvider(
        issuer,
        client_id,
        client_secret,
        label=name or LABELS.get(host, host),
        with_email=any(not entry.startswith((SUBJECT, GROUP)) for entry in entries),
        with_groups=any(entry.startswith(GROUP) for entry in entries),
    )
