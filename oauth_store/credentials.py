"""Secrets: how they are minted, what is stored of them, and how a refresh response is sealed."""

import hashlib
import hmac
import re
import secrets
import string
import zlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PERSONAL_LENGTH = 43  # of 62 symbols: 256 bits
_NONCE_BYTES = 12  # the nonce size of AES-GCM


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


def seal(presented: str, access_token: str, refresh_token: str) -> bytes:
    """Encrypt a token pair so that only the holder of the `presented` refresh token can read it.

    AES-256-GCM with a fresh nonce, under a key derived from the presented token, and bound to its row. The database
    has only the hash of that token, so a stolen file opens nothing, and there is no server key to keep.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    plain = f"{access_token} {refresh_token}".encode()
    return nonce + _cipher(presented).encrypt(nonce, plain, hash_secret(presented))


def unseal(presented: str, sealed: bytes) -> tuple[str, str]:
    """Return the access and the refresh token that `seal` encrypted under the same `presented` refresh token.

    Raises `cryptography.exceptions.InvalidTag` if `sealed` was made for another token or was tampered with.
    """
    nonce, encrypted = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    access_token, refresh_token = _cipher(presented).decrypt(nonce, encrypted, hash_secret(presented)).decode().split()
    return access_token, refresh_token


def _cipher(presented: str) -> AESGCM:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"oauth_store replay").derive(presented.encode())
    return AESGCM(key)
