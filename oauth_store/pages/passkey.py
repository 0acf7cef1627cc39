"""`PasskeyApproval`: to approve a client, the owner touches a passkey. There is no password."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.routing import Route

from oauth_store.approval import PASSWORD_HASH, Approver, check_no_provider
from oauth_store.errors import ConfigurationError
from oauth_store.pages.approval import PageApproval, check_users
from oauth_store.pages.html import DEFAULT_ACCENT
from oauth_store.pages.passkeys import Passkeys
from oauth_store.pages.passwords import normalized
from oauth_store.pages.sign_in import SignIn
from oauth_store.pages.ways import OWNER
from oauth_store.webauthn import EXTRA, RelyingParty


class PasskeyApproval(PageApproval):
    """Asks for a passkey on the pages of `PasswordApproval`, and for nothing else.

    Until `oauth-store passkey add` has added a passkey, no client gets in. Needs the extra `passkeys`, and a `base_url`
    whose host is a name: an IP address cannot have passkeys.
    """

    def __init__(
        self,
        *,
        users: Sequence[str] | None = None,
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
            users: The names of the users, if several people may approve clients: `oauth-store passkey add --user NAME`
                adds a passkey of one. The name becomes the `subject` of the tokens; without `users`, it is "owner".
            name: This and the others mean the same as for `PasswordApproval`.

        Raises:
            ConfigurationError: If the extra is not installed, MCP_OAUTH_PASSWORD_HASH is set, which would be ignored,
                or a setting is not usable. `routes()` raises it if the host of `base_url` is an IP address.
        """
        check_no_provider("PasskeyApproval")
        if os.environ.get(PASSWORD_HASH):
            raise ConfigurationError(
                f"{PASSWORD_HASH} is set, but PasskeyApproval() never asks for the password; remove one of the two"
            )
        if users is not None:
            check_users(users)
        passkeys = Passkeys([OWNER] if users is None else [normalized(user) for user in users])
        if not passkeys.is_installed:
            raise ConfigurationError(f"PasskeyApproval() needs the extra passkeys; run {EXTRA}")
        super().__init__(
            SignIn([passkeys], asks_user=users is not None),
            name=name,
            logo_url=logo_url,
            accent=accent,
            templates=templates,
            scope_descriptions=scope_descriptions,
            known_hosts=known_hosts,
            apps_path=apps_path,
        )

    def routes(self, provider: Approver) -> list[Route]:
        """Return the routes of the pages. Raises `ConfigurationError` where nobody could have a passkey."""
        RelyingParty.of(provider.public_url(""))
        return super().routes(provider)
