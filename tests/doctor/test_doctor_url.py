"""`oauth-store doctor --url`: real servers behind real proxies that change or block requests."""

import asyncio
import contextlib
import datetime
import ipaddress
import os
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastmcp import FastMCP
from fastmcp.server.auth import ssrf
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from mcp.server.auth.settings import ClientRegistrationOptions
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from oauth_store import AutoApproval, SQLAlchemyOAuthProvider
from oauth_store.doctor import url as doctor_url
from oauth_store.doctor.finding import Finding
from oauth_store.doctor.url import examine_url
from tests.commands import run
from tests.databases import sqlite_rows
from tests.serving import free_port, serving

pytestmark = pytest.mark.usefixtures("_no_proxy")

REFUSED = (
    b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\nWWW-Authenticate: Bearer "
    b'error="invalid_token", resource_metadata="http://127.0.0.1:%d/.well-known/oauth-protected-resource/mcp"\r\n\r\n'
)
Seen = list[tuple[str, str]]
Change = Callable[[Request, Callable[[], Awaitable[Response]]], Awaitable[Response]]


@pytest.fixture
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def fresh(findings: list[Finding], level: str) -> dict[str, str]:
    """The findings at a level, by check."""
    return {finding.check: finding.found for finding in findings if finding.level == level}


async def look(url: str) -> list[Finding]:
    """Return the doctor's findings. It runs in a thread, because the server runs in this one."""
    findings = await asyncio.to_thread(lambda: list(examine_url(url)))
    for finding in findings:
        assert (finding.advice is None) == (finding.level == "ok"), finding
    return findings


@asynccontextmanager
async def our_server(directory: Path, base_url: str, port: int, **settings: Any) -> AsyncIterator[str]:
    """Serve our server on a file, without a proxy, and yield its URL."""
    path = str(directory / "oauth.db")
    async with AsyncExitStack() as stack:
        provider = SQLAlchemyOAuthProvider(path, base_url=base_url, approval=AutoApproval(), **settings)
        await stack.enter_async_context(provider)
        app = FastMCP("wiki", auth=provider).http_app(stateless_http=True)
        yield await stack.enter_async_context(app_serving(app, port))


@asynccontextmanager
async def app_serving(app: Any, port: int) -> AsyncIterator[str]:
    """Serve a FastMCP application with its lifespan."""
    async with app.router.lifespan_context(app), serving(app, port) as root:
        yield root


def proxy(upstream: str, seen: Seen, change: Change | None = None) -> ASGIApp:
    """A reverse proxy that changes requests or responses by `change`."""

    async def handle(request: Request) -> Response:
        seen.append((request.method, request.url.path))

        async def forward() -> Response:
            headers = {k: v for k, v in request.headers.items() if k not in request.scope.get("strip", ())}
            path = request.scope.get("forward_to", request.url.path)
            async with httpx2.AsyncClient(timeout=60) as http:
                answer = await http.request(
                    request.method, upstream + path, headers=headers, content=await request.body()
                )
            kept = {k: v for k, v in answer.headers.items() if k not in ("content-length", "transfer-encoding")}
            return Response(answer.content, answer.status_code, kept)

        return await (change(request, forward) if change else forward())

    return Starlette(
        routes=[Route("/{path:path}", handle, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])]
    )


class Behind:
    """Our server behind a proxy, with the proxy's URL as base_url unless another is given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.seen: Seen = []
        self.url = f"http://127.0.0.1:{self.port}/mcp"

    async def look(self, change: Change | None = None, url: str | None = None, **settings: Any) -> list[Finding]:
        """Return the doctor's findings through the proxy."""
        base_url = settings.pop("base_url", f"http://127.0.0.1:{self.port}")
        async with AsyncExitStack() as stack:
            upstream = await stack.enter_async_context(our_server(self.directory, base_url, free_port(), **settings))
            await stack.enter_async_context(serving(proxy(upstream, self.seen, change), self.port, date_header=False))
            return await look(url or self.url)


@pytest.fixture
def behind(tmp_path: Path) -> Behind:
    return Behind(tmp_path)


