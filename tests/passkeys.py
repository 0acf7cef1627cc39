"""Servers with passkeys, and an authenticator in software: what a device and its browser send, right or wrong."""

import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from fido2 import cbor
from fido2.cose import ES256

from oauth_store import PasskeyApproval
from oauth_store.flows.passkeys import Passkey, create_link, passkeys, remove
from oauth_store.webauthn import decoded, encoded
from tests.serving import free_port
from tests.sites import Browser, Site, action_of, boxes_of, csrf_of, site

AS_SCRIPT = {"Accept": "*/*"}
PRESENT, VERIFIED, ATTESTED = 0x01, 0x04, 0x40
"""Flags of the authenticator data (WebAuthn, section 6.1)."""


@asynccontextmanager
async def passkey_site(
    database: str | Path, *, passkeys_only: bool = False, port: int | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """A site at http://localhost, which browsers trust as they trust https."""
    port = port or free_port()
    if passkeys_only:
        settings["approval"] = PasskeyApproval(**settings.get("approval", {}))
    base_url = f"http://localhost:{port}{settings.get('path', '')}"
    async with site(database, base_url=base_url, port=port, **settings) as served:
        yield served


async def link_of(wiki: Site, *, user: str = "owner", name: str = "My phone") -> str:
    """The link that `oauth-store passkey add` prints."""
    link = await wiki.provider._store.write(create_link, user, name, wiki.url)
    return f"{wiki.url}/passkey#{link.secret}"


async def passkeys_of(wiki: Site) -> list[Passkey]:
    """The passkeys that a server knows."""
    return await wiki.provider._store.read(passkeys)


async def remove_passkey(wiki: Site, name: str) -> None:
    """Remove the passkey of this name, as `oauth-store passkey remove` does."""
    [passkey] = [one for one in await passkeys_of(wiki) if one.name == name]
    assert await wiki.provider._store.write(remove, passkey, by="the test")


@dataclass
class Authenticator:
    """A device with one passkey, and a browser that shows a page of `origin`. Tests change what it sends."""

    origin: str
    count: int = 0
    flags: int = PRESENT | VERIFIED
    rp_id: str = "localhost"
    kind: dict[str, str] = field(default_factory=lambda: {"create": "webauthn.create", "get": "webauthn.get"})
    cross_origin: bool = False
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    credential_id: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    user_handle: str = ""

    def __post_init__(self) -> None:
        """Leave out the path of a server's URL."""
        self.origin = "/".join(self.origin.split("/")[:3])

    def create(self, options: dict[str, Any]) -> str:
        """Make the passkey, and return the browser's response to the options of the server."""
        self.user_handle = options["user"]["id"]
        key: Any = ES256
        public_key = cbor.encode(dict(key.from_cryptography_key(self.key.public_key())))
        credential = bytes(16) + len(self.credential_id).to_bytes(2, "big") + self.credential_id + public_key
        data = self._data(ATTESTED) + credential
        response = {
            "clientDataJSON": self._client_data("create", options["challenge"]),
            "attestationObject": encoded(cbor.encode({"fmt": "none", "attStmt": {}, "authData": data})),
            "transports": ["internal", "hybrid"],
        }
        return self._response(response)

    def sign(self, options: dict[str, Any], challenge: str | None = None) -> str:
        """Return the browser's response to the options of the server, or to another challenge."""
        client_data = self._client_data("get", options["challenge"] if challenge is None else challenge)
        data = self._data()
        signed = data + hashlib.sha256(decoded(client_data)).digest()
        response = {
            "clientDataJSON": client_data,
            "authenticatorData": encoded(data),
            "signature": encoded(self.key.sign(signed, ec.ECDSA(hashes.SHA256()))),
            "userHandle": self.user_handle,
        }
        return self._response(response)

    def _data(self, more: int = 0) -> bytes:
        rp_id_hash = hashlib.sha256(self.rp_id.encode()).digest()
        return rp_id_hash + bytes([self.flags | more]) + self.count.to_bytes(4, "big")

    def _client_data(self, kind: str, challenge: str) -> str:
        client_data = {
            "type": self.kind[kind],
            "challenge": challenge,
            "origin": self.origin,
            "crossOrigin": self.cross_origin,
        }
        return encoded(json.dumps(client_data).encode())

    def _response(self, response: dict[str, Any]) -> str:
        credential_id = encoded(self.credential_id)
        return json.dumps({"id": credential_id, "rawId": credential_id, "type": "public-key", "response": response})


async def enroll(wiki: Site, *, user: str = "owner", name: str = "My phone", **device: Any) -> Authenticator:
    """Add a passkey to a server, through its page, and return the device that has it."""
    secret = (await link_of(wiki, user=user, name=name)).partition("#")[2]
    authenticator = Authenticator(wiki.url, **device)
    async with Browser() as browser:
        answered = await add(browser, wiki, authenticator, secret)
        assert answered.status_code == 303, answered.text
    return authenticator


async def add(browser: Browser, wiki: Site, authenticator: Authenticator, secret: str) -> httpx2.Response:
    """Use a link as its page does."""
    data = {"link": secret, "question": "passkey"}
    asked = await browser.http.post(f"{wiki.url}/passkey", data=data, headers=AS_SCRIPT)
    if asked.status_code != 200:
        return asked
    made = authenticator.create(asked.json())
    return await browser.http.post(f"{wiki.url}/passkey", data={"link": secret, "passkey": made})


async def ask(browser: Browser, page: httpx2.Response, **fields: Any) -> httpx2.Response:
    """Ask for a challenge, as the script of a page does before a touch."""
    return await send(browser, page, question="passkey", **fields)


async def send(browser: Browser, page: httpx2.Response, **fields: Any) -> httpx2.Response:
    """Send the form of a page of a request, with what is ticked, and these fields."""
    ticked = [scope for scope, box in boxes_of(page).items() if box == "checked"]
    shown = {"choices": "shown", "scope": ticked} if 'name="choices"' in page.text else {}
    data = {"csrf": csrf_of(page), "answer": "allow", **shown, **fields}
    headers = AS_SCRIPT if "question" in fields else {}
    return await browser.http.post(action_of(page), data=data, headers=headers)


async def touch(
    browser: Browser, page: httpx2.Response, authenticator: Authenticator, **fields: Any
) -> httpx2.Response:
    """Press "Allow with a passkey", and touch it."""
    asked = await ask(browser, page, **fields)
    assert asked.status_code == 200, asked.text
    return await send(browser, page, passkey=authenticator.sign(asked.json()), **fields)


async def sign_in(browser: Browser, wiki: Site, authenticator: Authenticator) -> httpx2.Response:
    """Sign in on the page of connected apps with a passkey, and return what is shown then."""
    asked = await browser.http.post(f"{wiki.url}/apps", data={"question": "passkey"})
    assert asked.status_code == 200, asked.text
    answered = await browser.http.post(f"{wiki.url}/apps", data={"passkey": authenticator.sign(asked.json())})
    return await browser.open(answered.headers["location"]) if answered.status_code == 303 else answered


async def confirm(
    browser: Browser, page: httpx2.Response, authenticator: Authenticator, **fields: Any
) -> httpx2.Response:
    """Send a form of the page of connected apps that asks for a passkey again."""
    form = {"csrf": csrf_of(page), **fields}
    asked = await browser.http.post(action_of(page), data={**form, "question": "passkey"})
    assert asked.status_code == 200, asked.text
    return await browser.http.post(action_of(page), data={**form, "passkey": authenticator.sign(asked.json())})
