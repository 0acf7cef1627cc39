"""Keys, and what their owners sign with them: clients, and identity providers."""

import base64
import functools
import json
import secrets
import time
from typing import Any, Literal

from joserfc import jwk, jwt

from oauth_store.flows.assertions import ALGORITHMS

CLIENT_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

Algorithm = Literal["ES256", "RS256"]
TAKEN: list[Algorithm] = ["ES256", "RS256"] if "ES256" in ALGORITHMS else ["RS256"]
"""The algorithms of clients: FastMCP's validator takes others from 4.2 on."""


class Signer:
    """A key pair."""

    def __init__(self, algorithm: Algorithm = TAKEN[0], kid: str | None = None) -> None:
        self.algorithm = algorithm
        self.kid = kid or secrets.token_hex(4)
        self._key: jwk.ECKey | jwk.RSAKey
        if algorithm == "ES256":
            self._key = jwk.ECKey.generate_key("P-256")
        else:
            self._key = jwk.RSAKey.generate_key(2048)

    @property
    def public(self) -> dict[str, Any]:
        """The public key, as a set of keys has it."""
        return {**self._key.as_dict(private=False), "kid": self.kid, "use": "sig", "alg": self.algorithm}

    @property
    def whole(self) -> dict[str, Any]:
        """The public key, and the private one too."""
        return {**self._key.as_dict(private=True), "kid": self.kid}

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        """A JWT. A header that is None is left out."""
        values = {"alg": self.algorithm, "kid": self.kid, **header}
        named = {name: value for name, value in values.items() if value is not None}
        return jwt.encode(named, claims, self._key, algorithms=[self.algorithm])


@functools.cache
def usual_signer(algorithm: Algorithm) -> Signer:
    """The key pair of every identity provider of a run: to make one of RSA takes 60 ms."""
    return Signer(algorithm)


def claims_of(client_id: str, audience: str | list[str], /, **changed: Any) -> dict[str, Any]:
    """The claims of a good assertion of a client, with these changes. None leaves one out."""
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "iat": now,
        "exp": now + 60,
        "jti": secrets.token_hex(8),
    }
    return {name: value for name, value in (claims | changed).items() if value is not None}


def asserting(assertion: str) -> dict[str, str]:
    """The parameters with which a client authenticates (RFC 7523, section 2.2)."""
    return {"client_assertion_type": CLIENT_ASSERTION_TYPE, "client_assertion": assertion}


def unsigned(claims: dict[str, Any], algorithm: str = "none", signature: str = "") -> str:
    """A JWT that nobody has signed."""
    parts = (json.dumps(part).encode() for part in ({"alg": algorithm, "typ": "JWT"}, claims))
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), signature])
