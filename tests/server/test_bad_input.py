"""Whatever is sent to the routes: never a 5xx, never a redirect to an address that nobody registered, no secret echoed.

A real server on SQLite and on PostgreSQL, which refuses text that SQLite stores; first a table of what has gone wrong
elsewhere, then hypothesis, which makes up the rest.
"""

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx2
import pytest
import uvicorn
from fastmcp import FastMCP
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oauth_store import AutoApproval, RateLimits, SQLAlchemyOAuthProvider
from oauth_store.database.schema import upgrade
from tests.databases import create_postgres_database, drop_postgres_database
from tests.serving import free_port
from tests.steps import REDIRECT_URI, pkce, query_of

PATHS = [
    "/register",
    "/authorize",
    "/token",
    "/revoke",
    "/mcp",
    "/.well-known/oauth-authorization-server",
    "/.well-known/oauth-protected-resource/mcp",
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
EXAMPLES = 2_000 if os.environ.get("OAUTH_STORE_TEST_FULL") else 150
FORM = {"content-type": "application/x-www-form-urlencoded"}


@dataclass
class Target:
    """A running server, a client that is registered with it, and what it answered so far."""

    http: httpx2.Client
    client: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    def send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        """Send a request, and hold its answer to the promise of this file."""
        answer = self.http.request(method, path, **request)
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, (method, path, request, answer.status_code, answer.text)
        if "location" in answer.headers:
            target = urlsplit(answer.headers["location"])
            assert (target.scheme, target.netloc) == ("http", urlsplit(REDIRECT_URI).netloc), answer.headers["location"]
        for secret in (self.client.get("client_secret"), *self.tokens.values()):
            assert not secret or str(secret) not in answer.text, (method, path)
        return answer


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    postgres = ""
    if request.param == "sqlite":
        database = str(tmp_path_factory.mktemp("bad-input") / "oauth.db")
    else:
        postgres = request.getfixturevalue("postgres_server")
        database = asyncio.run(create_postgres_database(postgres))
    upgrade(database)
    port = free_port()
    provider = SQLAlchemyOAuthProvider(
        database,
        base_url=f"http://127.0.0.1:{port}",
        approval=AutoApproval(),
        rate_limits=RateLimits(
            registrations=None, registrations_per_address=None, authorizations=None, authorizations_per_address=None
        ),
    )
    mcp: FastMCP[None] = FastMCP("test", auth=provider)
    app = mcp.http_app(stateless_http=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", ws="none"))

    async def serve() -> None:
        await server.serve()
        await provider.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield signed_in(http)
    finally:
        server.should_exit = True
        thread.join()
        if postgres:
            asyncio.run(drop_postgres_database(postgres, database))


def signed_in(http: httpx2.Client) -> Target:
    """The server with a client that has tokens: so that valid values are there to be mixed in."""
    metadata = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "client_secret_post"}
    client = http.post("/register", json=metadata).json()
    verifier, challenge = pkce()
    params = {"response_type": "code", "client_id": client["client_id"], "code_challenge": challenge, "state": "s"}
    code = query_of(http.get("/authorize", params=params).headers["location"])["code"]
    form = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier}
    credentials = {name: client[name] for name in ("client_id", "client_secret")}
    tokens = http.post("/token", data=form | credentials).json()
    return Target(http, client, {name: tokens[name] for name in ("access_token", "refresh_token")})


