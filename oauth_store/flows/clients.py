"""A registered client as the handlers see it: the scopes that it may have, and where its codes may be sent."""

import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import RegistrationError, TokenError
from mcp.shared.auth import InvalidRedirectUriError, InvalidScopeError, OAuthClientInformationFull
from pydantic import AnyUrl, PrivateAttr
from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from oauth_store.credentials import matches
from oauth_store.database.models import CLIENT_ID_LENGTH, NEVER, clients
from oauth_store.flows.assertions import Secret, VerifiedAssertion
from oauth_store.flows.issuer import Issuer, ServerScopes
from oauth_store.flows.scopes import is_scope

OFFLINE_ACCESS = "offline_access"
"""The scope with which clients request a refresh token. Accepted, whatever the server's scopes are."""
PRIVATE_KEY_JWT = "private_key_jwt"
"""The method of a client that signs an assertion with its own key (RFC 7523, section 2.2)."""
REDIRECT_URIS = 50
SCOPES = 100
"""The most that a registration may have."""

_BROWSERS = """
about blob brave chrome chrome-distiller chrome-extension chrome-search chrome-untrusted data ddgquicklink devtools edge
extension file filesystem firefox firefox-focus googlechrome googlechrome-x-callback googlechromes hcp help its jar
javascript livescript mhtml mk mocha moz-extension moz-icon opera page-icon puffin res resource safari-extension
safari-web-extension ucbrowser vbscript view-source vivaldi wyciwyg yandexbrowser yandexbrowser-open-url
"""  # their own pages, and schemes that run or show the rest of the URI
_WEB = """
apt cabal dat did doi dweb ext feed flatpak git gs http https hyper ipfs ipns itpc jnlp jnlps pcast podcast s3 snap ssb
svn vlc web webcal webcals ws wss
"""  # fetched as the web is: a calendar, a feed, a package
_PROTOCOLS = """
acap afp afpovertcp afs amqp amqps cifs cifs2 coap coaps cvs dav davs dict dns ed2k eppc finger fish ftp ftpes ftps
gemini gopher gophers iax icap imap imaps ipp ipps irc irc6 ircs jdbc jms ldap ldapi ldaps mms mmsh mmst mongodb mqtt
mqtts mysql news nfs nfs4 nntp nntps pop pop3 pops postgres postgresql rdp redis rediss rlogin rmi rsync rtmp rtmps
rtmpt rtsp rtsps rtspu scp sftp sftp3 sieve smb smb2 smtp smtps snews snmp spice ssh ssh2 stun stuns tcp telnet tftp
tn3270 turn turns udp vnc wais webdav webdavs whois xmlrpc.beep z39.50 z39.50r z39.50s
"""  # they reach the host that the authority names
_SYSTEMS = """
android-app app-prefs app-settings applescript bitcoin callto cid content ethereum facetime facetime-audio geo ghelp im
imessage info intent itms itms-apps itms-appss itms-services itmss lightning macappstore macappstores magnet mailto man
maps market matrix message microsoft-edge mid modem monero nfc onenote openpgp4fpr package payto pkcs11 prefs pres
search search-ms service shell shortcuts sip sips skype sms smsto steam tel telprompt tg tip trash upi urlto urn
vnd.youtube whatsapp windowsdefender wtai x-apple.systempreferences x-man-page xmpp
"""  # a message, a call, a payment, a search, a setting
FOREIGN_SCHEMES = frozenset(f"{_BROWSERS} {_WEB} {_PROTOCOLS} {_SYSTEMS}".split())
"""Schemes that no app owns (RFC 8252, section 7.1): a code sent there goes to another machine, or to whatever the
browser or the system does with it.

No such list is complete, and no rule can replace it: IANA has registered `vscode` as well as `smb`. So it lists the
schemes that browsers and systems handle themselves. Of all other links, the consent page shows the start, with any
authority.
"""


DESCRIPTION_LENGTH = 200
"""The longest error that repeats requested values."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a server knows about a client besides its registration."""

    secret_hash: bytes | None = None
    scopes: ServerScopes = field(default_factory=ServerScopes)
    limited: bool = False
    """Whether the client may have only its registered scopes, like a client that the owner added by hand."""


class OwnersClient(OAuthClientInformationFull):
    """A client that the owner of the server added by hand: it may have only its registered scopes."""

    added_by_owner: Literal[True] = True


def is_owners(metadata: str) -> bool:
    """Return whether a stored registration is that of an `OwnersClient`."""
    return "added_by_owner" in metadata and json.loads(metadata).get("added_by_owner") is True


def is_limited(row: Row[Any]) -> bool:
    """Return whether the scopes that the client of a row registered are all that it may have."""
    return row.last_used_at == NEVER or is_owners(row.client_metadata)


def owners(metadata: str) -> str:
    """Return a stored registration as that of an `OwnersClient`."""
    return json.dumps(json.loads(metadata) | {"added_by_owner": True})


