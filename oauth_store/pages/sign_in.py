"""Sign-in with a password, and its rate limits."""

import asyncio
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from limits import parse
from starlette.requests import Request
from starlette.responses import Response

from oauth_store.browser import Cookies
from oauth_store.credentials import derive, same
from oauth_store.display import nfc
from oauth_store.errors import ConfigurationError
from oauth_store.events import emit
from oauth_store.rate_limits import Limiter

OWNER = "owner"
"""The subject if there is one password and no user names."""
USER_LENGTH = 1000
PASSWORD_LENGTH = 1000
"""Characters that are checked, at least as many as the form accepts."""
KNOWN_BROWSER = "oauth_store_known"
KNOWN_BROWSER_SECONDS = 180 * 24 * 3600
CONCURRENT_CHECKS = 2
"""Each uses the memory that the hash sets: 64 MiB if `oauth-store hash-password` made it."""

PER_ADDRESS = parse("10/15 minutes")
PER_BROWSER = parse("20/15 minutes")
IN_TOTAL = parse("100/15 minutes")


class SignInError(Exception):
    """The sign-in failed; the message is for the user at the browser."""

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    @property
    def status_code(self) -> int:
        return 403 if self.retry_after_seconds is None else 429

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


class SignIn:
    """Checks passwords: slowly, a few at a time, off the event loop, with limits per address, browser and process.

    A browser that signed in before proves it with a cookie, and has its own limit: an attacker elsewhere can exhaust
    the other limits, but cannot lock the owner out. The cookie's key is the password's hash, so it needs no row and
    becomes invalid when the password changes, as sessions do.
    """

    def __init__(self, hashes: Mapping[str, tuple[str, str]], *, asks_user: bool) -> None:
        """`hashes` are argon2 hashes by user, each with the name of its setting. Raises `ConfigurationError`."""
        self.asks_user = asks_user
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
        # An unknown user takes as long as a known one: as long as one of them, if their hashes differ in cost.
        self._nobodies = [
            PasswordHasher.from_parameters(cost).hash(secrets.token_urlsafe(32)) for cost in costs.values()
        ]
        self._key = secrets.token_urlsafe(32)
        self._limiter = Limiter()
        self._threads = ThreadPoolExecutor(CONCURRENT_CHECKS, thread_name_prefix="oauth_store-password")

    async def check(self, request: Request, form: Mapping[str, str], cookies: Cookies, address: str) -> str:
        """Return the user whose name and password are in a form.

        Raises `SignInError`, the same and after the same time for a wrong password and an unknown user.
        """
        user = normalized(form.get("username", "").strip()[:USER_LENGTH]) if self.asks_user else OWNER
        browser = cookies.get(request, KNOWN_BROWSER)
        is_known = self.signed(user, browser)
        counted = [(PER_BROWSER, f"browser {browser}")] if is_known else [(IN_TOTAL, "all"), (PER_ADDRESS, address)]
        wait = self._limiter.retry_after(*counted)
        if wait is not None:
            emit("sign_in_failed", address=address, reason="too many attempts")
            minutes = -(-wait // 60)
            raise SignInError(
                f"Too many attempts. Wait {minutes} minute{'s' if minutes > 1 else ''}, and try again.", wait
            )
        hashed = self._hashes.get(user) or self._nobody(user)
        loop = asyncio.get_running_loop()
        right = await loop.run_in_executor(self._threads, self._verify, hashed, form.get("password", ""))
        if not right or user not in self._hashes:
            emit("sign_in_failed", address=address, reason="wrong")  # no name: users type passwords there
            raise SignInError("That name and password do not match." if self.asks_user else "That password is wrong.")
        if is_known or not self.asks_user:  # or a user could reset the limit for another's password by signing in
            self._limiter.forget(*counted[-1])
        return user

    def remember(self, response: Response, cookies: Cookies, user: str) -> None:
        """Set a cookie that proves that this user has signed in with this browser."""
        value = self.sign(user, secrets.token_urlsafe(16))
        cookies.set(response, KNOWN_BROWSER, value, max_age_seconds=KNOWN_BROWSER_SECONDS)

    def sign(self, user: str, value: str) -> str:
        """Return a cookie value that is valid for this user until their password changes."""
        return f"{value}.{derive(self._hashes[user], value)}"

    def signed(self, user: str, cookie: str | None) -> bool:
        """Return whether a cookie was made by `sign` for this user."""
        value, _, proof = (cookie or "").rpartition(".")
        return user in self._hashes and same(proof, derive(self._hashes[user], value))

    def knows(self, browser: str) -> bool:
        """Return whether the cookie of `remember` shows that a user has signed in with this browser."""
        return any(self.signed(user, browser) for user in self._hashes)

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
