"""Identity providers at which users have accounts, right or wrong; servers that let them in; and their browser."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from oauth_store import OidcApproval
from oauth_store.github import GitHub
from oauth_store.pages.accounts import CALLBACK_PATH
from tests.assertions import usual_signer
from tests.serving import free_port, serving
from tests.sites import Browser, Site, action_of, csrf_of, site

CLIENT_ID, CLIENT_SECRET = "wiki", "the secret of the wiki"


class AccountProvider:
    """A provider of OpenID Connect whose user signs in at once. A test changes what it answers."""

    def __init__(self) -> None:
        self.port = free_port()
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.signer = usual_signer("RS256")
        self.keys = [self.signer]
        self.more_keys: list[dict[str, Any]] = []
        self.user: dict[str, Any] = {"sub": "ada", "email": "ada@example.com", "email_verified": True}
        self.userinfo: dict[str, Any] | None = None
        self.metadata: dict[str, Any] = {}
        """What differs from the usual metadata."""
        self.claims: dict[str, Any] = {}
        """What differs from the usual claims of an ID token. None leaves one out, and a time is called."""
        self.sign: Callable[[dict[str, Any]], str | None] = self._signed
        self.answer: dict[str, str | None] = {}
        """What differs from the usual response to the browser. None leaves one out."""
        self.drips = False
        """Whether its token endpoint answers byte by byte, for an hour."""
        self.requests: list[str] = []
        self._codes: dict[str, dict[str, str]] = {}

    def _signed(self, claims: dict[str, Any]) -> str:
        return self.signer.sign(claims)

    async def _discovery(self, _request: Request) -> Response:
        metadata = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "userinfo_endpoint": f"{self.issuer}/userinfo",
            "jwks_uri": f"{self.issuer}/keys",
            "authorization_response_iss_parameter_supported": True,
            "id_token_signing_alg_values_supported": ["RS256", "ES256", "HS256", "none"],
            "scopes_supported": ["openid", "email", "profile", "groups"],
            **self.metadata,
        }
        return JSONResponse(_given(metadata))

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        code = secrets.token_urlsafe(16)
        self._codes[code] = asked
        answer = _given({"code": code, "state": asked["state"], "iss": self.issuer, **self.answer})
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode(answer)}", 303)

    async def _token(self, request: Request) -> Response:
        form = dict(await request.form())
        if self.drips:
            return StreamingResponse(self._drip(), media_type="application/json")
        asked = self._codes.pop(str(form.get("code")), None)
        verifier: Any = form.get("code_verifier", "")
        if (
            asked is None
            or create_s256_code_challenge(verifier) != asked["code_challenge"]  # type: ignore[no-untyped-call]
            or form["redirect_uri"] != asked["redirect_uri"]
            or request.headers["authorization"] != httpx2.BasicAuth(CLIENT_ID, CLIENT_SECRET)._auth_header
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "iat": now,
            "exp": now + 300,
            "nonce": asked.get("nonce"),
            **(self.user if self.userinfo is None else {"sub": self.user["sub"]}),
            **{name: value() if callable(value) else value for name, value in self.claims.items()},
        }
        id_token = self.sign(_given(claims))
        answer = {"access_token": "access at the provider", "token_type": "Bearer", "id_token": id_token}
        return JSONResponse(_given(answer))

    async def _drip(self) -> AsyncIterator[bytes]:
        while self.drips:
            yield b" "
            await asyncio.sleep(0.1)

    async def _userinfo(self, request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer access at the provider"
        return JSONResponse(self.user if self.userinfo is None else self.userinfo)

    async def _keys(self, _request: Request) -> Response:
        return JSONResponse({"keys": [*self.more_keys, *(key.public for key in self.keys)]})

    # GitHub, which has no discovery and no ID token

    async def _github_token(self, request: Request) -> Response:
        form = dict(await request.form())
        asked = self._codes.pop(str(form.get("code")), None)
        verifier: Any = form.get("code_verifier", "")
        challenge = create_s256_code_challenge(verifier)  # type: ignore[no-untyped-call]
        if asked is None or challenge != asked["code_challenge"] or form["client_secret"] != CLIENT_SECRET:
            return JSONResponse({"error": "bad_verification_code"})  # with 200, as GitHub does
        return JSONResponse({"access_token": "access at the provider", "token_type": "bearer", "scope": ""})

    async def _github_user(self, request: Request) -> Response:
        assert request.headers["authorization"].lower() == "bearer access at the provider"
        return JSONResponse(self.user)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["AccountProvider"]:
        """Serve."""
        endpoints = {
            "/.well-known/openid-configuration": self._discovery,
            "/authorize": self._authorize,
            "/token": self._token,
            "/userinfo": self._userinfo,
            "/keys": self._keys,
            "/login/oauth/authorize": self._authorize,
            "/login/oauth/access_token": self._github_token,
            "/user": self._github_user,
        }

        def counted(endpoint: Any) -> Any:
            async def handle(request: Request) -> Response:
                self.requests.append(request.url.path)
                return await endpoint(request)  # type: ignore[no-any-return]

            return handle

        routes = [Route(path, counted(endpoint), methods=["GET", "POST"]) for path, endpoint in endpoints.items()]
        async with serving(Starlette(routes=routes), self.port):
            yield self

    def settings(self, *allow: str, **more: Any) -> dict[str, Any]:
        """The settings of an `OidcApproval` that trusts it."""
        return {
            "issuer": self.issuer,
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
            "allow": list(allow or ("ada@example.com",)),
            "provider_name": "Acme",
            **more,
        }

    def github(self) -> GitHub:
        """It, speaking as GitHub does."""
        return GitHub(CLIENT_ID, CLIENT_SECRET, url=self.issuer, api_url=self.issuer)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@asynccontextmanager
async def account_site(
    database: str | Path,
    provider: AccountProvider,
    *allow: str,
    approval: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Site]:
    """A site whose users have accounts at a provider."""
    chosen = OidcApproval(**provider.settings(*allow, **(approval or {})))
    async with site(database, approval=chosen, **settings) as served:
        yield served


async def leave(browser: Browser, page: httpx2.Response) -> httpx2.Response:
    """Press the button of the provider. The redirect to it is not followed."""
    csrf = csrf_of(page)
    return await browser.http.post(action_of(page), data={"account": "leave", **({"csrf": csrf} if csrf else {})})


async def callback_of(browser: Browser, page: httpx2.Response) -> str:
    """Sign in at the provider, and return the address to which it sends the browser back."""
    left = await leave(browser, page)
    assert left.status_code == 303, left.text
    answer = await browser.http.get(left.headers["location"])
    location: str = answer.headers["location"]
    return location


async def come_back(browser: Browser, page: httpx2.Response) -> httpx2.Response:
    """Sign in at the provider, and return the page that is shown then."""
    return await follow(browser, await callback_of(browser, page))


async def follow(browser: Browser, url: str) -> httpx2.Response:
    """Open the address to which the provider sends the browser, and return the page after it."""
    assert CALLBACK_PATH in url
    answer = await browser.http.get(url)
    return await browser.http.get(answer.headers["location"]) if answer.status_code == 303 else answer


async def answered(browser: Browser, page: httpx2.Response, answer: str = "allow", **fields: Any) -> httpx2.Response:
    """Answer a request as the user who is signed in."""
    return await browser.submit(page, {"answer": answer, "user": user_of(page), **fields})


def user_of(page: httpx2.Response) -> str:
    """Who is signed in, as the page of a request says."""
    _, _, rest = page.text.partition('name="user" value="')
    return rest.partition('"')[0]
