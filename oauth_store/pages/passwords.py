"""Sign-in with a password."""

import asyncio
import secrets
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from oauth_store.credentials import derive, same
from oauth_store.display import USER_LENGTH, nfc
from oauth_store.errors import ConfigurationError
from oauth_store.pages.ways import OWNER, SignedIn, SignInError

if TYPE_CHECKING:
    from oauth_store.approval import Approver

PASSWORD = "password"  # noqa: S105 (the name of the way)
PASSWORD_LENGTH = 1000
"""Characters that are checked, at least as many as the form accepts."""
CONCURRENT_CHECKS = 2
"""Each uses the memory that the hash sets: 64 MiB if `oauth-store hash-password` made it."""


class Passwords:
    """Checks passwords: slowly, a few at a time, off the event loop."""

    name = PASSWORD
    guessable = True

    def __init__(self, hashes: Mapping[str, tuple[str, str]], *, asks_user: bool) -> None:
        """`hashes` are argon2 hashes by user, each with the name of its setting. Raises `ConfigurationError`."""
        self._asks_user = asks_user
        self._hasher = PasswordHasher()
        self._hashes = {}
        costs = {}
        for user, (setting, hashed) in hashes.items():
            try:
                costs["$".join(hashed.split("$")[:4])] = extract_parameters(hashed)
                self._hasher.verify(hashed, "")  # finds a truncated hash now, not when its user signs in
            except VerifyMismatchError:
                self._hashes[user] = hashed
                continue
            except (InvalidHashError, VerificationError):
                raise ConfigurationError(
                    f"{setting} is not an argon2 hash; run `oauth-store hash-password`, and set it to the hash it "
                    "prints (in single quotes if a shell reads it)"
                ) from None
            raise ConfigurationError(f"{setting} is the hash of an empty password; run `oauth-store hash-password`")
        self.users: Collection[str] = self._hashes.keys()
        # An unknown user takes as long as a known one: as long as one of them, if their hashes differ in cost.
        self._nobodies = [
            PasswordHasher.from_parameters(cost).hash(secrets.token_urlsafe(32)) for cost in costs.values()
        ]
        self._key = secrets.token_urlsafe(32)
        self._threads = ThreadPoolExecutor(CONCURRENT_CHECKS, thread_name_prefix="oauth_store-password")

    async def is_offered(self, _approver: "Approver") -> bool:
        return True

    def user_in(self, form: Mapping[str, str]) -> str:
        """Return the user that a form names, known or not."""
        return normalized(form.get("username", "").strip()[:USER_LENGTH]) if self._asks_user else OWNER

    async def question(self, _approver: "Approver", _purpose: str) -> dict[str, Any]:
        return {"error": "Type your password."}

    async def check(self, _approver: "Approver", user: str | None, proof: str, _purpose: str) -> SignedIn:
        """Return the user whose name and password these are. Raises `SignInError`."""
        user = user or ""
        hashed = self._hashes.get(user) or self._nobody(user)
        loop = asyncio.get_running_loop()
        right = await loop.run_in_executor(self._threads, self._verify, hashed, proof)
        if not right or user not in self._hashes:
            raise SignInError("That name and password do not match." if self._asks_user else "That password is wrong.")
        return SignedIn(user, self.name)

    def sign(self, signed_in: SignedIn, value: str) -> str:
        """Return a cookie value that is valid for this user until their password changes."""
        return f"{value}.{derive(self._hashes[signed_in.user], value)}"

    def signed(self, user: str, cookie: str) -> bool:
        """Return whether a cookie was made by `sign` for this user."""
        value, _, proof = cookie.rpartition(".")
        return user in self._hashes and same(proof, derive(self._hashes[user], value))

    def _nobody(self, user: str) -> str:
        """Return a hash that matches no password, always the same one for a name."""
        return self._nobodies[int(derive(self._key, user)[:8], 16) % len(self._nobodies)]

    def _verify(self, hashed: str, password: str) -> bool:
        try:
            return self._hasher.verify(hashed, normalized(password[:PASSWORD_LENGTH]))
        except VerificationError:
            return False


def normalized(password: str) -> str:
    """Return a password as it is hashed: keyboards and systems encode the same letter in different ways."""
    return nfc(password)


def hash_password(password: str) -> str:
    """Return the argon2id hash of a password, for `PasswordApproval`."""
    return PasswordHasher().hash(normalized(password))
