"""A server as a client sees it: the doctor sends the requests that a client sends before it signs in, and no others.

It registers and authorizes nothing, and contacts only the host of the URL, and claude.ai for Claude's metadata document
if the server accepts such documents and is not on loopback.
"""

import json
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastmcp.server.auth.redirect_validation import is_loopback_host

from oauth_store.doctor.documents import examine_documents
from oauth_store.doctor.finding import Finding, clock, examined, ok, problem, warning
from oauth_store.doctor.http import Answer, Asker, origin, parameter
from oauth_store.doctor.metadata import examine_metadata
from oauth_store.urls import same_resource

NO_TOKEN = "no-token-but-a-question-of-oauth-store-doctor"  # noqa: S105 (that is what it says)
_PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
_RESOURCE_PATH = "/.well-known/oauth-protected-resource"
_SERVER_PATH = "/.well-known/oauth-authorization-server"
_ORIGIN = "https://inspector.example"  # a page of another origin, as MCP Inspector is


def examine_url(url: str) -> Iterator[Finding]:
    """Check a server as a client sees it: `url` is the one that a user would enter in the client."""
    parsed = _parse(url)
    if isinstance(parsed, Finding):
        yield parsed
        return
    with Asker(url) as http:
        yield from examined("connection", Examination(http, url, parsed).findings)


def _parse(url: str) -> SplitResult | Finding:
    try:
        parsed = urlsplit(url)
        if parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0:
            if parsed.username is None and not parsed.fragment:
                return parsed
            return problem("url", "it has a user name or a fragment", "use the plain URL of the MCP endpoint")
    except ValueError:
        pass
    return problem("url", "this is not the URL of a server", "use one such as https://wiki.example.com/mcp")


Looked = tuple[dict[str, Any] | None, list[Finding]]
"""Some metadata, or None if there is none, and the findings about it."""


