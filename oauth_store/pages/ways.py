"""What a way to sign in is: a password, a passkey, an account elsewhere."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # imports FastMCP, which takes a second, and `oauth-store hash-password` does not need it
    from oauth_store.approval import Approver

OWNER = "owner"
"""The subject if there are no user names."""


class SignInError(Exception):
    """The sign-in failed; the message is for the user at the browser."""

    def __init__(
        self,
        message: str,
        retry_after_seconds: int | None = None,
        *,
        reason: str = "wrong",
        status_code: int = 403,
    ) -> None:
        """`reason` is for the log. With `retry_after_seconds`, the status is 429."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.reason = reason
        self.status_code = status_code if retry_after_seconds is None else 429

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A user who has proved who they are."""

    user: str
    way: str
    key_hash: bytes | None = None
    """The passkey that proved it: a session that it began ends with it."""
    entry: str = ""
    """What let in the user of an account: a session that it began ends with it."""
    at: int | None = None
    """When, in epoch seconds, if that was not just now."""
    stays: bool = False
    """Whether this browser stays signed in."""


class Way(Protocol):
    """One way to sign in. A form that has a field of its `name` uses it."""

    name: str
    users: Collection[str]
    guessable: bool
    """Whether an attacker can guess: then a flood of guesses from many addresses is limited too, and browsers that
    have signed in before are recognized by a cookie of `sign`."""

    async def is_offered(self, approver: "Approver") -> bool:
        """Return whether any user can sign in this way now."""
        ...

    def user_in(self, form: Mapping[str, str]) -> str | None:
        """Return the user that a form names, or None if the proof itself does."""
        ...

    async def question(self, approver: "Approver", purpose: str) -> dict[str, Any]:
        """Return what a browser has to answer, for one purpose. Only for a way that has such questions."""
        ...

    async def check(self, approver: "Approver", user: str | None, proof: str, purpose: str) -> SignedIn:
        """Return the user whose proof this is; `user` is what `user_in` returned. Raises `SignInError`."""
        ...

    def sign(self, signed_in: SignedIn, value: str) -> str:
        """Return a cookie value that is valid while this user can sign in this way."""
        ...

    def signed(self, user: str, cookie: str) -> bool:
        """Return whether a cookie was made by `sign` for this user."""
        ...