NUL, LONG = "\0", "x" * 20_000
REGISTRATIONS: list[Any] = [
    None,
    [],
    "text",
    1,
    {},
    {"redirect_uris": None},
    {"redirect_uris": "https://wiki.example.com/"},
    {"redirect_uris": [None]},
    {"redirect_uris": [1]},
    {"redirect_uris": [""]},
    {"redirect_uris": [REDIRECT_URI] * 1000},
    {"redirect_uris": [REDIRECT_URI], "client_name": NUL},
    {"redirect_uris": [REDIRECT_URI], "client_name": LONG * 3},
    {"redirect_uris": [REDIRECT_URI], "client_name": {"a": 1}},
    {"redirect_uris": [REDIRECT_URI], "scope": 1},
    {"redirect_uris": [REDIRECT_URI], "scope": f"a{NUL}b"},
    {"redirect_uris": [REDIRECT_URI], "grant_types": []},
    {"redirect_uris": [REDIRECT_URI], "grant_types": "authorization_code"},
    {"redirect_uris": [REDIRECT_URI], "grant_types": [None]},
    {"redirect_uris": [REDIRECT_URI], "response_types": ["token"]},
    {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "private_key_jwt"},
    {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "nonsense"},
    {"redirect_uris": [REDIRECT_URI], "jwks": {"keys": [{}]}},
    {"redirect_uris": [REDIRECT_URI], "client_id": "mine", "client_secret": "mine"},
    {"redirect_uris": [f"{REDIRECT_URI}{NUL}"]},
    {"redirect_uris": ["http://[::1"]},
    {"redirect_uris": ["https://xn--/"]},
    {"redirect_uris": ["cursor:"]},
]
BODIES: list[tuple[bytes, str]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"\xff\xfe", "application/json"),
    (b'{"redirect_uris": ["\\ud800"]}', "application/json"),
    (b"[" * 50_000, "application/json"),
    (b'{"a":' * 20_000, "application/json"),
    (b"\xff=\xff&client_id=\xff", "application/x-www-form-urlencoded"),
    (b"client_id=%ff%fe&token=%00&grant_type=%00&code=%00", "application/x-www-form-urlencoded"),
    (b"client_id=a&client_id=b", "application/x-www-form-urlencoded"),
    (b"&&&=&==&", "application/x-www-form-urlencoded"),
    (b"a=1&" * 20_000, "application/x-www-form-urlencoded"),
    (b"--x", "multipart/form-data; boundary=x"),
    (
        b'--x\r\nContent-Disposition: form-data; name="client_id"; filename="f"\r\n\r\nid\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
    ),
    (b"x", "multipart/form-data"),
    (b"x" * (6 * 2**20), "application/x-www-form-urlencoded"),
    (b"x" * (6 * 2**20), "application/json"),
    (b"\x1f\x8b\x08", "application/octet-stream"),
]


@pytest.mark.parametrize("registration", REGISTRATIONS, ids=lambda value: json.dumps(value)[:60])
def test_registrations(target: Target, registration: Any) -> None:
    """A registration of the wrong shape is a 400; one that is odd but right is a 201."""
    assert target.send("POST", "/register", json=registration).status_code in (201, 400)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "content_type"), BODIES, ids=[str(number) for number in range(len(BODIES))])
def test_bodies(target: Target, path: str, body: bytes, content_type: str) -> None:
    """A body that cannot be read is refused; one over the limit is a 413."""
    answer = target.send("POST", path, content=body, headers={"content-type": content_type})
    if len(body) > 5 * 2**20 and path in ("/register", "/authorize", "/token", "/revoke"):
        assert answer.status_code == 413


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_methods(target: Target, method: str, path: str) -> None:
    """A method that a route does not have is refused."""
    target.send(method, path)


@pytest.mark.parametrize(
    "value", [NUL, f"a{NUL}", LONG, "", " ", "%00", "\u202e", "\U0001f600", "'; DROP TABLE oauth_tokens; --"]
)
@pytest.mark.parametrize(
    "name",
    [
        "client_id",
        "redirect_uri",
        "response_type",
        "code_challenge",
        "code_challenge_method",
        "state",
        "scope",
        "resource",
    ],
)
def test_authorization_requests(target: Target, name: str, value: str) -> None:
    """Each parameter of /authorize, by GET and by POST, with values that break things elsewhere."""
    params = {
        "response_type": "code",
        "client_id": target.client["client_id"],
        "redirect_uri": REDIRECT_URI,
        "code_challenge": pkce()[1],
        "state": "s",
    } | {name: value}
    target.send("GET", "/authorize", params=params)
    target.send("POST", "/authorize", data=params)
    target.send("GET", f"/authorize?{urlencode(params)}&{urlencode({name: value})}")


@pytest.mark.parametrize(
    "value", [NUL, f"a{NUL}", LONG, "", " ", "\u202e", "\U0001f600", "'; DROP TABLE oauth_tokens; --"]
)
@pytest.mark.parametrize(
    "name",
    [
        "grant_type",
        "client_id",
        "client_secret",
        "code",
        "code_verifier",
        "redirect_uri",
        "refresh_token",
        "scope",
        "resource",
    ],
)
def test_token_requests(target: Target, name: str, value: str) -> None:
    """Each field of /token and /revoke, for both grants."""
    credentials = {name: target.client[name] for name in ("client_id", "client_secret")}
    for grant_type in ("authorization_code", "refresh_token"):
        form = {"grant_type": grant_type, "code": "code_x", "code_verifier": "x", "refresh_token": "refresh_x"}
        target.send("POST", "/token", data=form | credentials | {name: value})
    target.send("POST", "/revoke", data={"token": value, "token_type_hint": value} | credentials)


