"""What floods /register and /authorize leaves little, and disturbs nobody."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import FastMCP
from starlette.requests import Request

from oauth_store import AutoApproval, ConfigurationError, RateLimits, SQLAlchemyOAuthProvider
from oauth_store.rate_limits import FloodGuard
from tests.endpoints import running
from tests.steps import BASE_URL, REDIRECT_URI, authorization_request

METADATA = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}


def request_from(peer: str, *forwarded: str) -> Request:
    """A request as the server sees it, with these lines of X-Forwarded-For."""
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    return Request({"type": "http", "client": (peer, 1), "headers": headers})


async def test_an_address_is_limited_and_told_when_to_come_back() -> None:
    """The third registration of two an hour is 429 with Retry-After; an authorization request has its own count."""
    async with running(rate_limits=RateLimits(registrations_per_address="2/hour")) as server:
        for _ in range(2):
            client = await server.register()
        answer = await server.http.post("/register", json=METADATA)
        assert answer.status_code == 429
        assert answer.json()["error"] == "temporarily_unavailable"
        assert 0 < int(answer.headers["retry-after"]) <= 3600
        assert answer.headers["cache-control"] == "no-store"
        assert await server.tokens(client["client_id"])


async def test_authorization_requests_are_limited() -> None:
    """So is /authorize, by address and in total."""
    for limits in (RateLimits(authorizations_per_address="2/hour"), RateLimits(authorizations="2/hour")):
        async with running(rate_limits=limits) as server:
            client_id = (await server.register())["client_id"]
            statuses = [
                (await server.http.get("/authorize", params=authorization_request(client_id))).status_code
                for _ in range(3)
            ]
            assert statuses == [302, 302, 429]


async def test_tokens_are_never_limited() -> None:
    """A client may refresh and revoke as often as it likes: a 429 there would hide a dead grant."""
    async with running(rate_limits=RateLimits(registrations="1/hour", authorizations="1/hour")) as server:
        client_id = (await server.register())["client_id"]
        token = await server.tokens(client_id)
        for _ in range(50):
            form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": token["refresh_token"]}
            answer = await server.http.post("/token", data=form)
            assert answer.status_code == 200
            token = answer.json()
        assert (await server.http.post("/revoke", data={"client_id": client_id, "token": "x"})).status_code == 200


async def test_limits_may_be_switched_off() -> None:
    """None is no limit."""
    limits = RateLimits(registrations_per_address=None, registrations=None)
    async with running(rate_limits=limits) as server:
        for _ in range(100):
            await server.register()


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.7", (), "203.0.113.7"),
        ("203.0.113.7", ("198.51.100.1",), "203.0.113.7"),
        ("10.0.0.1", ("198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("1.1.1.1, 198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("1.1.1.1, 198.51.100.1, 10.0.0.2",), "198.51.100.1"),
        ("10.0.0.1", ("nonsense",), "nonsense"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", (), "2001:db8:1:2::/64"),
        # several lines are one list (RFC 9110, section 5.3): HAProxy adds a line of its own
        ("10.0.0.1", ("1.1.1.1", "198.51.100.1"), "198.51.100.1"),
        ("10.0.0.1", ("1.1.1.1", "198.51.100.1", "10.0.0.2"), "198.51.100.1"),
        ("10.0.0.1", ("198.51.100.1", ""), "198.51.100.1"),
        # with a port, as Azure writes it, and in brackets
        ("10.0.0.1", ("198.51.100.1:5678",), "198.51.100.1"),
        ("10.0.0.1", ("198.51.100.1:5678, 10.0.0.2:443",), "198.51.100.1"),
        ("10.0.0.1", ("[2001:db8:1:2::3]:443",), "2001:db8:1:2::/64"),
        ("10.0.0.1", ("[2001:db8:1:2::3]",), "2001:db8:1:2::/64"),
        ("10.0.0.1", ('"[2001:db8:1:2::3]:443"',), "2001:db8:1:2::/64"),
        ("198.51.100.1:5678", (), "198.51.100.1"),
        # IPv4 inside of IPv6 (RFC 4291, section 2.5.5.2; RFC 6052, section 2.1)
        ("::ffff:203.0.113.7", (), "203.0.113.7"),
        ("::ffff:10.0.0.1", ("198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("[::ffff:198.51.100.1]:443, ::ffff:10.0.0.2",), "198.51.100.1"),
        ("64:ff9b::203.0.113.7", (), "203.0.113.7"),
        ("fe80::1%eth0", (), "fe80::/64"),
    ],
)
def test_only_trusted_proxies_are_believed(peer: str, forwarded: tuple[str, ...], address: str) -> None:
    """X-Forwarded-For counts from the right, as far as the proxies are known; IPv6 counts by network."""
    for trusted in ("10.0.0.0/8", "::ffff:10.0.0.0/104"):
        guard = FloodGuard(RateLimits(), [trusted])
        assert guard.address(request_from(peer, *forwarded)) == address


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["1.1.1.{}"], ["203.0.113.9"]),
        ([], ["203.0.113.9:5000{}"]),
        ([], ["::ffff:203.0.113.9"]),
    ],
    ids=["a-line-of-their-own", "a-port-each-time", "ipv4-inside-of-ipv6"],
)
async def test_nobody_chooses_an_address(tmp_path: Path, own: list[str], told: list[str]) -> None:
    """Behind a proxy that adds a line, or a port, a visitor counts as one address, whatever lines of theirs it keeps;
    another visitor does not count with them."""
    async with SQLAlchemyOAuthProvider(
        tmp_path / "oauth.db",
        base_url="https://wiki.example.com",
        approval=AutoApproval(),
        rate_limits=RateLimits(registrations_per_address="2/hour"),
        trusted_proxies=["10.0.0.1"],
    ) as provider:
        app = FastMCP("test", auth=provider).http_app()
        transport = httpx2.ASGITransport(app, client=("::ffff:10.0.0.1", 50000))
        async with httpx2.AsyncClient(transport=transport, base_url="https://wiki.example.com") as http:

            async def register(*lines: str) -> int:
                headers = [("X-Forwarded-For", line) for line in lines]
                return (await http.post("/register", json=METADATA, headers=headers)).status_code

            statuses = [await register(*(line.format(number) for line in (*own, *told))) for number in range(3)]
            assert statuses == [201, 201, 429]
            assert await register("::ffff:203.0.113.10") == 201


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate_limits": RateLimits(registrations="many")}, "rate_limits: registrations is 'many'"),
        ({"rate_limits": RateLimits(authorizations_per_address="")}, "authorizations_per_address is ''"),
        ({"trusted_proxies": ["proxy.example.com"]}, "trusted_proxies"),
    ],
)
def test_a_bad_limit_is_an_error_at_construction(settings: dict[str, Any], complaint: str) -> None:
    """A limit or a network that cannot be read says what is expected."""
    with pytest.raises(ConfigurationError, match=complaint):
        SQLAlchemyOAuthProvider(":memory:", base_url=BASE_URL, **settings)


async def test_a_flood_leaves_little_and_disturbs_nobody(tmp_path: Path) -> None:
    """Thousands of registrations and authorization requests leave a small file, and a signed-in client is served.

    OAUTH_STORE_TEST_FULL sends 100,000 of them.
    """
    amount = 100_000 if os.environ.get("OAUTH_STORE_TEST_FULL") else 2_000
    path = tmp_path / "oauth.db"
    async with running(str(path)) as server:
        client_id = (await server.register())["client_id"]
        token = await server.tokens(client_id)

        async def calls(seconds: float) -> list[float]:
            """How long MCP calls and refreshes of the signed-in client take meanwhile."""
            taken = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                start = time.monotonic()
                assert (await server.mcp(token["access_token"])).status_code not in (401, 429, 503)
                taken.append(time.monotonic() - start)
                await asyncio.sleep(0.02)
            return taken

        quiet = sorted(await calls(1))
        size = path.stat().st_size
        statuses: dict[int, int] = {}

        async def flood(share: int) -> None:
            for number in range(share):
                if number % 2:
                    answer = await server.http.post("/register", json=METADATA | {"client_name": "x" * 1000})
                else:
                    answer = await server.http.get("/authorize", params=authorization_request(client_id))
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        flooding = asyncio.gather(*(flood(amount // 4) for _ in range(4)))
        busy: list[float] = []
        while not flooding.done():
            busy += await calls(0.5)
        await flooding
        busy.sort()
        grown = path.stat().st_size + (tmp_path / "oauth.db-wal").stat().st_size - size
        print(
            f"{amount} requests: {statuses}; the file grew by {grown // 1024} KiB; a call took "
            f"{quiet[len(quiet) // 2] * 1000:.1f} ms before, {busy[len(busy) // 2] * 1000:.1f} ms meanwhile (medians)"
        )
        assert set(statuses) <= {201, 302, 429}
        assert statuses[429] > amount * 0.9
        assert grown < 8 * 2**20
        form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": token["refresh_token"]}
        assert (await server.http.post("/token", data=form)).status_code == 200
