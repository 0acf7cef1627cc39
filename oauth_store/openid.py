"""Sign-in at an identity provider (OpenID Connect Core 1.0, section 3.1; RFC 9700): what a relying party does.

It imports Authlib, and reads certificates, which takes a quarter of a second: run it in a thread, on a loop of its own.
"""

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlencode, urlsplit

import httpx2
from fastmcp.server.auth.redirect_validation import is_loopback_host

from oauth_store.credentials import derive

if TYPE_CHECKING:
    from authlib.integrations.httpx_client import AsyncOAuth2Client
    from joserfc.jwk import KeySet

ALGORITHMS = frozenset(
    ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
)
"""How ID tokens may be signed: with a key of the provider's, and never with the secret that we share."""
BASIC, POST = "client_secret_basic", "client_secret_post"
METADATA_SECONDS = 3600
"""How long the metadata of a provider are used."""
KEYS_SECONDS = 60
"""How old the keys of a provider have to be to be fetched again for an ID token that none of them has signed."""
READ_SECONDS = 5.0
"""How long each read of a response may take."""
LEEWAY_SECONDS = 120
"""How far the clock of a provider may be off."""
SUBJECT_LENGTH = 255
"""The longest name of a user (OpenID Connect Core, section 2)."""


class ProviderUnavailableError(Exception):
    """An identity provider cannot be reached, or is not set up as it should be. The message is for the log."""


class NotSignedInError(Exception):
    """The response of an identity provider signs nobody in. The message is for the log."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who signed in at an identity provider."""

    subject: str
    """The name that never changes and that no other person gets."""
    email: str | None = None
    """An address that the provider has verified."""
    login: str | None = None
    """A name that the person chose, and that may become another person's."""
    groups: Collection[str] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Attempt:
    """One sign-in of one browser: what is sent to the provider, and has to come back."""

    state: str
    secret: str
    """Of the browser."""
    redirect_uri: str

    @property
    def nonce(self) -> str:
        return derive(self.secret, f"nonce {self.state}")

    @property
    def verifier(self) -> str:
        """The secret of PKCE (RFC 7636): 64 characters."""
        return derive(self.secret, f"verifier {self.state}")

    def authorization_url(self, endpoint: str, client_id: str, **parameters: str) -> str:
        """Return the address at the provider to which the browser goes."""
        from authlib.oauth2.rfc7636 import create_s256_code_challenge

        query = {
            "response_type": "code",
            "client_id": client_id,
            "redirect_uri": self.redirect_uri,
            "state": self.state,
            "code_challenge": create_s256_code_challenge(self.verifier),  # type: ignore[no-untyped-call]
            "code_challenge_method": "S256",
            **parameters,
        }
        return f"{endpoint}{'&' if urlsplit(endpoint).query else '?'}{urlencode(query)}"


class IdentityProvider(Protocol):
    """A provider at which users sign in."""

    @property
    def label(self) -> str:
        """What users call it."""
        ...

    @property
    def identity(self) -> str:
        """Which provider this is, and which client of it we are."""
        ...

    async def authorization_url(self, attempt: Attempt) -> str:
        """Return the address to which the browser goes. Raises `ProviderUnavailableError`."""
        ...

    async def person(self, attempt: Attempt, response: Mapping[str, str]) -> Person:
        """Return who signed in. Raises `NotSignedInError` or `ProviderUnavailableError`."""
        ...