class StoredClient(OAuthClientInformationFull):
    """A row of `oauth_clients`. Only the hash of its secret is known, and it never leaves the process."""

    _standing: Standing = PrivateAttr(default_factory=Standing)  # a default would be copied each time

    @classmethod
    def load(cls, metadata: str, standing: Standing) -> "StoredClient":
        """Return the client of a stored row."""
        client = cls.model_validate_json(metadata)
        client._standing = standing
        return client

    @classmethod
    def of(cls, row: Row[Any], scopes: ServerScopes, *, limited: bool = False) -> "StoredClient":
        """Return the client of a row that has its columns."""
        return cls.load(row.client_metadata, Standing(row.client_secret_hash, scopes, limited))

    @property
    def secret_hash(self) -> bytes | None:
        return self._standing.secret_hash

    @property
    def is_public(self) -> bool:
        """Whether the client does not authenticate."""
        return self.secret_hash is None and self.token_endpoint_auth_method in (None, "none")

    @property
    def _listed(self) -> Mapping[str, None]:
        own = dict.fromkeys((self.scope or "").split())
        valid = self._standing.scopes.valid
        listed = dict.fromkeys([*own, *self._standing.scopes.usual]) if valid is None else valid
        return {scope: None for scope in own if scope in listed} if self._standing.limited and own else listed

    @property
    def offered(self) -> Mapping[str, None]:
        """The scopes that this client can have: those that are required, and see `validate_scope`."""
        return {**dict.fromkeys(self._standing.scopes.required), **self._listed}

    def validate_scope(self, requested_scope: str | None) -> list[str] | None:
        """Return the scopes to grant (RFC 6749, section 3.3): the requested ones that this client can have.

        It can have the server's scopes: the valid ones or, if the server does not list them, its default ones and those
        that the client registered. Of these, a client that the owner added by hand can have only those that the owner
        named. A request that names no scope, or only `offline_access`, gets the scopes that the client registered, or
        else the default ones. The required ones are always included: every request refuses a token without them. Raises
        `InvalidScopeError` if scopes were requested or named by the owner, and none of them can be granted.
        """
        own = dict.fromkeys((self.scope or "").split())
        required, usual = self._standing.scopes.required, self._standing.scopes.usual
        if self._standing.limited and own and not self._listed:
            raise InvalidScopeError("this server has none of the scopes that its owner set for this client")
        offer = self.offered
        asked = dict.fromkeys((requested_scope or "").split())
        wanted = [scope for scope in asked if scope != OFFLINE_ACCESS]
        granted = [scope for scope in wanted if scope in offer]
        if wanted and not granted:
            raise InvalidScopeError(f"this server has no scope {' '.join(wanted)}"[:DESCRIPTION_LENGTH])
        granted = granted or [s for s in own if s in offer] or [s for s in usual if s in offer]
        granted = [scope for scope in dict.fromkeys([*granted, *required]) if scope != OFFLINE_ACCESS]
        return [*granted, OFFLINE_ACCESS] if OFFLINE_ACCESS in asked else granted

    def validate_redirect_uri(self, redirect_uri: AnyUrl | None) -> AnyUrl:
        """Return the redirect URI to use. On loopback, any port matches (RFC 8252, section 7.3).

        Raises `InvalidRedirectUriError` if the client did not register it.
        """
        registered = self.redirect_uris or []
        if redirect_uri is None:
            return super().validate_redirect_uri(None)
        presented = urlsplit(str(redirect_uri))
        if any(_same(presented, urlsplit(str(uri))) for uri in registered):
            return redirect_uri
        raise InvalidRedirectUriError("redirect_uri is not registered for this client")


def as_stored(client: OAuthClientInformationFull, scopes: ServerScopes) -> StoredClient:
    """Return a client as a stored one, also one of a `get_client()` that an application has overridden."""
    return (
        client
        if isinstance(client, StoredClient)
        else StoredClient.load(client.model_dump_json(), Standing(scopes=scopes))
    )


def offered_to(client: OAuthClientInformationFull, scopes: ServerScopes) -> Collection[str]:
    """Return the scopes that a client can have, also one of a `get_client()` that an application has overridden."""
    return client.offered if isinstance(client, StoredClient) else scopes.valid or ()


_client_by_id = select(clients).where(clients.c.client_id == bindparam("b_client_id"))


async def find(issuer: Issuer, client_id: str) -> StoredClient | None:
    """Return a registered client, or None."""
    return await issuer.store.read(get_client, issuer.scopes, client_id)


def get_client(session: Session, scopes: ServerScopes, client_id: str) -> StoredClient | None:
    """Return a registered client, or None."""
    if not is_client_id(client_id):
        return None
    row = session.execute(_client_by_id, {"b_client_id": client_id}).one_or_none()
    if row is None or row.client_id != client_id:  # MariaDB pads: 'abc ' equals 'abc'
        return None
    return StoredClient.of(row, scopes, limited=is_limited(row))


def is_client_id(text: str) -> bool:
    """Return whether a text can be a client_id. PostgreSQL cannot store a NUL."""
    return len(text) <= CLIENT_ID_LENGTH and "\0" not in text


