"""`PasswordApproval`: to approve a client, the owner enters a password, or touches a passkey."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from oauth_store.approval import PASSWORD_HASH, check_no_provider
from oauth_store.errors import ConfigurationError
from oauth_store.pages.approval import PageApproval, check_users
from oauth_store.pages.html import DEFAULT_ACCENT
from oauth_store.pages.passkeys import Passkeys
from oauth_store.pages.passwords import Passwords, normalized
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import OWNER


class PasswordApproval(PageApproval):
    """Asks for a password on a consent page, which shows the client and where its access goes.

    With the extra `passkeys`, a user who has a passkey may use it instead: see `oauth-store passkey add`.
    """

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
        check_no_provider("PasswordApproval")
        passwords = passwords_of(password_hash, users)
        if passwords is None:
            raise ConfigurationError(
                "PasswordApproval() has no password; run `oauth-store hash-password`, and pass the hash it prints "
                f"as password_hash, or set {PASSWORD_HASH} to it"
            )
        super().__init__(
            SignIn([passwords, Passkeys(passwords.users)], asks_user=users is not None),
            name=name,
            logo_url=logo_url,
            accent=accent,
            templates=templates,
            scope_descriptions=scope_descriptions,
            known_hosts=known_hosts,
            apps_path=apps_path,
        )


def passwords_of(password_hash: str | None, users: Mapping[str, str] | None) -> Passwords | None:
    """Return the passwords that are passed, or else that of the environment, or None. Raises `ConfigurationError`."""
    if password_hash is not None and users is not None:
        raise ConfigurationError("both password_hash and users were passed; pass only one of them")
    if users is not None:
        check_users(users)
        named = {normalized(user): (f"users[{user!r}]", hashed) for user, hashed in users.items()}
        return Passwords(named, asks_user=True)
    if password_hash is not None:
        return Passwords({OWNER: ("password_hash", password_hash)}, asks_user=False)
    from_environment = os.environ.get(PASSWORD_HASH)
    return Passwords({OWNER: (PASSWORD_HASH, from_environment)}, asks_user=False) if from_environment else None
