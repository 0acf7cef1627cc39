"""The public keys of clients that authenticate with private_key_jwt: how they are read, and what they have signed."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastmcp.server.auth.cimd import CIMDAssertionValidator, CIMDDocument

from oauth_store.flows.assertions import ClaimedAssertion
from oauth_store.flows.metadata_documents import InvalidDocumentError, MetadataDocuments

KEY_SET_BYTES = 32 * 1024
"""The largest set of keys that is read."""
LEAST_SECONDS = 30
"""How long a set of keys is kept, whatever its host says: its client may authenticate often."""

_MEMBERS = {
    # 2048 bits at least (RFC 7518, section 3.3), and 8192 at most, with a small exponent: a signature costs its square
    "RSA": {"n": r"[\w-]{342,1366}", "e": r"[\w-]{1,8}"},
    "EC": {"crv": r"P-(256|384|521)", "x": r"[\w-]{42,88}", "y": r"[\w-]{42,88}"},
}
"""The members that make a public key (RFC 7518, section 6), by its type, and how each looks. No others are kept."""

KeySet = dict[str, list[dict[str, str]]]


def key_sets() -> MetadataDocuments[KeySet]:
    """Return a source of key sets, which has fetched none yet."""
    return MetadataDocuments(read_key_set, KEY_SET_BYTES, LEAST_SECONDS)


def read_key_set(_url: str, content: bytes) -> KeySet:
    """Return the keys of a set at a client's jwks_uri. Raises `InvalidDocumentError`."""
    try:
        return read_keys(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InvalidDocumentError("its set of keys is not JSON") from error


def read_keys(document: object) -> KeySet:
    """Return the RSA and EC keys for signatures in a set (RFC 7517, section 5): others are passed over.

    Raises `InvalidDocumentError` without any.
    """
    listed = document.get("keys") if isinstance(document, Mapping) else None
    keys = [_public(key) for key in listed if _is_usable(key)] if isinstance(listed, list) else []
    if not keys:
        raise InvalidDocumentError("it has no public RSA or EC key for private_key_jwt, in jwks or at its jwks_uri")
    return {"keys": keys}


def _is_usable(key: object) -> bool:
    if not isinstance(key, Mapping) or key.get("use") not in (None, "sig"):
        return False
    kind = key.get("kty")
    members = _MEMBERS.get(kind) if isinstance(kind, str) else None
    return members is not None and all(
        isinstance(value := key.get(name), str) and re.fullmatch(form, value, re.ASCII)
        for name, form in members.items()
    )


def _public(key: Mapping[str, Any]) -> dict[str, str]:
    """Return the public part of a key, even if its owner has published all of it."""
    return {name: key[name] for name in ("kty", "kid", *_MEMBERS[key["kty"]]) if isinstance(key.get(name), str)}


async def has_signed(keys: KeySet, assertion: ClaimedAssertion, audiences: Sequence[str]) -> bool:
    """Return whether an assertion is valid for one of these audiences, and one of these keys has signed it.

    FastMCP's validator decides. It is a new one: its own memory of assertions is for one process, and anyone can fill
    it. It takes several audiences, although it names one.
    """
    kind = "EC" if assertion.algorithm.startswith("E") else "RSA"
    usable = [key for key in keys["keys"] if key["kty"] == kind]
    document = CIMDDocument.model_construct(jwks={"keys": usable})
    validator = CIMDAssertionValidator()  # type: ignore[no-untyped-call]
    try:
        return bool(usable) and await validator.validate_assertion(
            assertion.text, assertion.client_id, cast(str, list(audiences)), document
        )
    except ValueError:
        return False
