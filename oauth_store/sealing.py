"""How a refresh response is sealed, so that only the refresh token that it answers opens it."""

import secrets

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from oauth_store.credentials import hash_secret

_NONCE_BYTES = 12  # the nonce size of AES-GCM


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