class Examination:
    """One examination of one server."""

    def __init__(self, http: Asker, url: str, parsed: SplitResult) -> None:
        self._http, self._url, self._parsed, self._origin = http, url, parsed, http.origin

    def findings(self) -> Iterator[Finding]:
        before = time.time()
        first = self._http.ask("POST", self._url, json=_PING)
        if isinstance(first, Finding):
            yield first
            return
        yield self._https()
        yield from self._date(first, before)
        challenge = self._challenge(first)
        yield challenge
        if challenge.level == "problem" and first.status != 401:
            return  # not an MCP endpoint that requires a token: further findings would mislead
        yield from self._authorization_header(first)
        resource, found = self._resource(parameter(first, "resource_metadata"))
        yield from found
        if resource is None:
            return
        issuer = self._issuer(resource)
        if isinstance(issuer, Finding):
            yield issuer
            return
        server, found = self._server(issuer)
        yield from found
        if server is None:
            return
        yield from examine_metadata(server)
        yield from self._endpoints(server)
        documents = server.get("client_id_metadata_document_supported") is True
        if documents and not is_loopback_host(self._parsed.hostname):  # Claude.ai cannot reach loopback
            yield examine_documents()

    def _metadata(self, check: str, url: str) -> Looked:
        """Return the metadata at a URL, and the findings about it."""
        answer = self._http.ask("GET", url, headers={"Origin": _ORIGIN})
        if isinstance(answer, Finding):
            return None, [answer]
        path = urlsplit(url).path
        try:
            metadata = json.loads(answer.body) if answer.status == 200 else None
        except (ValueError, RecursionError):
            metadata = None
        if isinstance(metadata, dict):
            return metadata, [] if "access-control-allow-origin" in answer.headers else [_cors(path)]
        if answer.status == 404:
            found, advice = (
                f"{path} is missing: {answer.what}",
                "forward this path to the server unchanged: a proxy that serves the server under a prefix has to "
                "forward /.well-known/ too",
            )
        elif 300 <= answer.status < 400:
            found, advice = f"{path} returns {answer.what}", "serve it at this URL; clients may not follow redirects"
        elif answer.status >= 500:
            found, advice = (
                f"{path} returns {answer.what}",
                "are the server and its database up? See the server's log for the cause",
            )
        else:
            found, advice = (
                f"{path} returns {answer.what}, not JSON",
                "something in front of the server responds in its place; forward the path to the server",
            )
        return None, [problem(check, found, advice)]

    # The MCP endpoint

    def _https(self) -> Finding:
        if self._parsed.scheme == "https":
            return ok("https", "this machine accepts the certificate")
        if is_loopback_host(self._parsed.hostname):
            return ok("https", "http, but only on loopback")
        return problem(
            "https",
            "http: tokens cross the network in plain text, and clients refuse it",
            "put a TLS proxy in front (Caddy gets certificates automatically), and set base_url to its https:// URL",
        )

    def _date(self, answer: Answer, before: float) -> Iterator[Finding]:
        try:
            date = parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        took = time.time() - before
        yield clock("server's clock", date - before - took / 2, took + 1)  # it has whole seconds

    def _challenge(self, answer: Answer) -> Finding:
        """A request without a token gets a 401 that names the resource metadata (RFC 9728, section 5.1)."""
        header = answer.headers.get("www-authenticate", "")
        if answer.status == 401 and header.lower().startswith("bearer"):
            if parameter(answer, "resource_metadata"):
                return ok("challenge", "401, with resource_metadata")
            return warning(
                "challenge",
                "401, but WWW-Authenticate names no resource_metadata, which some clients need to sign in",
                "is this the endpoint of a FastMCP server with auth=? A proxy must forward its header",
            )
        if answer.status == 401:
            return problem(
                "challenge",
                f"401 without WWW-Authenticate: Bearer{f', but {header.split()[0]}' if header else ''}",
                "a proxy removes the header, or asks for a password of its own: turn that off",
            )
        if 300 <= answer.status < 400:
            return problem("challenge", f"{answer.what}", f"give clients this URL: {answer.location}")
        if answer.status == 404:
            return problem(
                "challenge",
                f"no endpoint at this URL: {answer.what}",
                "the MCP endpoint of a FastMCP server is at /mcp unless you set its path; a proxy must not change it",
            )
        if answer.status in (502, 503, 504):
            return problem("challenge", answer.what, "start the server, or check its log: is its database down?")
        if answer.status == 429:
            return problem("challenge", f"{answer.what}: too many requests", "wait a minute, and run this again")
        if answer.status == 421:
            return problem("challenge", f"{answer.what}: the server does not know this host", "check its allowed hosts")
        if answer.is_html:
            return problem(
                "challenge",
                answer.what,
                "something in front of the server responds in its place: make it forward POST requests unchanged",
            )
        return problem(
            "challenge",
            f"{answer.what} for a request without a token; expected 401",
            "pass the provider to FastMCP(auth=...): this endpoint lets in everyone, or is not an MCP endpoint",
        )

    def _authorization_header(self, first: Answer) -> Iterator[Finding]:
        """A made-up token gets another response than no token (RFC 6750, section 3.1), if the header arrives."""
        if parameter(first, "error"):
            return  # a FastMCP that responds the same to both
        answer = self._http.ask("POST", self._url, json=_PING, headers={"Authorization": f"Bearer {NO_TOKEN}"})
        if isinstance(answer, Finding):
            yield answer
        elif answer.status == 401 and parameter(answer, "error"):
            yield ok("Authorization header", "it arrives")
        elif answer.status == 401 and "www-authenticate" in first.headers:
            yield problem(
                "Authorization header",
                "the server does not get it: a wrong token has the same response as no token",
                "a proxy removes the header; make it forward Authorization",
            )
        elif answer.status != 401:
            yield problem(
                "Authorization header",
                f"{answer.what} for a made-up token; expected 401",
                "something in front of the server uses the header; make it forward Authorization unchanged",
            )

    # The metadata

    def _resource(self, named: str | None) -> Looked:
        check = "resource metadata"
        expected = f"{self._origin}{_RESOURCE_PATH}{self._parsed.path.rstrip('/')}"
        elsewhere = []
        if named is not None and origin(named) != self._origin:
            elsewhere = [self._elsewhere(check, "WWW-Authenticate names", named)]
            named = None
        metadata, found = self._metadata(check, named or expected)
        if metadata is None:
            return None, [*elsewhere, *found]
        resource = metadata.get("resource")
        if resource == self._url:
            judged = ok(check, f"resource is {resource}, as entered")
        elif isinstance(resource, str) and same_resource(resource, self._url):
            shown = f"resource is {resource}, but you entered {self._url}"
            judged = warning(check, shown, f"give clients this URL: {resource}")
        else:
            judged = problem(
                check,
                f"resource is {resource}, but you entered {self._url}; clients refuse that, or get useless tokens",
                f"set base_url to {self._base_url()}, or give clients the URL in resource",
            )
        return metadata, [*elsewhere, *found, judged]

    def _issuer(self, resource: dict[str, Any]) -> str | Finding:
        """Return the authorization server that the resource metadata names, or the problem with it."""
        servers = resource.get("authorization_servers")
        if not isinstance(servers, list) or not servers or not isinstance(servers[0], str):
            return problem(
                "authorization server",
                "the resource metadata names none",
                "is this the endpoint of a FastMCP server with an OAuth provider?",
            )
        if origin(servers[0]) != self._origin:
            return self._elsewhere("authorization server", "the resource metadata names", servers[0])
        return servers[0]

    def _server(self, issuer: str) -> Looked:
        """The metadata of the issuer (RFC 8414, section 3.1), which must name itself (section 3.3)."""
        check = "authorization server"
        url = f"{self._origin}{_SERVER_PATH}{urlsplit(issuer).path.rstrip('/')}"
        metadata, found = self._metadata(check, url)
        if metadata is None:
            return None, found
        if metadata.get("issuer") == issuer:
            judged = ok(check, f"issuer is {issuer}, as expected")
        else:
            judged = problem(
                check,
                f"issuer is {metadata.get('issuer')}, but expected {issuer}; clients refuse that",
                "make sure that no proxy rewrites the metadata, and use one base_url on all replicas",
            )
        return metadata, [*found, judged]

    def _elsewhere(self, check: str, who: str, url: str) -> Finding:
        return problem(
            check,
            f"{who} {url}, on another host than {self._origin}; it was not contacted",
            f"set base_url to {self._base_url()}, unless that host really is the authorization server",
        )

    def _base_url(self) -> str:
        return self._origin + (self._parsed.path.rstrip("/").rpartition("/")[0])

    # The endpoints

    def _endpoints(self, server: dict[str, Any]) -> Iterator[Finding]:
        """Each exists, which a GET shows without using it: /token returns 405, /authorize without parameters 400."""
        good = []
        for name in ("authorization_endpoint", "token_endpoint", "registration_endpoint", "revocation_endpoint"):
            url = server.get(name)
            if url is None:
                continue
            if not isinstance(url, str) or origin(url) != self._origin:
                yield self._elsewhere(name.replace("_", " "), "the metadata names", str(url))
                continue
            answer = self._http.ask("GET", url)
            if isinstance(answer, Finding):
                yield answer
            elif answer.status in (200, 404) or answer.status >= 500 or answer.is_html or 300 <= answer.status < 400:
                yield problem(
                    name.replace("_", " "),
                    f"{urlsplit(url).path} returns {answer.what}",
                    "forward this path to the server unchanged"
                    if answer.status < 500
                    else "are the server and its database up? See the server's log for the cause",
                )
            else:
                good.append(urlsplit(url).path)
        if good:
            yield ok("endpoints", ", ".join(good))
        token = server.get("token_endpoint")
        if isinstance(token, str) and urlsplit(token).path in good:
            headers = {"Origin": _ORIGIN, "Access-Control-Request-Method": "POST"}
            answer = self._http.ask("OPTIONS", token, headers=headers)
            if isinstance(answer, Finding):
                yield answer
            elif answer.status >= 400 or "access-control-allow-origin" not in answer.headers:
                yield _cors(urlsplit(token).path)
            else:
                yield ok("CORS", "clients in a browser may request tokens")


def _cors(path: str) -> Finding:
    return warning(
        "CORS",
        f"{path} lacks Access-Control-Allow-Origin: clients in a browser, such as MCP Inspector, cannot read it",
        "a proxy removes the header, or responds to OPTIONS itself; make it forward both. Other clients do not need it",
    )
