"""Redirect URIs: where codes may be sent (RFC 6749, section 3.1.2; RFC 8252, section 7)."""

import re
from collections.abc import Sequence
from urllib.parse import SplitResult, unquote, urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host
from mcp.server.auth.provider import RegistrationError
from pydantic import AnyUrl

REDIRECT_URIS = 50
"""The most that a registration may have."""
_USE = "use https, http on loopback, or a scheme that no other app uses, such as com.example.app:/callback"

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


def check_redirect_uris(uris: Sequence[AnyUrl] | None) -> None:
    """Raise `RegistrationError` unless codes may be sent to every redirect URI of a registration.

    Allowed are https, http on loopback, and an app's own scheme, whatever the `application_type`: any client may claim
    either type, and Cursor, a native app, claims "web" (RFC 7591, section 5; RFC 8252, sections 7 and 8.3). At most
    `REDIRECT_URIS`: every request of the client reads them all.
    """
    if not uris:
        raise RegistrationError("invalid_redirect_uri", "redirect_uris is missing")
    if len(uris) > REDIRECT_URIS:
        raise RegistrationError("invalid_redirect_uri", f"there are more than {REDIRECT_URIS} redirect URIs")
    for uri in uris:
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


def is_same(presented: SplitResult, registered: SplitResult) -> bool:
    """Return whether a redirect URI is the registered one. On loopback, any port matches (RFC 8252, section 7.3)."""
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
