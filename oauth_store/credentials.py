"""Secrets: how they are minted, and what is stored of them."""

import hashlib
import hmac
import re
import secrets
import string
import zlib

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PERSONAL_LENGTH = 43  # of 62 symbols: 256 bits
_USER_CODE_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""No vowels, so no words (RFC 8628, section 6.1)."""
_USER_CODE_LENGTH = 8
_DEVICE_HANDLE = "device_"
"""What the handle of a device's request begins with. Its user code follows."""


def mint(kind: str) -> str:
    """Return a new secret of 256 random bits, prefixed with its kind: `access_`, `refresh_`, `code_`, `request_`...."""
    return f"{kind}_{secrets.token_urlsafe(32)}"


def mint_personal_token() -> str:
    """Return a new personal token: `mcp_`, 256 random bits, and a checksum, by which secret scanners recognize it."""
    body = "".join(secrets.choice(_BASE62) for _ in range(_PERSONAL_LENGTH))
    return f"mcp_{body}{_checksum(body)}"


def is_personal_token(text: str) -> bool:
    """Return whether a text is a personal token, of this or any other server: its checksum proves that."""
    found = re.fullmatch(rf"mcp_([0-9A-Za-z]{{{_PERSONAL_LENGTH}}})([0-9A-Za-z]{{6}})", text)
    return found is not None and _checksum(found[1]) == found[2]


def _checksum(body: str) -> str:
    rest, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        rest, digit = divmod(rest, 62)
        digits = _BASE62[digit] + digits
    return digits


def mint_user_code() -> str:
    """Return a new user code, which a device shows and its owner types elsewhere: 8 letters, one of 25 billion."""
    return "".join(secrets.choice(_USER_CODE_LETTERS) for _ in range(_USER_CODE_LENGTH))


def user_code_of(text: str) -> str | None:
    """Return the user code that a person typed, in any case and with any spaces or dashes; None if it is none."""
    letters = "".join(character for character in text[:100].upper() if character.isalnum())
    return letters if len(letters) == _USER_CODE_LENGTH and set(letters) <= set(_USER_CODE_LETTERS) else None


def device_handle(user_code: str) -> str:
    """Return the handle of the device's request with this user code. It is no secret: see `flows/devices.py`."""
    return f"{_DEVICE_HANDLE}{user_code}"


def user_code_in(device_handle: str) -> str:
    """Return the user code in the handle of a device's request, as people read it: WDJB-MJHT."""
    letters = device_handle.removeprefix(_DEVICE_HANDLE)
    return f"{letters[:4]}-{letters[4:]}"


def mint_grant_id() -> bytes:
    """Return a new grant id, 16 random bytes. It is not a secret: log lines carry it."""
    return secrets.token_bytes(16)


def hash_secret(secret: str) -> bytes:
    """Return the SHA-256 of a secret, 32 bytes: the only form in which it is stored.

    Our secrets carry 256 random bits, so neither a salt nor a slow hash would add anything.
    """
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, stored_hash: bytes) -> bool:
    """Return, in constant time, whether `stored_hash` is the hash of `secret`."""
    return hmac.compare_digest(hash_secret(secret), stored_hash)


def derive(secret: str, purpose: str) -> str:
    """Return a text that only a holder of `secret` can compute, and that reveals nothing about it (HMAC-SHA256)."""
    return hmac.new(secret.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def same(first: str, second: str) -> bool:
    """Compare two texts in constant time."""
    return hmac.compare_digest(first.encode(), second.encode())