def authenticate(client: StoredClient | None, secret: Secret) -> StoredClient:
    """Return the client if the secret matches its hash. The SDK's authenticator would need the secret in plain text.

    A client without a secret needs an assertion if it registered for `private_key_jwt`; its step has to `spend` it.
    Raises `AuthenticationError`.
    """
    if client is None:
        raise AuthenticationError("client_id is not registered")
    if client.secret_hash is None and client.token_endpoint_auth_method == PRIVATE_KEY_JWT:
        if isinstance(secret, VerifiedAssertion) and secret.client_id == client.client_id:
            return client
        raise AuthenticationError("client_assertion is missing: the client registered for private_key_jwt")
    if isinstance(secret, VerifiedAssertion):
        raise AuthenticationError("the client did not register for private_key_jwt")
    if client.is_public:
        return client
    if client.secret_hash is None:
        raise AuthenticationError("this server has lost the client's secret; register again")
    if secret is None or not matches(secret, client.secret_hash):
        raise AuthenticationError("client_secret is missing or wrong")
    if client.client_secret_expires_at and client.client_secret_expires_at < time.time():
        raise AuthenticationError("client_secret has expired")
    return client


def admit(client: StoredClient | None, secret: Secret, grant_type: str) -> StoredClient:
    """Return a client that authenticates and may use this grant type. Its step has to `spend` the secret at its end.

    Raises `AuthenticationError` or `TokenError`.
    """
    admitted = authenticate(client, secret)
    if grant_type not in admitted.grant_types:
        raise TokenError("unauthorized_client", f"the client did not register for {grant_type}")
    return admitted


def check_redirect_uris(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` unless codes may be sent to every redirect URI of a registration.

    Allowed are https, http on loopback, and an app's own scheme, whatever the `application_type`: any client may claim
    either type, and Cursor, a native app, claims "web" (RFC 7591, section 5; RFC 8252, sections 7 and 8.3). At most
    `REDIRECT_URIS`: every request of the client reads them all. See `check_scopes` too.
    """
    if not client.redirect_uris:
        raise RegistrationError("invalid_redirect_uri", "redirect_uris is missing")
    if len(client.redirect_uris) > REDIRECT_URIS:
        raise RegistrationError("invalid_redirect_uri", f"there are more than {REDIRECT_URIS} redirect URIs")
    check_scopes(client)
    for uri in client.redirect_uris:
        parts = urlsplit(str(uri))
        if parts.fragment or str(uri).endswith("#"):
            raise RegistrationError("invalid_redirect_uri", "a redirect URI has a fragment")
        if "@" in parts.netloc:
            raise RegistrationError("invalid_redirect_uri", "a redirect URI has a user")
        if parts.scheme == "http" and not is_loopback_host(parts.hostname):
            raise RegistrationError("invalid_redirect_uri", f"a redirect URI uses http to another machine; {_USE}")
        refused = None if parts.scheme in ("http", "https") else foreign(parts)
        if refused:
            raise RegistrationError("invalid_redirect_uri", f"{refused}; {_USE}")


def check_scopes(client: OAuthClientInformationFull) -> None:
    """Raise `RegistrationError` unless a registration names at most `SCOPES` scopes, all of them well-formed."""
    scopes = (client.scope or "").split()
    if len(scopes) > SCOPES:
        raise RegistrationError("invalid_client_metadata", f"there are more than {SCOPES} scopes")
    if not all(map(is_scope, scopes)):
        raise RegistrationError("invalid_client_metadata", "scope contains an invalid character")


def foreign(uri: SplitResult) -> str | None:
    """Return why a redirect URI that is neither http nor https is not an app's own link, or None if it is one.

    An app's own link names no machine: it has no port, no user and no second authority. One in its path would be hidden
    from the consent page. Browsers and helpers open the web through a scheme that names it, such as `opera-https`, or
    through a link that contains a URL.
    """
    scheme = uri.scheme
    web = {"http", "https"}.intersection(re.split(r"[+-]", scheme))
    if web or FOREIGN_SCHEMES.intersection((scheme, *scheme.split("+"))) or scheme.startswith("ms-"):
        return f"{scheme[:40]}: is not an app's own scheme"
    if "@" in uri.netloc or ":" in uri.netloc.rpartition("]")[2]:
        return "an app's own link must not have a user or a port"
    if uri.path.startswith("//") or "\\" in uri.path:
        return "an app's own link must not have a second host in its path"
    if re.search(r"[/\\]{2}", unquote(f"{uri.path}?{uri.query}")):
        return "an app's own link must not contain a URL"
    return None


_USE = "use https, http on loopback, or a scheme that no other app uses, such as com.example.app:/callback"


def _same(presented: SplitResult, registered: SplitResult) -> bool:
    if presented._replace(path=presented.path or "/") == registered._replace(path=registered.path or "/"):
        return True
    if presented.scheme != "http" or not is_loopback_host(registered.hostname) or "@" in presented.netloc:
        return False
    return (presented.scheme, presented.hostname, presented.path or "/", presented.query, presented.fragment) == (
        registered.scheme,
        registered.hostname,
        registered.path or "/",
        registered.query,
        registered.fragment,
    )