@pytest.mark.parametrize(
    "header",
    [
        {"authorization": "Basic"},
        {"authorization": "Basic ="},
        {"authorization": "Basic /w=="},
        {"authorization": "Basic AA=="},
        {"authorization": "Basic OjoA"},
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Bearer " + LONG},
        {"authorization": "Digest x"},
        {"x-forwarded-for": ",,,"},
        {"x-forwarded-for": "999.999.999.999"},
        {"host": "evil.example"},
        {"host": ""},
        {"origin": "null"},
        {"content-type": "application/json; charset=nonsense"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_headers(target: Target, path: str, header: dict[str, Any]) -> None:
    """Headers that cannot be read are no reason to fall over."""
    target.send("POST", path, headers=header, data={"client_id": target.client["client_id"], "token": "x"})


VALUES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [NUL, LONG, "code", "S256", "plain", "authorization_code", "refresh_token", REDIRECT_URI, "offline_access"]
    ),
    st.binary(max_size=20).map(lambda raw: raw.decode("latin-1")),
)
NAMES = st.sampled_from(
    [
        *("client_id", "client_secret", "redirect_uri", "response_type", "code_challenge", "code_challenge_method"),
        *("state", "scope", "resource", "grant_type", "code", "code_verifier", "refresh_token", "token"),
        *("token_type_hint", "iss", "prompt", "request_uri", "client_assertion", "client_assertion_type"),
    ]
)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
REGISTRATION_NAMES = st.sampled_from(
    [
        *("redirect_uris", "client_name", "client_uri", "logo_uri", "scope", "contacts", "tos_uri", "policy_uri"),
        *("grant_types", "response_types", "token_endpoint_auth_method", "jwks", "jwks_uri", "software_id"),
        *("application_type", "client_id", "client_secret", "client_secret_expires_at", "issuer"),
    ]
)

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="OAUTH_STORE_TEST_FULL" not in os.environ,  # the same requests every time, unless asked
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(path=st.sampled_from(PATHS), method=st.sampled_from(METHODS), query=FIELDS, form=FIELDS, known=st.booleans())
def test_made_up_forms(
    target: Target,
    path: str,
    method: str,
    query: list[tuple[str, str]],
    form: list[tuple[str, str]],
    known: bool,
) -> None:
    """Parameters in any number, order and number of repetitions, in the query and in the body."""
    if known:
        pair = ("client_id", target.client["client_id"])
        secret = ("client_secret", target.client["client_secret"])
        query, form = [pair, ("redirect_uri", REDIRECT_URI), *query], [pair, secret, *form]
    target.send(method, f"{path}?{urlencode(query)}", content=urlencode(form).encode(), headers=FORM)


@fuzz
@given(registration=st.dictionaries(REGISTRATION_NAMES, JSON, max_size=8), right=st.booleans())
def test_made_up_registrations(target: Target, registration: dict[str, Any], right: bool) -> None:
    """Metadata of any type."""
    if right:
        registration = {**registration, "redirect_uris": [REDIRECT_URI]}
    target.send("POST", "/register", content=json.dumps(registration).encode())


@fuzz
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=200),
    content_type=st.sampled_from(["", *FORM.values(), "application/json", "multipart/form-data; boundary=x"]),
)
def test_made_up_bytes(target: Target, path: str, body: bytes, content_type: str) -> None:
    """Bytes that are nothing."""
    target.send("POST", path, content=body, headers={"content-type": content_type})


def test_it_still_works(target: Target) -> None:
    """After all of this the client from the beginning refreshes."""
    form = {"grant_type": "refresh_token", "refresh_token": target.tokens["refresh_token"]}
    credentials = {name: target.client[name] for name in ("client_id", "client_secret")}
    answer = target.http.post("/token", data=form | credentials)
    assert answer.status_code == 200, answer.text
    print(f"{target.statuses.total()} requests, by status {dict(sorted(target.statuses.items()))}")
