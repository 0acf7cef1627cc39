"""What a client sees of a server: the doctor asks what a client would ask before it signs in, and nothing after.

It registers nothing, authorizes nothing, and asks no other host than the one of the URL; but claude.ai for Claude's own
description, where the server is to take that and is not on loopback.
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
_ORIGIN = "https://inspector.example"  # a page elsewhere, as MCP Inspector is


def examine_url(url: str) -> Iterator[Finding]:
    """Look at a server from where a client stands: `url` is what its user would type into the client."""
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
            return problem("url", "it has a user or a fragment", "give the plain URL of the MCP endpoint")
    except ValueError:
        pass
    return problem("url", "this is no URL of a server", "give one such as https://wiki.example.com/mcp")


Looked = tuple[dict[str, Any] | None, list[Finding]]
"""Some metadata, or None if there is none, and what was found of it."""


class Examination:
    """One look at one server."""

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
            return  # it is no MCP endpoint that wants a token: whatever else could be said would mislead
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
        if documents and not is_loopback_host(self._parsed.hostname):  # Claude.ai does not come to loopback
            yield examine_documents()

    def _metadata(self, check: str, url: str) -> Looked:
        """Return the metadata at a URL, and what is to be said of it."""
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
                f"{path} is not there: {answer.what}",
                "hand this path on to the server, as it is: a proxy that serves the server under a prefix has to hand "
                "on /.well-known/ too",
            )
        elif 300 <= answer.status < 400:
            found, advice = f"{path} answers {answer.what}", "serve it under this URL; clients may not follow"
        elif answer.status >= 500:
            found, advice = (
                f"{path} answers {answer.what}",
                "is the server up, and its database? Its log says what is wrong",
            )
        else:
            found, advice = (
                f"{path} answers {answer.what}, not JSON",
                "something in front of the server answers in its place; hand the path on to the server",
            )
        return None, [problem(check, found, advice)]

    # The MCP endpoint

    def _https(self) -> Finding:
        if self._parsed.scheme == "https":
            return ok("https", "the certificate is accepted here")
        if is_loopback_host(self._parsed.hostname):
            return ok("https", "http, on loopback alone")
        return problem(
            "https",
            "http: tokens go over the network in clear, and clients refuse it",
            "put a proxy with TLS in front (Caddy does it by itself), and use its https:// URL as base_url",
        )

    def _date(self, answer: Answer, before: float) -> Iterator[Finding]:
        try:
            date = parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        took = time.time() - before
        yield clock("server's clock", date - before - took / 2, took + 1)  # it has whole seconds

    def _challenge(self, answer: Answer) -> Finding:
        """A request without a token is a 401 that says where to get one (RFC 9728, section 5.1)."""
        header = answer.headers.get("www-authenticate", "")
        if answer.status == 401 and header.lower().startswith("bearer"):
            if parameter(answer, "resource_metadata"):
                return ok("challenge", "401, with resource_metadata")
            return warning(
                "challenge",
                "401, but WWW-Authenticate names no resource_metadata; some clients then do not find the way",
                "is this the endpoint of a FastMCP server with auth=? A proxy must hand its header on",
            )
        if answer.status == 401:
            return problem(
                "challenge",
                f"401, but no WWW-Authenticate: Bearer{f', rather {header.split()[0]}' if header else ''}",
                "a proxy takes the header away, or asks for a password of its own: let it do neither",
            )
        if 300 <= answer.status < 400:
            return problem("challenge", f"{answer.what}", f"give clients this URL: {answer.location}")
        if answer.status == 404:
            return problem(
                "challenge",
                f"nothing is at this URL: {answer.what}",
                "the MCP endpoint of a FastMCP server is at /mcp unless you set its path; a proxy must not change it",
            )
        if answer.status in (502, 503, 504):
            return problem("challenge", answer.what, "start the server, or look in its log: is its database away?")
        if answer.status == 429:
            return problem("challenge", f"{answer.what}: too many requests", "wait a minute, and ask again")
        if answer.status == 421:
            return problem("challenge", f"{answer.what}: the server does not know this host", "see its allowed hosts")
        if answer.is_html:
            return problem(
                "challenge",
                answer.what,
                "something in front of the server answers in its place: let it hand on POST requests as they are",
            )
        return problem(
            "challenge",
            f"{answer.what} to a request without a token, where a 401 is due",
            "give FastMCP(auth=...) the provider: this endpoint lets in everyone, or is none",
        )

    def _authorization_header(self, first: Answer) -> Iterator[Finding]:
        """A token that is no token is told from none (RFC 6750, section 3.1), if it arrives."""
        if parameter(first, "error"):
            return  # of a FastMCP that says the same of both
        answer = self._http.ask("POST", self._url, json=_PING, headers={"Authorization": f"Bearer {NO_TOKEN}"})
        if isinstance(answer, Finding):
            yield answer
        elif answer.status == 401 and parameter(answer, "error"):
            yield ok("Authorization header", "it arrives")
        elif answer.status == 401 and "www-authenticate" in first.headers:
            yield problem(
                "Authorization header",
                "the server does not see it: it answers a wrong token as it answers none",
                "a proxy takes the header away; let it hand Authorization on",
            )
        elif answer.status != 401:
            yield problem(
                "Authorization header",
                f"{answer.what} to a made-up token, where a 401 is due",
                "something in front of the server looks at the header; let it hand Authorization on as it is",
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
            judged = ok(check, f"resource is {resource}, as typed")
        elif isinstance(resource, str) and same_resource(resource, self._url):
            shown = f"resource is {resource}, typed was {self._url}"
            judged = warning(check, shown, f"give clients this URL: {resource}")
        else:
            judged = problem(
                check,
                f"resource is {resource}, typed was {self._url}; clients refuse that, or get tokens of no use",
                f"set base_url to {self._base_url()}, or give clients the URL that resource names",
            )
        return metadata, [*elsewhere, *found, judged]

    def _issuer(self, resource: dict[str, Any]) -> str | Finding:
        """Return the authorization server that the resource metadata names, or what is wrong with it."""
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
            judged = ok(check, f"{issuer} names itself, letter by letter")
        else:
            judged = problem(
                check,
                f"issuer is {metadata.get('issuer')}, asked was {issuer}; clients refuse that",
                "let no proxy rewrite the metadata, and use one base_url on all replicas",
            )
        return metadata, [*found, judged]

    def _elsewhere(self, check: str, who: str, url: str) -> Finding:
        return problem(
            check,
            f"{who} {url}, on another host than {self._origin}; it was not asked",
            f"set base_url to {self._base_url()}. Only if that host really is the authorization server, all is well",
        )

    def _base_url(self) -> str:
        return self._origin + (self._parsed.path.rstrip("/").rpartition("/")[0])

    # The endpoints

    def _endpoints(self, server: dict[str, Any]) -> Iterator[Finding]:
        """Each is there, and says so without being used: a GET of /token is a 405, of /authorize without all a 400."""
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
                    f"{urlsplit(url).path} answers {answer.what}",
                    "hand this path on to the server, as it is"
                    if answer.status < 500
                    else "is the server up, and its database? Its log says what is wrong",
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
                yield ok("CORS", "clients in a browser may ask for tokens")


def _cors(path: str) -> Finding:
    return warning(
        "CORS",
        f"{path} lacks Access-Control-Allow-Origin: clients in a browser, such as MCP Inspector, cannot read it",
        "a proxy takes the header away, or answers OPTIONS itself; hand both on. Other clients do not need it",
    )
