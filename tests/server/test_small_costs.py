"""A small request costs little: what anyone may send holds up no connected client, and takes no memory."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.chaos import Child
from tests.serving import free_port
from tests.sites import Browser
from tests.stalls import serve_and_tick
from tests.steps import REDIRECT_URI, authorization_request, pkce, query_of, token_request

STALL_SECONDS = 0.05
GROWTH_BYTES = 10 * 2**20
ROUNDS = 3
KIB_64 = 64 * 1024
REGISTRATION = {"redirect_uris": [REDIRECT_URI], "token_endpoint_auth_method": "none"}
PAUSE_SECONDS = 0.005
"""Between connections: a hundred at the same moment are a hundred requests, and no small one."""
MARKS = "\u0301\u0323"
"""Two that Unicode sorts: of many, each would be moved before all others."""
MIB_4 = 4 * 2**20


class Target:
    """A server in a process of its own, and a client that is connected to it."""

    def __init__(self, url: str, process_id: int, http: httpx2.AsyncClient) -> None:
        self.url, self.http = url, http
        self._status = Path(f"/proc/{process_id}/status")
        self._clear = Path(f"/proc/{process_id}/clear_refs")
        self.token = ""

    async def register(self, **metadata: Any) -> str:
        """Register a client, and return its client_id."""
        answer = await self.http.post("/register", json=REGISTRATION | metadata)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["client_id"])

    async def connect(self) -> None:
        """Sign a client in."""
        client_id = await self.register()
        verifier, challenge = pkce()
        async with Browser() as browser:
            request = httpx2.QueryParams(authorization_request(client_id, code_challenge=challenge))
            page = await browser.open(f"{self.url}/authorize?{request}")
            redirect = await browser.allow(page, "ada's password", username="ada")
        code = query_of(redirect.headers["location"])["code"]
        answer = await self.http.post("/token", data=token_request(code, verifier, client_id=client_id))
        self.token = answer.json()["access_token"]

    async def call(self) -> None:
        """Call the tool."""
        headers = {"accept": "application/json, text/event-stream", "authorization": f"Bearer {self.token}"}
        parameters = {"name": "read_page", "arguments": {"title": "Home"}}
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": parameters}
        answer = await self.http.post("/mcp", json=call, headers=headers)
        assert "for authorized clients only" in answer.text

    async def longest_stall(self) -> float:
        """How long the event loop was held up at most since this was last asked, in seconds."""
        return float((await self.http.get("/longest")).text)

    def memory(self, what: str) -> int:
        """What of its memory is in use now (VmRSS), or was at most (VmHWM), in bytes."""
        found = re.search(rf"^{what}:\s+(\d+) kB", self._status.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def forget_peak(self) -> None:
        """Let VmHWM begin again."""
        self._clear.write_text("5")


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    """The server, with a connected client."""
    port = free_port()
    with Child(serve_and_tick, str(tmp_path / "oauth.db"), port) as child:
        assert child.receive() == "serves"
        url = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=httpx2.Limits(max_connections=300)) as http:
            target = Target(url, int(child.process.pid or 0), http)
            await target.connect()
            yield target


async def many_scopes(target: Target) -> None:
    """A client with many scopes, and a request for many more (A1): as many as can be sent, and as many as may be."""
    for registered in (6_000, 100):
        scope = " ".join(map(str, range(registered)))
        answer = await target.http.post("/register", json=REGISTRATION | {"scope": scope})
        client_id = answer.json().get("client_id") or await target.register()
        for wanted in (9_000, 100):
            request = authorization_request(client_id, scope=" ".join(f"s{number}" for number in range(wanted)))
            assert (await target.http.get("/authorize", params=request)).status_code in (400, 302)
            assert (await target.http.post("/authorize", data=request)).status_code in (400, 302)
        request = authorization_request(client_id, scope=" ".join(f"s{number}" for number in range(260_000)))
        assert (await target.http.post("/authorize", data=request)).status_code == 413


async def long_addresses(target: Target) -> None:
    """Very many redirect URIs, and a long one that is not among them (A2)."""
    for registered in (700, 50):
        uris = [f"{REDIRECT_URI}/{number}" for number in range(registered)]
        answer = await target.http.post("/register", json=REGISTRATION | {"redirect_uris": uris})
        client_id = answer.json().get("client_id") or await target.register()
        for length in (7_000, 50_000, 1_000_000):
            request = authorization_request(client_id, redirect_uri=f"{REDIRECT_URI}/{'x' * length}")
            assert (await target.http.post("/authorize", data=request)).status_code in (400, 413)


async def many_mistakes(target: Target) -> None:
    """A registration in which each of thousands of entries is wrong (A3)."""
    for entries in (2_000_000, 30_000, 100):
        body = json.dumps(REGISTRATION | {"contacts": [1] * entries}, separators=(",", ":")).encode()
        answer = await target.http.post("/register", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 413)
        assert len(answer.text) < 1_000


async def bodies_without_an_end(target: Target) -> None:
    """A hundred connections that hold back the last byte (A4)."""
    head = (
        "POST /token HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {KIB_64}\r\n\r\n"
    )
    address = ("127.0.0.1", int(target.url.rpartition(":")[2]))
    sockets = [socket.create_connection(address) for _ in range(100)]
    for one in sockets:
        await asyncio.to_thread(one.sendall, head.encode() + b"a" * (KIB_64 - 1))
        await asyncio.sleep(PAUSE_SECONDS)
    await target.call()
    for one in sockets:
        one.close()
        await asyncio.sleep(PAUSE_SECONDS)


async def many_fields(target: Target) -> None:
    """A form of as many fields as fit (A5)."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    for path in ("/token", "/authorize", "/revoke", "/apps"):
        for size in (MIB_4, KIB_64):
            answer = await target.http.post(path, content=b"a&" * (size // 2), headers=form)
            assert 200 <= answer.status_code < 500


async def many_marks(target: Target) -> None:
    """Names and passwords of combining marks alone (A6)."""
    client_id = await target.register(client_name="a" + MARKS * 4_000)
    async with Browser() as browser:
        url = httpx2.QueryParams(authorization_request(client_id))
        page = await browser.open(f"{target.url}/authorize?{url}")
        for _ in range(3):
            assert (await browser.http.get(str(page.url))).status_code == 200
        typed = {"username": "a" + MARKS * 5_400, "password": "a" + MARKS * 5_400}
        for _ in range(12):  # beyond the limit, too
            await browser.submit(page, {"answer": "allow", **typed})
            await browser.http.post(f"{target.url}/apps", data=typed)


async def junk(target: Target) -> None:
    """Junk at /token in the name of the largest registration (A7)."""
    client_id = await target.register(client_name="x" * 30_000)
    form = {"grant_type": "refresh_token", "refresh_token": "refresh_x", "client_id": client_id}
    for _ in range(20):
        assert (await target.http.post("/token", data=form)).status_code == 401


async def texts(target: Target) -> None:
    """What a web page can send anywhere (A10)."""
    for _ in range(60):
        answer = await target.http.post("/register", content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 400


async def quoted_cookies(target: Target) -> None:
    """Cookies that are all escapes (a sibling of A6)."""
    for escape in ('\\"', "\\000"):
        cookie = {"cookie": f'a="{escape * (62_000 // len(escape))}"'}
        for path in ("/apps", "/consent"):
            answer = await target.http.get(path, headers=cookie)
            assert answer.status_code == 400


async def many_addresses(target: Target) -> None:
    """A header of a proxy, of thousands of entries (a sibling of A2)."""
    for entry in ("10.0.0.1,", "fe80::1%a,"):
        forwarded = {"x-forwarded-for": entry * (60_000 // len(entry))}
        for _ in range(3):
            answer = await target.http.post("/register", json=REGISTRATION, headers=forwarded)
            assert answer.status_code == 201


ATTACKS: list[Callable[[Target], Awaitable[None]]] = [
    many_scopes,
    long_addresses,
    many_mistakes,
    bodies_without_an_end,
    many_fields,
    many_marks,
    junk,
    texts,
    quoted_cookies,
    many_addresses,
]


async def test_no_request_holds_up_a_connected_client(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """While all of this is sent, the loop is never held up for long, nor does the process grow."""

    async def call_again_and_again() -> int:
        calls = 0
        while True:
            await target.call()
            calls += 1
            await asyncio.sleep(0.005)

    for attack in ATTACKS:  # what is imported and cached at first is no growth
        await attack(target)
    await target.longest_stall()
    target.forget_peak()
    before = target.memory("VmRSS")
    stalls = {}
    for attack in ATTACKS:
        caller = asyncio.create_task(call_again_and_again())
        for _ in range(ROUNDS):
            await attack(target)
        caller.cancel()
        stalls[attack.__name__] = await target.longest_stall()
    growth = target.memory("VmHWM") - before
    with capsys.disabled():
        worst = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in stalls.items())
        print(f"\nms of processor time at a stretch: {worst}; growth {growth / 2**20:.1f} MiB")
    assert max(stalls.values()) < STALL_SECONDS, stalls
    assert growth < GROWTH_BYTES