class OpenIdProvider:
    """A provider of OpenID Connect, found by its issuer (OpenID Connect Discovery 1.0)."""

    def __init__(
        self, issuer: str, client_id: str, client_secret: str, *, label: str, with_email: bool, with_groups: bool
    ) -> None:
        """`with_email` and `with_groups`: whether these are needed to know who signed in."""
        self.label = label
        self.identity = json.dumps([issuer, client_id])
        self._issuer = issuer
        self._client_id, self._client_secret = client_id, client_secret
        self._with_email, self._with_groups = with_email, with_groups
        self._metadata: dict[str, Any] = {}
        self._metadata_at = 0.0
        self._keys: KeySet | None = None
        self._keys_at = 0.0

    async def authorization_url(self, attempt: Attempt) -> str:
        """Return the address to which the browser goes. Raises `ProviderUnavailableError`."""
        metadata = await self._known_metadata()
        offered = _texts(metadata, "scopes_supported")
        scopes = ["openid"]
        if self._with_email:
            scopes.append("email")
        if self._with_groups:  # no standard says which scope has them
            scopes += [scope for scope in ("profile", "groups") if scope in offered]
        endpoint = metadata["authorization_endpoint"]
        return attempt.authorization_url(endpoint, self._client_id, scope=" ".join(scopes), nonce=attempt.nonce)

    async def person(self, attempt: Attempt, response: Mapping[str, str]) -> Person:
        """Return who signed in. Raises `NotSignedInError` or `ProviderUnavailableError`."""
        from authlib.integrations.httpx_client import AsyncOAuth2Client

        metadata = await self._known_metadata()
        # RFC 9207, section 2.4: the response of another provider is refused before its code goes anywhere
        if response.get("iss", self._issuer) != self._issuer or (
            metadata.get("authorization_response_iss_parameter_supported") is True and "iss" not in response
        ):
            raise NotSignedInError("the response is another issuer's")
        code = code_in(response)
        methods = _texts(metadata, "token_endpoint_auth_methods_supported") or [BASIC]
        method = BASIC if BASIC in methods else POST
        async with AsyncOAuth2Client(
            self._client_id, self._client_secret, token_endpoint_auth_method=method, timeout=READ_SECONDS
        ) as http:
            token = await exchanged(http, metadata["token_endpoint"], code, attempt)
            claims = await self._claims(token, attempt)
            more = await self._more_claims(http, claims)
        subject = claims["sub"]
        if not isinstance(subject, str) or not subject.isprintable() or not 0 < len(subject) <= SUBJECT_LENGTH:
            raise NotSignedInError(f"sub is not a name of at most {SUBJECT_LENGTH} printable characters")
        return Person(subject, _email(claims) or _email(more), None, _groups(claims) or _groups(more))

    async def _claims(self, token: Mapping[str, Any], attempt: Attempt) -> dict[str, Any]:
        """Return the claims of a valid ID token (OpenID Connect Core, section 3.1.3.7)."""
        from authlib.oidc.core import CodeIDToken
        from joserfc import jwt
        from joserfc.errors import BadSignatureError, InvalidKeyIdError
        from joserfc.jws import JWSRegistry

        text = token.get("id_token")
        if not isinstance(text, str):
            raise NotSignedInError("there is no ID token")
        stated = _texts(self._metadata, "id_token_signing_alg_values_supported") or ["RS256"]
        registry = JWSRegistry(algorithms=sorted(ALGORITHMS & set(stated)), strict_check_header=False)
        try:
            try:
                signed = jwt.decode(text, await self._known_keys(), registry=registry)
            except (InvalidKeyIdError, BadSignatureError):  # the provider may have new keys
                signed = jwt.decode(text, await self._known_keys(KEYS_SECONDS), registry=registry)
            claims = CodeIDToken(
                signed.claims,
                signed.header,
                {
                    "iss": {"essential": True, "value": self._issuer},
                    "aud": {"essential": True, "value": self._client_id},
                },
                {"nonce": attempt.nonce, "client_id": self._client_id, "access_token": token.get("access_token")},
            )
            claims.validate(leeway=LEEWAY_SECONDS)
        except ProviderUnavailableError:
            raise
        except Exception as error:  # of the libraries, for what is not as they expect it
            raise NotSignedInError(f"the ID token is not valid: {error!r}") from error
        return dict(claims)

    async def _more_claims(self, http: httpx2.AsyncClient, claims: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what only the UserInfo endpoint has of what is needed (OpenID Connect Core, section 5.3)."""
        endpoint = self._metadata.get("userinfo_endpoint")
        needed = (self._with_email and not _email(claims)) or (self._with_groups and not _groups(claims))
        if not needed or not isinstance(endpoint, str):
            return {}
        more = await fetched(http, self._checked(endpoint, "userinfo_endpoint"))
        if more.get("sub") != claims["sub"]:  # section 5.3.2
            raise NotSignedInError("UserInfo is another person's")
        return more

    async def _known_metadata(self) -> dict[str, Any]:
        if time.monotonic() - self._metadata_at < METADATA_SECONDS and self._metadata:
            return self._metadata
        async with httpx2.AsyncClient(timeout=READ_SECONDS) as http:
            found = await fetched(http, f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self._issuer:  # OpenID Connect Discovery, section 4.3
            raise ProviderUnavailableError(
                f"the issuer is set to {self._issuer!r}, which calls itself {found.get('issuer')!r}; set it to exactly "
                "that, if that is the provider you trust"
            )
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            self._checked(found.get(name), name)
        self._metadata, self._metadata_at = found, time.monotonic()
        return found

    async def _known_keys(self, oldest_seconds: float = METADATA_SECONDS) -> "KeySet":
        if self._keys is None or time.monotonic() - self._keys_at >= oldest_seconds:
            async with httpx2.AsyncClient(timeout=READ_SECONDS) as http:
                found = await fetched(http, self._metadata["jwks_uri"])
            self._keys = _key_set(found.get("keys"))
            self._keys_at = time.monotonic()
        return self._keys

    def _checked(self, url: Any, name: str) -> str:
        """Return a URL of the metadata. Raises `ProviderUnavailableError` if secrets could be read on the way there."""
        if isinstance(url, str) and is_provider_url(url):
            return url
        raise ProviderUnavailableError(f"its metadata has {name} {url!r}; expected an https:// URL")


def _key_set(listed: Any) -> "KeySet":
    """Return the keys that sign, without those that nobody understands (RFC 7517, section 5)."""
    from joserfc.jwk import KeySet

    keys = []
    for key in listed if isinstance(listed, list) else ():
        if isinstance(key, dict) and key.get("use", "sig") == "sig":
            with suppress(Exception):  # of the libraries, in many ways
                keys += KeySet.import_key_set({"keys": [key]}).keys
    if not keys:
        raise ProviderUnavailableError("it lists no key that can be read")
    return KeySet(keys)


def is_provider_url(url: str) -> bool:
    """Return whether an identity provider may be at a URL: https, or on this machine, without user or fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that no URL can have
    except ValueError:
        return False
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback_host(parts.hostname))
    return secure and bool(parts.hostname) and "@" not in parts.netloc and not parts.fragment


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of texts of the metadata, or an empty one for anything else."""
    listed = metadata.get(name)
    return [text for text in listed if isinstance(text, str)] if isinstance(listed, list) else []


def code_in(response: Mapping[str, str]) -> str:
    """Return the code of a response (RFC 6749, section 4.1.2). Raises `NotSignedInError` for an error."""
    error = response.get("error")
    if error is not None:
        raise NotSignedInError(f"the provider refused: {error}")
    if not response.get("code"):
        raise NotSignedInError("the response has no code")
    return response["code"]


async def exchanged(http: "AsyncOAuth2Client", endpoint: str, code: str, attempt: Attempt) -> dict[str, Any]:
    """Return the response to a code. Raises `NotSignedInError` or `ProviderUnavailableError`."""
    try:
        token: dict[str, Any] = await http.fetch_token(
            endpoint, code=code, redirect_uri=attempt.redirect_uri, code_verifier=attempt.verifier
        )
    except httpx2.HTTPError as error:
        raise ProviderUnavailableError(repr(error)) from error
    except Exception as error:  # of Authlib, for a refusal or a response that is none
        raise NotSignedInError(f"the provider refused the code: {error!r}") from error
    return token


async def fetched(http: httpx2.AsyncClient, url: str, **options: Any) -> dict[str, Any]:
    """Return a JSON object at a URL. Raises `ProviderUnavailableError`."""
    try:
        response = await http.get(url, **options)
        response.raise_for_status()
        found = response.json()
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RecursionError) as error:
        raise ProviderUnavailableError(f"{url}: {error!r}") from error
    if not isinstance(found, dict):
        raise ProviderUnavailableError(f"{url} has no JSON object")
    return found


def _email(claims: Mapping[str, Any]) -> str | None:
    """Return the address if the same source says that it is verified."""
    email = claims.get("email")
    return email if isinstance(email, str) and claims.get("email_verified") is True else None


def _groups(claims: Mapping[str, Any]) -> Collection[str]:
    groups = claims.get("groups")
    return [group for group in groups if isinstance(group, str)] if isinstance(groups, list) else ()
