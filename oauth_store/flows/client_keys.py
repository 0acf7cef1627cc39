"""The public keys of clients that authenticate with private_key_jwt: how they are read, and what they have signed."""

import base64
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

from fastmcp.server.auth import ssrf
from fastmcp.server.auth.cimd import CIMDAssertionValidator, CIMDDocument
from fastmcp.server.auth.redirect_validation import is_loopback_host
from fastmcp.utilities.auth import decode_jwt_header

from oauth_store.flows.assertions import ALGORITHMS, ClaimedAssertion
from oauth_store.flows.metadata_documents import InvalidDocumentError, MetadataDocuments, is_document_url

KEY_SET_BYTES = 32 * 1024
"""The largest set of keys that is read."""
LEAST_SECONDS = 30
"""How long a set of keys is kept, whatever its host says: its client may authenticate often."""
KEPT_SETS, KEYS = 50, 20
"""How many sets are kept, and how many keys of each."""
TRIED_KEYS = 5
"""How many keys of a set are tried for one assertion, if several fit."""

_MEMBERS = {
    "RSA": {"n": r"[\w-]{342,1368}", "e": r"[\w-]{1,8}"},  # a small exponent: a signature costs its square
    "EC": {"crv": r"P-(256|384|521)", "x": r"[\w-]{42,88}", "y": r"[\w-]{42,88}"},
}
"""The members that make a public key (RFC 7518, section 6), by its type, and how each looks. No others are kept."""
_LEAST_BITS, _MOST_BITS = 2048, 8192
"""The size of an RSA key: RFC 7518, section 3.3, and what a signature may cost."""
_KID = r"[ -~]{1,200}"
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
"""The curve of each algorithm (RFC 7518, section 3.4)."""

_unlogged = logging.Logger("unlogged", logging.CRITICAL + 1)
"""For FastMCP's validator, which warns of each assertion that does not name its key."""

KeySet = dict[str, list[dict[str, str]]]


class NoKeysError(InvalidDocumentError):
    """A document has no keys that can be used."""

    def __init__(self) -> None:
        super().__init__("it has no public RSA or EC key for private_key_jwt, in jwks or at its jwks_uri")


def key_sets() -> MetadataDocuments[KeySet]:
    """Return a source of key sets, which has fetched none yet."""
    return MetadataDocuments(read_key_set, KEY_SET_BYTES, LEAST_SECONDS, KEPT_SETS)


def check_keys_url(url: str) -> None:
    """Raise `InvalidDocumentError` for a jwks_uri whose keys can never be fetched."""
    if not is_document_url(url):
        raise InvalidDocumentError("its jwks_uri is not an https URL with a path")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidDocumentError("its jwks_uri has an impossible port") from error
    try:
        is_public = ssrf.is_ip_allowed(str(ip_address(host)))
    except ValueError:  # a name
        is_public = not is_loopback_host(host)
    if not is_public:
        raise InvalidDocumentError("its jwks_uri is not at a public address")


def read_key_set(_url: str, content: bytes) -> KeySet:
    """Return the keys of a set at a client's jwks_uri. Raises `InvalidDocumentError`."""
    try:
        return read_keys(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InvalidDocumentError("its set of keys is not JSON") from error


def read_keys(document: object) -> KeySet:
    """Return the first RSA and EC keys for signatures in a set (RFC 7517, section 5): others are passed over.

    Raises `NoKeysError` without any.
    """
    listed = document.get("keys") if isinstance(document, Mapping) else None
    keys = [_public(key) for key in listed if _is_usable(key)][:KEYS] if isinstance(listed, list) else []
    if not keys:
        raise NoKeysError
    return {"keys": keys}


def _is_usable(key: object) -> bool:
    if not isinstance(key, Mapping) or key.get("use") not in (None, "sig"):
        return False
    kid, purposes, algorithm, kind = (key.get(name) for name in ("kid", "key_ops", "alg", "kty"))
    if kid is not None and not (isinstance(kid, str) and re.fullmatch(_KID, kid)):
        return False
    if purposes is not None and not (isinstance(purposes, list) and "verify" in purposes):
        return False
    members = _MEMBERS.get(kind) if isinstance(kind, str) else None
    if members is None or not all(
        isinstance(value := key.get(name), str) and re.fullmatch(form, value, re.ASCII)
        for name, form in members.items()
    ):
        return False
    if algorithm is not None and not (algorithm in ALGORITHMS and _fits(key, algorithm)):
        return False
    return kind != "RSA" or _LEAST_BITS <= _bits(key["n"]) <= _MOST_BITS


def _bits(number: str) -> int:
    """Return the length of a number (RFC 7518, section 2), or 0 if it is none."""
    try:
        return int.from_bytes(base64.urlsafe_b64decode(number + "=" * (-len(number) % 4))).bit_length()
    except ValueError:
        return 0


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    """Return whether a key can verify signatures of an algorithm."""
    if key.get("alg") not in (None, algorithm):
        return False
    curve = _CURVES.get(algorithm)
    return key["kty"] == "RSA" if curve is None else key.get("crv") == curve


def _public(key: Mapping[str, Any]) -> dict[str, str]:
    """Return the public part of a key, even if its owner has published all of it."""
    return {name: key[name] for name in ("kty", "kid", "alg", *_MEMBERS[key["kty"]]) if isinstance(key.get(name), str)}


async def has_signed(keys: KeySet, assertion: ClaimedAssertion, audiences: Sequence[str]) -> bool:
    """Return whether an assertion is valid for one of these audiences, and one of these keys has signed it.

    FastMCP's validator decides. It is a new one: its own memory of assertions is for one process, and anyone can fill
    it. It takes several audiences, although it names one, and gets one key at a time: of several, it tries none whose
    name it does not find.
    """
    for key in _candidates(keys, assertion)[:TRIED_KEYS]:
        document = CIMDDocument.model_construct(jwks={"keys": [key]})
        validator = CIMDAssertionValidator()  # type: ignore[no-untyped-call]
        validator.logger = _unlogged
        with suppress(ValueError, RecursionError):
            if await validator.validate_assertion(
                assertion.text, assertion.client_id, cast(str, list(audiences)), document
            ):
                return True
    return False


def _candidates(keys: KeySet, assertion: ClaimedAssertion) -> list[dict[str, str]]:
    """Return the keys that may have signed an assertion: those that it names, or else those without a name.

    All that fit if it names none, and the only one in any case.
    """
    fitting = [key for key in keys["keys"] if _fits(key, assertion.algorithm)]
    try:
        kid = decode_jwt_header(assertion.text).get("kid")
    except (ValueError, RecursionError):
        return []
    if kid is None or len(fitting) == 1:
        return fitting
    named = [key for key in fitting if key.get("kid") == kid]
    return named or [key for key in fitting if "kid" not in key]
