"""A client process that is not the bottleneck: raw sockets, and no imports but the standard library.

`python benchmarks/load.py KIND SECONDS CONNECTIONS PORT [PORT ...]` prints calls per second, and its own
share of one processor. KIND is `call` (tools/call), `refresh`, or `flow` (register, authorize, exchange).
"""

import base64
import hashlib
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from urllib.parse import parse_qs, urlencode, urlsplit

REDIRECT_URI = "http://127.0.0.1:9000/callback"
REGISTRATION = json.dumps(
    {
        "redirect_uris": [REDIRECT_URI],
        "token_endpoint_auth_method": "none",
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "client_name": "Benchmark",
    }
)
CALL = json.dumps(
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "add", "arguments": {"a": 1, "b": 2}}}
)
FORM = "application/x-www-form-urlencoded"


class Connection:
    """One connection to a server, kept alive."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host = f"Host: 127.0.0.1:{port}\r\n"

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def request(
        self, method: str, path: str, body: str = "", content_type: str = "application/json", headers: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of the response."""
        self._socket.sendall(
            f"{method} {path} HTTP/1.1\r\n{self._host}Content-Type: {content_type}\r\n{headers}"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(rest) < int(fields.get("content-length", 0)):
            rest += self._receive()
        return int(status.split()[1]), fields, rest

    def _receive(self) -> bytes:
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionError("the server closed the connection")
        return received

    def json(self, *request: str, expected: int = 200) -> dict[str, str]:
        """Return the JSON of a response that must have this status."""
        status, _, body = self.request(*request)
        if status != expected:
            raise RuntimeError(f"{request[1]} returned {status}: {body.decode()[:300]}")
        answer: dict[str, str] = json.loads(body)
        return answer

    def sign_in(self) -> dict[str, str]:
        """Register, authorize and exchange the code. Return the tokens and the client_id."""
        client_id = self.json("POST", "/register", REGISTRATION, expected=201)["client_id"]
        verifier = secrets.token_urlsafe(32)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        about = {"client_id": client_id, "redirect_uri": REDIRECT_URI}
        asked = {"response_type": "code", "code_challenge": challenge, "code_challenge_method": "S256", "state": "s"}
        status, fields, _ = self.request("GET", f"/authorize?{urlencode({**about, **asked})}")
        if status != 302:
            raise RuntimeError(f"/authorize returned {status}")
        code = parse_qs(urlsplit(fields["location"]).query)["code"][0]
        form = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier}
        return {**self.json("POST", "/token", urlencode({**about, **form}), FORM), "client_id": client_id}


def calls(connection: Connection) -> Iterator[None]:
    """Call a tool forever, with one token."""
    token = connection.sign_in()["access_token"]
    headers = f"Accept: application/json, text/event-stream\r\nAuthorization: Bearer {token}\r\n"
    while True:
        answer = connection.json("POST", "/mcp", CALL, "application/json", headers)
        if "result" not in answer:
            raise RuntimeError(f"tools/call returned {answer}")
        yield


def refreshes(connection: Connection) -> Iterator[None]:
    """Refresh forever, each time with the token of the last response."""
    tokens = connection.sign_in()
    client_id = tokens["client_id"]
    while True:
        form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": tokens["refresh_token"]}
        tokens = connection.json("POST", "/token", urlencode(form), FORM)
        yield


def flows(connection: Connection) -> Iterator[None]:
    """Sign in forever, each time as another client."""
    while True:
        connection.sign_in()
        yield


KINDS = {"call": calls, "refresh": refreshes, "flow": flows}


def load(kind: str, seconds: float, connections: int, ports: list[int]) -> tuple[float, float]:
    """Return the calls per second over `connections` to each port, and the share of a processor that this took."""
    with ExitStack() as opened:
        kept = [opened.enter_context(closing(Connection(port))) for port in ports for _ in range(connections)]
        return _rate([KINDS[kind](connection) for connection in kept], seconds)


def _rate(streams: list[Iterator[None]], seconds: float) -> tuple[float, float]:
    counts = [0] * len(streams)
    for stream in streams:
        next(stream)
    begins = threading.Barrier(len(streams) + 1)
    ends = threading.Event()

    def work(number: int) -> None:
        begins.wait()
        while not ends.is_set():
            next(streams[number])
            if not ends.is_set():
                counts[number] += 1

    with ThreadPoolExecutor(len(streams)) as threads:
        works = [threads.submit(work, number) for number in range(len(streams))]
        begins.wait()
        began, processor = time.perf_counter(), time.process_time()
        try:
            time.sleep(seconds)
        finally:  # also after Ctrl-C
            ends.set()
        took, processor = time.perf_counter() - began, time.process_time() - processor
    for done in works:
        done.result()  # raises if a connection failed, which would have lowered the rate
    return sum(counts) / took, processor / took


if __name__ == "__main__":
    kind, seconds, connections, *ports = sys.argv[1:]
    print(json.dumps(load(kind, float(seconds), int(connections), [int(port) for port in ports])))
