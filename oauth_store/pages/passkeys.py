"""Sign-in with a passkey (WebAuthn): a touch of the user's device, which signs what it is for."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from oauth_store import webauthn
from oauth_store.approval import Approver
from oauth_store.errors import ConfigurationError
from oauth_store.flows import challenges, passkeys
from oauth_store.flows.challenges import RefusedError
from oauth_store.pages.ways import SignedIn, SignInError
from oauth_store.webauthn import CHALLENGE_SECONDS, InvalidPasskeyError, RelyingParty

PASSKEY = "passkey"


class Passkeys:
    """Checks passkeys. It works where `fido2` is installed and the server has a host name."""

    name = PASSKEY
    guessable = False

    def __init__(self, users: Collection[str]) -> None:
        """`users` may have passkeys. Those of other users are refused."""
        self.users = users
        self.is_installed = webauthn.is_installed()

    async def is_offered(self, approver: Approver) -> bool:
        """Return whether a user of this server has a passkey that works at its host."""
        party = self._party(approver)
        if party is None:
            return False
        known = await passkeys.of_server(approver.issuer)
        return any(one.user in self.users and RelyingParty.of(one.url).id == party.id for one in known)

    def user_in(self, _form: Mapping[str, str]) -> None:
        """A passkey names its user itself."""

    async def question(self, approver: Approver, purpose: str) -> dict[str, Any]:
        """Return the options for the browser, with a challenge that is valid once, for five minutes, for `purpose`."""
        party = RelyingParty.of(approver.public_url(""))
        return party.signing_options(await challenges.ask(approver.issuer, purpose, CHALLENGE_SECONDS))

    async def check(self, approver: Approver, _user: str | None, proof: str, purpose: str) -> SignedIn:
        """Return the user whose passkey has signed the challenge for `purpose`. Raises `SignInError`."""
        party, wrong = self._party(approver), "That passkey was not accepted. Nothing was changed: try again."
        try:
            passkey = await passkeys.find(approver.issuer, webauthn.credential_id_of(proof))
            if party is None or passkey is None or passkey.user not in self.users:
                raise SignInError("This server does not know that passkey. It may have been removed.")
            known = (passkey.user_handle, passkey.credential_id, passkey.public_key)
            signed = await asyncio.to_thread(party.check_signed, proof, *known)
            await passkeys.use(approver.issuer, passkey, signed.challenge, purpose, signed.count)
        except InvalidPasskeyError as invalid:
            raise SignInError(wrong) from invalid
        except RefusedError as refused:
            raise SignInError(wrong, reason=str(refused)) from refused
        return SignedIn(passkey.user, self.name, passkey.key_hash)

    def _party(self, approver: Approver) -> RelyingParty | None:
        """Return the server as browsers know it, or None if it cannot have passkeys."""
        try:
            return RelyingParty.of(approver.public_url("")) if self.is_installed else None
        except ConfigurationError:
            return None

    def sign(self, _signed_in: SignedIn, value: str) -> str:
        """Return the value itself: the row of the session names the passkey, and ends with it."""
        return value

    def signed(self, user: str, _cookie: str) -> bool:
        """Return whether this user may still have passkeys."""
        return user in self.users
