"""Passkeys (WebAuthn level 2) as values: the options for a browser, and the checks of its responses.

The checks import `fido2`, which takes a tenth of a second: run them in a thread.
"""

import hashlib
import ipaddress
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from oauth_store.errors import ConfigurationError

if TYPE_CHECKING:
    from fido2.server import Fido2Server

EXTRA = "pip install 'fastmcp-oauth-store[passkeys]'"
CHALLENGE_SECONDS = 5 * 60
"""How long a browser has to sign a challenge."""
CREDENTIAL_ID_BYTES = 1023
"""The longest id of a passkey (WebAuthn, section 7.1)."""
PUBLIC_KEY_BYTES = 2048
"""The longest public key that is stored."""
ID_LENGTH = -(-CREDENTIAL_ID_BYTES * 4 // 3)
"""Characters of the longest credential id in base64url."""


class InvalidPasskeyError(Exception):
    """A response of a browser is not what was asked for. The text is for the log of a developer."""


@dataclass(frozen=True, slots=True)
class Created:
    """A passkey that a browser has made."""

    challenge: str
    credential_id: str
    public_key: bytes
    """In COSE (RFC 9052)."""
    count: int
    transports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signed:
    """A challenge that a passkey has signed."""

    challenge: str
    count: int
    """How many signatures the passkey says to have made; always 0 for one that does not count."""


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """A server as browsers and passkeys know it: passkeys are for its host, and their responses name its origin."""

    url: str
    """Its `base_url`."""
    id: str
    origin: str

    @classmethod
    def of(cls, base_url: str) -> Self:
        """Return the relying party of a server. Raises `ConfigurationError` if its host is an IP address."""
        url = urlsplit(base_url)
        host = (url.hostname or "").lower()
        if not host or _is_address(host):
            port = "" if url.port is None else f":{url.port}"
            raise ConfigurationError(
                f"passkeys are for a host name, and {host or base_url} is none; on this machine, use "
                f"{url.scheme or 'http'}://localhost{port} as base_url"
            )
        default = {"https": 443, "http": 80}.get(url.scheme)
        port = "" if url.port in (None, default) else f":{url.port}"
        return cls(base_url.rstrip("/"), host, f"{url.scheme}://{host}{port}")

    def signing_options(self, challenge: str) -> dict[str, Any]:
        """Return what `navigator.credentials.get` takes, as JSON: any passkey of this host, with its user verified."""
        return {
            "challenge": challenge,
            "rpId": self.id,
            "userVerification": "required",
            "timeout": CHALLENGE_SECONDS * 1000,
        }

    def creation_options(self, challenge: str, user: str, known: list[str]) -> dict[str, Any]:
        """Return what `navigator.credentials.create` takes, as JSON. A device with a `known` passkey makes no other."""
        from fido2.cose import CoseKey

        return {
            "challenge": challenge,
            "rp": {"id": self.id, "name": self.id},
            "user": {
                "id": user_handle(self.url, user),
                "name": user,
                "displayName": f"{user} at {self.url.partition('//')[2]}",
            },
            "pubKeyCredParams": [{"type": "public-key", "alg": alg} for alg in CoseKey.supported_algorithms()],
            "excludeCredentials": [{"type": "public-key", "id": credential_id} for credential_id in known],
            "authenticatorSelection": {
                "residentKey": "required",
                "requireResidentKey": True,
                "userVerification": "required",
            },
            "attestation": "none",
            "timeout": CHALLENGE_SECONDS * 1000,
        }

    def check_created(self, response: str) -> Created:
        """Check the response to `creation_options` (WebAuthn, section 7.1), except whether its challenge is ours.

        Raises `InvalidPasskeyError`.
        """
        from cryptography.exceptions import InvalidSignature
        from fido2 import cbor
        from fido2.cose import CoseKey
        from fido2.webauthn import RegistrationResponse

        with _checks():
            parsed: dict[str, Any] = json.loads(response)
            challenge = self._challenge(RegistrationResponse.from_dict(parsed).response.client_data)
            data = self._server().register_complete(_state(challenge), parsed)
            credential = data.credential_data
            if credential is None or credential.public_key.ALGORITHM not in CoseKey.supported_algorithms():
                raise InvalidPasskeyError("no public key that this server can use")
            if not 0 < len(credential.credential_id) <= CREDENTIAL_ID_BYTES:  # section 7.1
                raise InvalidPasskeyError("the id of the passkey is too long")
            key = cbor.encode(dict(credential.public_key))
            if len(key) > PUBLIC_KEY_BYTES:
                raise InvalidPasskeyError("the public key is too long")
            with suppress(InvalidSignature):  # any other error is of a key that could never sign in
                credential.public_key.verify(b"", b"")
            return Created(
                challenge,
                encoded(credential.credential_id),
                key,
                data.counter,
                tuple(str(one)[:20] for one in parsed["response"].get("transports", ())[:10]),
            )

    def check_signed(self, response: str, handle: str, credential_id: str, public_key: bytes) -> Signed:
        """Check the response to `signing_options` (WebAuthn, section 7.2), except whether its challenge is ours.

        `handle` is the `user_handle` of the passkey's user, which the passkey has to name itself. Raises
        `InvalidPasskeyError`.
        """
        from fido2 import cbor
        from fido2.cose import CoseKey
        from fido2.webauthn import Aaguid, AttestedCredentialData, AuthenticationResponse

        with _checks():
            parsed = json.loads(response)
            answer = AuthenticationResponse.from_dict(parsed).response
            if encoded(answer.user_handle or b"") != handle:
                raise InvalidPasskeyError("another user's passkey")
            challenge = self._challenge(answer.client_data)
            key = CoseKey.parse(cbor.decode(public_key))  # type: ignore[arg-type]  # what `check_created` encoded
            credential = AttestedCredentialData.create(Aaguid.NONE, decoded(credential_id), key)
            self._server().authenticate_complete(_state(challenge), [credential], parsed)
            return Signed(challenge, answer.authenticator_data.counter)

    def _challenge(self, client_data: Any) -> str:
        if client_data.cross_origin:
            raise InvalidPasskeyError("it was made in a frame of another site")
        return encoded(client_data.challenge)

    def _server(self) -> "Fido2Server":
        from fido2.server import Fido2Server
        from fido2.webauthn import AttestationConveyancePreference, PublicKeyCredentialRpEntity

        return Fido2Server(
            PublicKeyCredentialRpEntity(id=self.id, name=self.id),
            attestation=AttestationConveyancePreference.NONE,
            verify_origin=lambda origin: origin == self.origin,
        )


def user_handle(url: str, user: str) -> str:
    """Return the name of a server's user inside a passkey, which reveals nothing (WebAuthn, section 14.6.1)."""
    return encoded(hashlib.sha256(f"{url}\n{user}".encode()).digest())


def is_installed() -> bool:
    """Return whether `fido2` can be imported."""
    return find_spec("fido2") is not None


def credential_id_of(response: str) -> str:
    """Return the id of the passkey that a response names. Raises `InvalidPasskeyError`."""
    try:
        credential_id = json.loads(response)["id"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidPasskeyError("not a response") from error
    if not isinstance(credential_id, str) or not credential_id.isascii() or len(credential_id) > ID_LENGTH:
        raise InvalidPasskeyError("not the id of a passkey")
    return credential_id


def encoded(data: bytes) -> str:
    """Return bytes as WebAuthn writes them in JSON: base64url without padding."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def decoded(text: str) -> bytes:
    """Return the bytes that `encoded` wrote."""
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


@contextmanager
def _checks() -> Iterator[None]:
    """Make an `InvalidPasskeyError` of any error: parsers raise anything for a response that was made up."""
    try:
        yield
    except InvalidPasskeyError:
        raise
    except Exception as error:
        raise InvalidPasskeyError(str(error)) from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.replace(".", "").isdigit()
    return True


def _state(challenge: str) -> dict[str, Any]:
    """Return what `fido2` compares with: the caller compares the challenge with the stored one."""
    from fido2.webauthn import UserVerificationRequirement

    return {"challenge": challenge, "user_verification": UserVerificationRequirement.REQUIRED}
