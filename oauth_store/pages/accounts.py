"""Sign-in with an account at an identity provider: Google, GitHub, one in your house."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from oauth_store.approval import Approver
from oauth_store.credentials import derive, same
from oauth_store.display import one_line, short_line
from oauth_store.flows.challenges import about
from oauth_store.openid import Attempt, IdentityProvider, NotSignedInError, Person, ProviderUnavailableError
from oauth_store.pages.ways import SignedIn, SignInError

ACCOUNT = "account"
CALLBACK_PATH = "/sign-in/callback"
"""The path of the redirect URI that the owner registers at the provider."""
SIGN_IN_SECONDS = 10.0
"""How long the requests to the provider for one sign-in may take together: metadata, keys and three responses."""
WAIT_SECONDS = 15.0
"""How long a browser waits for that and for its turn."""
CONCURRENT_SIGN_INS = 8
REASON_LENGTH = 300

KINDS = SUBJECT, GROUP, LOGIN = "sub:", "group:", "login:"
"""How entries of `allow` begin. Any other is an e-mail address."""

T = TypeVar("T")

logger = logging.getLogger("oauth_store")


class Accounts:
    """Lets in those whom an identity provider signs in, and whom the owner allows."""

    name = ACCOUNT
    guessable = False

    def __init__(self, provider: IdentityProvider, client_secret: str, allow: Sequence[str]) -> None:
        """`allow` are checked entries (see `OidcApproval`). `client_secret` is the key of what browsers keep."""
        self._provider = provider
        self._allow = tuple(allow)
        self._key = derive(client_secret, f"accounts {provider.identity}")
        self._threads = ThreadPoolExecutor(CONCURRENT_SIGN_INS, thread_name_prefix="oauth_store-accounts")
        self.users: Collection[str] = [entry for entry in allow if not entry.startswith((GROUP, LOGIN))]

    @property
    def label(self) -> str:
        return self._provider.label

    async def is_offered(self, _approver: Approver) -> bool:
        return True

    def user_in(self, _form: Mapping[str, str]) -> None:
        """The provider names the user."""

    async def question(self, _approver: Approver, _purpose: str) -> dict[str, Any]:
        return {"error": f"Sign in with {self.label}."}

    async def check(self, _approver: Approver, _user: str | None, _proof: str, _purpose: str) -> SignedIn:
        """No form has a proof: the browser goes to the provider and comes back."""
        raise SignInError(f"Sign in with {self.label} first.")

    async def begin(self, attempt: Attempt) -> str:
        """Return the address to which the browser goes. Raises `SignInError`."""
        try:
            return await self._in_thread(self._provider.authorization_url, attempt)
        except Exception as error:
            raise self._unavailable(error) from error

    async def finish(self, attempt: Attempt, response: Mapping[str, str]) -> SignedIn:
        """Return who came back from the provider. Raises `SignInError`."""
        try:
            person = await self._in_thread(self._provider.person, attempt, response)
        except NotSignedInError as error:
            logger.warning("nobody signed in with %s: %s", self.label, one_line(str(error))[:REASON_LENGTH])
            canceled = response.get("error") == "access_denied"
            text = "The sign-in was canceled." if canceled else f"{self.label} did not sign you in."
            raise SignInError(text, reason="canceled" if canceled else "wrong") from error
        except Exception as error:
            raise self._unavailable(error) from error
        name, known_as = f"{SUBJECT}{person.subject}", person.email or person.login
        entry = self._entry_of(person)
        if entry is None:
            groups = one_line(", ".join(person.groups) or "none")[:REASON_LENGTH]
            shown = self.label, one_line(name), one_line(known_as or "-"), groups
            logger.warning("not allowed with %s: %s (%s), of the groups: %s", *shown)
            also = f" ({short_line(known_as)})" if known_as else ""
            raise SignInError(
                f"You signed in with {self.label} as {short_line(name)}{also}, and this server does not let you in.",
                reason="not allowed",
            )
        return SignedIn(entry if entry in self.users else name, self.name, entry=entry)

    def _entry_of(self, person: Person) -> str | None:
        """Return the entry of `allow` that a person fits, the one that names them best, or None."""
        email = "" if person.email is None else address(person.email)
        fitting = [
            *([] if not email or email.startswith(KINDS) else [email]),  # an address is no id and no group
            f"{SUBJECT}{person.subject}",
            *([] if person.login is None else [f"{LOGIN}{person.login.lower()}"]),
            *(f"{GROUP}{group}" for group in person.groups),
        ]
        return next((entry for entry in fitting if entry in self._allow), None)

    async def _in_thread(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Run what asks the provider on a loop of its own, which ends it in time."""
        result = asyncio.get_running_loop().run_in_executor(self._threads, _run, work, *arguments)
        return await asyncio.wait_for(result, WAIT_SECONDS)

    def _unavailable(self, error: Exception) -> SignInError:
        late = f"no response after {SIGN_IN_SECONDS:g} s" if isinstance(error, TimeoutError) else repr(error)
        reason = str(error) if isinstance(error, ProviderUnavailableError) else late
        logger.warning("%s cannot be used: %s", self.label, one_line(reason)[:REASON_LENGTH])
        return SignInError(
            f"{self.label} cannot sign you in right now. Try again in a moment.", status_code=502, reason="unavailable"
        )

    def sign(self, signed_in: SignedIn, value: str) -> str:
        """Return a cookie value that is valid while `allow` has the entry that let the user in."""
        return f"{value}.{derive(self._key, about(signed_in.entry, signed_in.user, value))}"

    def signed(self, user: str, cookie: str) -> bool:
        """Return whether a cookie was made by `sign` for this user, by an entry that is still there."""
        value, _, proof = cookie.rpartition(".")
        return any(same(proof, derive(self._key, about(entry, user, value))) for entry in self._allow)


def address(text: str) -> str:
    """Return an e-mail address as it is compared: capitals do not matter, and look-alikes of letters do."""
    return text.lower() if text.isascii() else text


def _run(work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
    return asyncio.run(asyncio.wait_for(work(*arguments), SIGN_IN_SECONDS))