def without(header: str, of: str = "") -> Change:
    """A proxy that drops a header of all responses, or of those for one path."""

    async def change(request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        response = await forward()
        if request.url.path.startswith(of) and header in response.headers:
            del response.headers[header]
        return response

    return change


def instead(path: str, response: Callable[[], Response]) -> Change:
    """A proxy that responds to one path itself."""

    async def change(request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        return response() if request.url.path.startswith(path) else await forward()

    return change


def rewriting(old: str, new: str) -> Change:
    """A proxy that replaces a text in the bodies that it forwards."""

    async def change(_request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        response = await forward()
        headers = {k: v for k, v in response.headers.items() if k != "content-length"}
        return Response(bytes(response.body).replace(old.encode(), new.encode()), response.status_code, headers)

    return change


# Healthy


async def test_a_healthy_server_has_no_finding(tmp_path: Path) -> None:
    """Our server has no problems and no warnings, and every check is reported."""
    port = free_port()
    async with our_server(tmp_path, f"http://127.0.0.1:{port}", port):
        findings = await look(f"http://127.0.0.1:{port}/mcp")
    assert [finding.check for finding in findings] == [
        "https",
        "server's clock",
        "challenge",
        "Authorization header",
        "resource metadata",
        "authorization server",
        "server metadata",
        "endpoints",
        "CORS",
    ]
    assert {finding.level for finding in findings} == {"ok"}


async def test_the_doctor_leaves_nothing_behind(behind: Behind) -> None:
    """It registers nothing, authorizes nothing and requests no token: no row is written, /token gets no POST."""
    findings = await behind.look()
    assert fresh(findings, "problem") == {}
    assert ("POST", "/token") not in behind.seen
    assert ("POST", "/register") not in behind.seen
    assert {path for method, path in behind.seen if method == "POST"} == {"/mcp"}
    for table in ("oauth_clients", "oauth_codes", "oauth_tokens"):
        assert sqlite_rows(str(behind.directory / "oauth.db"), f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_server_under_a_path(behind: Behind) -> None:
    """A prefix that the proxy strips from all paths but /.well-known/ is fine, if base_url has it."""

    async def change(request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        request.scope["forward_to"] = request.url.path.removeprefix("/wiki")
        return await forward()

    findings = await behind.look(
        change, url=behind.url.replace("/mcp", "/wiki/mcp"), base_url=f"http://127.0.0.1:{behind.port}/wiki"
    )
    assert fresh(findings, "problem") == {}
    assert fresh(findings, "warning") == {}


async def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--url without a database checks only the server; the exit code is 0 without a problem, else 1."""
    monkeypatch.chdir(tmp_path)
    port = free_port()
    async with our_server(tmp_path, f"http://127.0.0.1:{port}", port):
        answer = await asyncio.to_thread(run, "doctor", "--url", f"http://127.0.0.1:{port}/mcp")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "challenge: 401, with resource_metadata" in answer.stdout
        assert "schema" not in answer.stdout
        answer = await asyncio.to_thread(run, "doctor", "--url", f"http://localhost:{port}/mcp")
    assert answer.returncode == 1
    assert f"-> set base_url to http://localhost:{port}" in answer.stdout
    assert answer.stderr == ""


# The URL


@pytest.mark.parametrize(
    "url", ["wiki.example.com/mcp", "ftp://h/mcp", "https://", "https://h:99999/", "http://[::1", ""]
)
async def test_what_is_no_url(url: str) -> None:
    """A text that is not the URL of a server is a problem, with an example."""
    (finding,) = await look(url)
    assert (finding.check, finding.level) == ("url", "problem")


@pytest.mark.parametrize("url", ["https://ada:pa55word@127.0.0.1:1/mcp", "https://ada:pa55word@127.0.0.1:99999/mcp"])
async def test_a_password_in_the_url_is_not_used(url: str) -> None:
    """A URL with a user name is refused, and not repeated."""
    (finding,) = await look(url)
    assert finding.level == "problem"
    assert "pa55word" not in str(finding)


async def test_a_host_that_can_be_none() -> None:
    """An impossible host name is a failed connection."""
    (finding,) = await look("http://wiki example.com/mcp")
    assert (finding.check, finding.level) == ("connection", "problem")


async def test_a_closed_port() -> None:
    """A port without a listener is one problem."""
    findings = await look(f"http://127.0.0.1:{free_port()}/mcp")
    assert "refused" in fresh(findings, "problem")["connection"].lower() or "attempts" in str(findings)


async def test_a_host_that_does_not_exist() -> None:
    """A host name without an address is one problem."""
    findings = await look("http://no-such-host.invalid/mcp")
    assert "no-such-host.invalid" in fresh(findings, "problem")["connection"]


async def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts the connection and sends nothing times out."""
    monkeypatch.setattr("oauth_store.doctor.http.TIMEOUT_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        findings = await look(f"http://127.0.0.1:{silent.getsockname()[1]}/mcp")
    assert "after 1 s" in fresh(findings, "problem")["connection"]


@pytest.mark.parametrize("sent", [b"POST", b"GET"], ids=["at once", "later"])
async def test_headers_that_trickle(sent: bytes, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then, without end, times out after the time for one response."""
    monkeypatch.setattr("oauth_store.doctor.http.TIMEOUT_SECONDS", 1)

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            request = await reader.readuntil(b"\r\n\r\n")
            if not request.startswith(sent):
                writer.write(REFUSED % behind.port)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(200):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            writer.close()
            await writer.wait_closed()

    tasks: list[Any] = []
    before = time.monotonic()
    async with await asyncio.start_server(trickle, "127.0.0.1", behind.port):
        findings = await look(behind.url)
        await asyncio.gather(*tasks)
    assert fresh(findings, "problem")["connection"] == "127.0.0.1: no complete response after 1 s"
    assert time.monotonic() - before < 5


async def test_something_that_is_not_http() -> None:
    """A server of another protocol is a problem of the connection."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        findings = await look(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp")
    assert "connection" in fresh(findings, "problem")


async def test_https_to_an_http_port(tmp_path: Path) -> None:
    """https:// on a port that serves http is reported as that."""
    port = free_port()
    async with our_server(tmp_path, f"http://127.0.0.1:{port}", port):
        (finding,) = await look(f"https://127.0.0.1:{port}/mcp")
    assert (finding.check, finding.level) == ("https", "problem")
    assert finding.advice == "does this port serve plain http?"


async def test_http_on_a_public_address(behind: Behind) -> None:
    """http:// on anything but loopback is a problem."""
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        address = "0.0.0.0"  # this machine, by a name that is not loopback
    findings = await behind.look(url=f"http://{address}:{behind.port}/mcp")
    assert "in plain text" in fresh(findings, "problem")["https"]


# The MCP endpoint


async def test_a_wrong_path(behind: Behind) -> None:
    """For a wrong path it prints where the endpoint usually is, and sends no further requests."""
    findings = await behind.look(url=behind.url.replace("/mcp", "/"))
    assert fresh(findings, "problem")["challenge"].startswith("no endpoint at this URL: 404")
    assert len(behind.seen) == 1


async def test_a_redirect_is_not_followed(behind: Behind) -> None:
    """A redirect is a problem that names its target, without the query; it is not followed."""
    target = "http://elsewhere.invalid/login?secret=1"
    findings = await behind.look(instead("/mcp", lambda: RedirectResponse(target)))
    assert fresh(findings, "problem") == {"challenge": "a redirect (307) to http://elsewhere.invalid/login"}
    assert len(behind.seen) == 1


async def test_a_page_of_the_proxy(behind: Behind) -> None:
    """An HTML page in place of the server's response is reported as one of the proxy."""
    findings = await behind.look(instead("/mcp", lambda: HTMLResponse("<html>Welcome to nginx", 200)))
    assert fresh(findings, "problem") == {"challenge": "200 with an HTML page"}


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_server_that_is_down_behind_its_proxy(status: int, behind: Behind) -> None:
    """For a gateway error, the advice is to start the server."""
    findings = await behind.look(instead("/mcp", lambda: HTMLResponse("<h1>Bad Gateway</h1>", status)))
    problems = [finding for finding in findings if finding.level == "problem"]
    assert [finding.check for finding in problems] == ["challenge"]
    assert "start the server" in str(problems[0].advice)


async def test_a_lost_challenge(behind: Behind) -> None:
    """A proxy that drops WWW-Authenticate is a problem, and the other checks still run."""
    findings = await behind.look(without("www-authenticate"))
    assert "without WWW-Authenticate" in fresh(findings, "problem")["challenge"]
    assert "resource metadata" in fresh(findings, "ok")


async def test_a_lost_authorization_header(behind: Behind) -> None:
    """A proxy that drops Authorization is a problem: a wrong token gets the same response as none."""

    async def change(request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        request.scope["strip"] = ["authorization"]
        return await forward()

    findings = await behind.look(change)
    assert fresh(findings, "problem") == {
        "Authorization header": "the server does not get it: a wrong token has the same response as no token"
    }


async def test_a_password_of_the_proxy(behind: Behind) -> None:
    """A proxy with its own password is a problem that says so."""
    answer = lambda: PlainTextResponse("who?", 401, {"WWW-Authenticate": 'Basic realm="x"'})  # noqa: E731
    findings = await behind.look(instead("/", answer))
    assert "but Basic" in fresh(findings, "problem")["challenge"]


async def test_a_server_without_authorization() -> None:
    """A server that lets everyone in is a problem of the challenge."""
    app = FastMCP("open").http_app(stateless_http=True)
    async with app_serving(app, free_port()) as root:
        findings = await look(f"{root}/mcp")
    assert "expected 401" in fresh(findings, "problem")["challenge"]


# The metadata


async def test_a_wrong_base_url(behind: Behind) -> None:
    """A base_url on another host is a problem that names the right one; that host is not contacted."""
    other = free_port()
    findings = await behind.look(base_url=f"http://localhost:{other}")
    problems = [finding for finding in findings if finding.level == "problem"]
    assert len(problems) == 3
    assert "WWW-Authenticate names http://localhost" in problems[0].found
    assert f"resource is http://localhost:{other}/mcp" in problems[1].found
    assert "the resource metadata names http://localhost" in problems[2].found
    assert all(f"set base_url to http://127.0.0.1:{behind.port}" in str(finding.advice) for finding in problems)


async def test_an_issuer_elsewhere(behind: Behind) -> None:
    """An issuer_url on another host is named, and not contacted."""
    findings = await behind.look(issuer_url=f"http://localhost:{free_port()}")
    assert "it was not contacted" in fresh(findings, "problem")["authorization server"]


async def test_a_trailing_slash(behind: Behind) -> None:
    """A URL that differs from the resource by a trailing slash is a redirect, or a warning with the right URL."""
    findings = await behind.look(url=behind.url + "/")
    assert behind.url in fresh(findings, "problem")["challenge"] or "resource metadata" in fresh(findings, "warning")


async def test_a_lost_prefix(behind: Behind) -> None:
    """A proxy that forwards only the prefix, and not /.well-known/, hides the metadata."""
    findings = await behind.look(
        instead("/.well-known/oauth-protected-resource", lambda: PlainTextResponse("not found", 404))
    )
    problem = next(finding for finding in findings if finding.level == "problem")
    assert problem.found == "/.well-known/oauth-protected-resource/mcp is missing: 404"
    assert "/.well-known/ too" in str(problem.advice)


@pytest.mark.parametrize(
    ("path", "check"),
    [
        ("/.well-known/oauth-protected-resource", "resource metadata"),
        ("/.well-known/oauth-authorization-server", "authorization server"),
    ],
)
@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (lambda: HTMLResponse("<!doctype html>", 200), "200 with an HTML page, not JSON"),
        (lambda: PlainTextResponse("[]", 200), "returns 200, not JSON"),
        (lambda: PlainTextResponse("x" * 1_000_000, 200), "returns 200, not JSON"),
        (lambda: PlainTextResponse("[" * 60_000, 200), "returns 200, not JSON"),
        (lambda: PlainTextResponse("", 500), "returns 500"),
        (lambda: RedirectResponse("/login?next=secret"), "/login"),
    ],
)
async def test_metadata_that_is_none(
    path: str, check: str, response: Callable[[], Response], complaint: str, behind: Behind
) -> None:
    """Metadata that is a page, an error, a redirect, or anything but a JSON object is reported as that."""
    findings = await behind.look(instead(path, response))
    assert complaint in fresh(findings, "problem")[check]
    assert "secret" not in str(findings)


async def test_a_rewritten_issuer(behind: Behind) -> None:
    """An issuer that differs in any character from the expected one is a problem."""
    findings = await behind.look(rewriting('"issuer":"http://', '"issuer":"HTTP://'))
    assert "issuer is HTTP://" in fresh(findings, "problem")["authorization server"]


async def test_what_a_server_says_cannot_play_with_the_terminal(behind: Behind) -> None:
    """Control characters and changes of direction in a server's text are not printed."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(our_server(behind.directory, behind.url[:-4], free_port()))
        change = rewriting('"issuer":"', '"issuer":"\\u001b[2J\\u202e')
        await stack.enter_async_context(serving(proxy(upstream, [], change), behind.port))
        answer = await asyncio.to_thread(run, "doctor", "--url", behind.url)
    assert answer.returncode == 1
    assert "issuer is [2J http://127.0.0.1" in answer.stdout
    assert answer.stdout.replace("\n", "").isprintable()


async def test_no_authorization_server(behind: Behind) -> None:
    """Resource metadata that names no authorization server is a problem."""
    findings = await behind.look(rewriting('"authorization_servers"', '"authorization_clerks"'))
    assert fresh(findings, "problem") == {"authorization server": "the resource metadata names none"}


async def test_an_endpoint_elsewhere(behind: Behind) -> None:
    """An endpoint on another host is named, and not contacted."""
    findings = await behind.look(
        rewriting(f'token_endpoint":"http://127.0.0.1:{behind.port}/', 'token_endpoint":"http://elsewhere.invalid/')
    )
    assert "http://elsewhere.invalid/token" in fresh(findings, "problem")["token endpoint"]


@pytest.mark.parametrize("path", ["/authorize", "/token", "/register", "/revoke"])
async def test_an_endpoint_that_the_proxy_keeps(path: str, behind: Behind) -> None:
    """An endpoint that the proxy responds to itself is a problem of that endpoint."""
    findings = await behind.look(instead(path, lambda: HTMLResponse("<h1>Not Found</h1>", 404)))
    assert list(fresh(findings, "problem").values()) == [f"{path} returns 404 with an HTML page"]


async def test_lost_cors(behind: Behind) -> None:
    """A proxy that drops the CORS headers is a warning: only clients in a browser need them."""
    findings = await behind.look(without("access-control-allow-origin"))
    assert fresh(findings, "problem") == {}
    assert len([finding for finding in findings if finding.check == "CORS" and finding.level == "warning"]) == 3


async def test_a_clock_that_is_wrong(behind: Behind) -> None:
    """A server whose Date is an hour off is a problem; one without a Date is not."""

    def an_hour_ago() -> str:
        then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        return then.strftime("%a, %d %b %Y %H:%M:%S GMT")

    async def change(_request: Request, forward: Callable[[], Awaitable[Response]]) -> Response:
        response = await forward()
        response.headers["date"] = an_hour_ago()
        return response

    assert "60 minutes behind this machine's" in fresh(await behind.look(change), "problem")["server's clock"]
    findings = await behind.look(without("date"))
    assert "server's clock" not in {finding.check for finding in findings}


# Other servers


async def test_what_the_in_memory_provider_lacks() -> None:
    """FastMCP's provider without registration has PKCE, but lacks what Claude needs."""
    port = free_port()
    auth = InMemoryOAuthProvider(base_url=f"http://127.0.0.1:{port}")
    async with app_serving(FastMCP("memory", auth=auth).http_app(stateless_http=True), port) as root:
        findings = await look(f"{root}/mcp")
    texts = [f"{finding.level} {finding.found}" for finding in findings if finding.check == "server metadata"]
    assert [text.partition(":")[0] for text in texts] == [
        "warning no `none` in token_endpoint_auth_methods_supported",
        "warning no authorization_response_iss_parameter_supported (RFC 9207)",
        "warning no client_id_metadata_document_supported",
        "problem no registration_endpoint",
    ]


async def test_registration_that_is_switched_off(behind: Behind) -> None:
    """Our server without registration is a warning: clients with a metadata document can still connect."""
    findings = await behind.look(client_registration_options=ClientRegistrationOptions(enabled=False))
    assert fresh(findings, "problem") == {}
    assert "no registration_endpoint" in fresh(findings, "warning")["server metadata"]


async def test_documents_that_cannot_be_fetched(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this machine cannot fetch Claude's document for a server that accepts it, a warning names the fix."""
    asked = []

    async def resolve_hostname(hostname: str, _port: int) -> list[str]:
        asked.append(hostname)
        raise ssrf.SSRFError("DNS resolution failed")

    monkeypatch.setattr(ssrf, "resolve_hostname", resolve_hostname)
    assert "client documents" not in fresh(await behind.look(), "warning")
    assert asked == []  # Claude.ai cannot reach loopback

    monkeypatch.setattr(doctor_url, "is_loopback_host", lambda _host: False)
    findings = {finding.check: finding for finding in await behind.look()}
    assert "metadata: DNS" in findings["client documents"].found
    assert "metadata_documents=False" in str(findings["client documents"].advice)
    assert asked == ["claude.ai"]

    findings = {finding.check: finding for finding in await behind.look(metadata_documents=False)}
    assert "client documents" not in findings
    assert "metadata_documents=False" in str(findings["server metadata"].advice)
    assert asked == ["claude.ai"]


async def test_an_outage_of_the_database_is_none_of_the_proxy(behind: Behind) -> None:
    """A server without its database returns 503, and the doctor says where to look."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(our_server(behind.directory, f"http://127.0.0.1:{behind.port}", behind.port))
        await look(behind.url)
        for path in behind.directory.iterdir():
            path.unlink()
        findings = await look(behind.url)
    assert "503" in fresh(findings, "problem")["Authorization header"]


# https


def certificate(host: str, directory: Path, days: int = 1) -> tuple[Path, Path, Path]:
    """A certificate for a host, its key, and the authority that signed it, in files."""
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, key: ec.EllipticCurvePrivateKey, issuer: str) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = build("authority", authority_key, "authority").add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    names: list[x509.GeneralName] = [x509.DNSName(host)]
    if host[0].isdigit():
        names = [x509.IPAddress(ipaddress.ip_address(host))]
    leaf = build(host, key, "authority").add_extension(x509.SubjectAlternativeName(names), critical=False)
    files = tuple(directory / f"{name}-{secrets.token_hex(2)}.pem" for name in ("leaf", "key", "authority"))
    files[0].write_bytes(leaf.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files[2].write_bytes(authority.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return files[0], files[1], files[2]


@pytest.mark.parametrize(
    ("host", "days", "trusted", "complaint"),
    [
        ("127.0.0.1", 1, True, None),
        ("127.0.0.1", 1, False, "unable to get local issuer certificate"),
        ("127.0.0.1", -1, True, "certificate has expired"),
        ("wiki.example.com", 1, True, "mismatch"),
    ],
)
async def test_certificates(
    host: str, days: int, trusted: bool, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trusted certificate is ok; one that is unknown, expired or of another host is reported as that."""
    leaf, key, authority = certificate(host, tmp_path, days)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    else:
        monkeypatch.setenv("SSL_CERT_FILE", ssl.get_default_verify_paths().cafile or os.devnull)
    port = free_port()
    base_url = f"https://127.0.0.1:{port}"
    async with (
        our_server(tmp_path, base_url, free_port()) as upstream,
        serving(proxy(upstream, []), port, ssl_certfile=leaf, ssl_keyfile=key),
    ):
        findings = await look(f"{base_url}/mcp")
    if complaint is None:
        assert fresh(findings, "problem") == fresh(findings, "warning") == {}
        assert fresh(findings, "ok")["https"] == "this machine accepts the certificate"
    else:
        assert complaint in fresh(findings, "problem")["https"]
