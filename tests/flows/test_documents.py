"""Client ID metadata documents, as /authorize takes them."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
from fastmcp.server.auth import ssrf

from oauth_store import RateLimits
from oauth_store.doctor.documents import examine_documents
from oauth_store.flows import metadata_documents as documents
from tests.chaos import NO_LIMITS
from tests.clients.apps import ANSWER, KINDS, Outcome, make_app
from tests.clocks import turned
from tests.documents import HOSTNAME, REVALIDATE, Answer, DocumentHost
from tests.endpoints import Server, running
from tests.steps import REDIRECT_URI, authorization_request, query_of, registration_options

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

RESOLVE = ssrf.resolve_hostname


async def authorize(
    server: Server, client_id: str, redirect_uri: str = REDIRECT_URI, **headers: str
) -> httpx2.Response:
    """The answer to an authorization request."""
    request = authorization_request(client_id, redirect_uri=redirect_uri)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await server.http.get("/authorize", params=request, headers=named)


async def refresh(server: Server, client_id: str, tokens: dict[str, Any]) -> httpx2.Response:
    """The answer to a refresh."""
    form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": tokens["refresh_token"]}
    return await server.http.post("/token", data=form)


def is_code(answer: httpx2.Response) -> bool:
    """Tell whether a client was let in, or refused for good without a redirect."""
    if answer.status_code == 302:
        return "code" in query_of(answer.headers["location"])
    assert answer.status_code == 400, answer.text
    assert "location" not in answer.headers
    return False


def is_away(answer: httpx2.Response) -> bool:
    """Tell whether an answer asks to come back when the document can be had."""
    if answer.status_code != 503:
        return False
    assert 0 < int(answer.headers["retry-after"]) <= 60
    assert "location" not in answer.headers
    return True


class TestFlow:
    """A client whose client_id is the URL of its document."""

    async def test_first_use_stores_the_client(self, server: Server, host: DocumentHost) -> None:
        """One request to the host, and the client is a row like any other; its token works."""
        tokens = await server.tokens(host.client_id)
        assert [request.url.path for request in host.requests] == ["/client.json"]
        stored = await server.provider.get_client(host.client_id)
        assert stored is not None
        assert (stored.client_name, stored.client_secret) == ("Documented client", None)
        assert (await server.mcp(tokens["access_token"])).status_code not in (401, 403)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_real_clients_use_their_documents(
        self, server: Server, host: DocumentHost, kind: str, tmp_path: Path
    ) -> None:
        """A client with a document does not register, and it refreshes while the host is down."""
        host.describe(redirect_uris=["http://localhost/callback", "http://127.0.0.1/callback"])
        app = make_app(kind, str(server.http.base_url.join("/mcp")), "none", tmp_path, host.client_id)
        first = await app.call()
        assert (first.answer, first.authorizations) == (ANSWER, 1)
        assert not any("/register" in line for line in first.requests)
        assert (await app.client()).client_id == host.client_id
        await host.stop()
        await app.lose_access_token()
        refreshed = await app.call()
        assert (refreshed.answer, refreshed.authorizations) == (ANSWER, 0)
        assert await app.call() == Outcome(ANSWER, [], 0)

    @pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
    async def test_loopback_with_any_port(self, server: Server, host: DocumentHost, name: str) -> None:
        """A portless loopback redirect URI is good for the port that the client listens on, as Claude Code does."""
        host.describe(redirect_uris=["http://localhost/callback", "http://127.0.0.1/callback"])
        uri = f"http://{name}:54321/callback"
        answer = await authorize(server, host.client_id, uri)
        assert answer.headers["location"].startswith(f"{uri}?code=")
        assert not is_code(await authorize(server, host.client_id, f"http://{name}:54321/other"))

    @pytest.mark.parametrize(("scope", "granted"), [("read mail", "read"), ("mail", "read write")])
    async def test_scopes_of_other_servers_do_no_harm(self, host: DocumentHost, scope: str, granted: str) -> None:
        """A document is the same for every server: scopes that this one does not have are passed over."""
        host.describe(scope=scope)
        options = registration_options("read", "write")
        async with running(client_registration_options=options, required_scopes=["read"]) as server:
            tokens = await server.tokens(host.client_id)
            assert tokens["scope"] == granted
            assert (await server.mcp(tokens["access_token"])).status_code not in (401, 403)

    async def test_scopes_of_other_servers_do_no_harm_without_a_list_of_valid_ones(self, host: DocumentHost) -> None:
        """A server that names required scopes alone gives them to a client whose document does not."""
        host.describe(scope="mail")
        async with running(required_scopes=["read"]) as server:
            tokens = await server.tokens(host.client_id)
            assert (await server.mcp(tokens["access_token"])).status_code not in (401, 403)


class TestCache:
    """How long a document is kept (RFC 9111)."""

    async def test_a_fresh_document_is_not_fetched_again(self, server: Server, host: DocumentHost) -> None:
        """For max-age seconds nothing is asked; then the host is asked whether the document has changed."""
        host.describe(cache={"cache-control": "max-age=60", "etag": '"one"'})
        for _ in range(2):
            assert is_code(await authorize(server, host.client_id))
        assert len(host.requests) == 1
        with turned(61):
            for _ in range(2):
                assert is_code(await authorize(server, host.client_id))
        assert [request.headers.get("if-none-match") for request in host.requests] == [None, '"one"']

    async def test_a_changed_document_is_seen_when_the_old_one_is_stale(
        self, server: Server, host: DocumentHost
    ) -> None:
        """Until max-age is over the old redirect URIs count, after that the new ones."""
        host.describe(cache={"cache-control": "max-age=60", "etag": '"one"'})
        assert is_code(await authorize(server, host.client_id))
        moved = "http://127.0.0.1:9000/moved"
        host.describe(cache={"cache-control": "max-age=60", "etag": '"two"'}, redirect_uris=[moved])
        assert not is_code(await authorize(server, host.client_id, moved))
        with turned(61):
            assert is_code(await authorize(server, host.client_id, moved))
            assert not is_code(await authorize(server, host.client_id))

    async def test_a_validator_that_cannot_be_sent_is_none(self, server: Server, host: DocumentHost) -> None:
        """An ETag may have any byte (RFC 9110, section 8.8.3); a request that repeats it may not."""
        for header in ("etag", "last-modified"):
            host.describe(cache=REVALIDATE | {header: '"\xe9"'})
            for _ in range(3):
                assert is_code(await authorize(server, host.client_id))

    @pytest.mark.parametrize("directive", ["no-store", "no-cache", "max-age=0"])
    async def test_what_must_not_be_kept_is_fetched_each_time(
        self, server: Server, host: DocumentHost, directive: str
    ) -> None:
        """A document that is not to be kept is asked for at every authorization."""
        host.describe(cache={"cache-control": directive})
        for _ in range(3):
            assert is_code(await authorize(server, host.client_id))
        assert len(host.requests) == 3


class TestHostAway:
    """While the host of a document cannot be reached."""

    async def test_a_refresh_goes_on(self, server: Server, host: DocumentHost) -> None:
        """/token asks the database alone."""
        tokens = await server.tokens(host.client_id)
        await host.stop()
        answer = await refresh(server, host.client_id, tokens)
        assert answer.status_code == 200, answer.text

    async def test_an_authorization_goes_on_from_the_stored_row(self, host: DocumentHost, tmp_path: Path) -> None:
        """A client that was here before is let in, also after a restart, which empties the cache."""
        database = str(tmp_path / "oauth.db")
        async with running(database) as server:
            assert is_code(await authorize(server, host.client_id))
            await host.stop()
            assert is_code(await authorize(server, host.client_id))
        async with running(database) as server:
            assert is_code(await authorize(server, host.client_id))
        async with running(database) as server:
            await host.start()
            host.answer = Answer(b"", 503)
            assert is_code(await authorize(server, host.client_id))
        async with running(database) as server:
            host.addresses.clear()
            assert is_code(await authorize(server, host.client_id))
            assert len(host.requests) == 2

    async def test_an_outage_brings_nothing_back(self, server: Server, host: DocumentHost) -> None:
        """What an invalid document took away stays away while its host is down; the grant from before goes on."""
        tokens = await server.tokens(host.client_id)
        host.describe(redirect_uris=[])
        assert not is_code(await authorize(server, host.client_id))
        await host.stop()
        assert is_away(await authorize(server, host.client_id))
        assert (await refresh(server, host.client_id, tokens)).status_code == 200

    async def test_a_document_takes_away_only_its_own(self, server: Server, host: DocumentHost) -> None:
        """An invalid document leaves all other clients as they are."""
        client_id = (await server.register())["client_id"]
        await server.tokens(host.client_id)
        host.describe(redirect_uris=[])
        assert not is_code(await authorize(server, host.client_id))
        assert is_code(await authorize(server, client_id))

    async def test_a_client_that_was_never_here_comes_back_later(self, server: Server, host: DocumentHost) -> None:
        """Without a document and without a row there is nothing to go by; a minute later it works."""
        await host.stop()
        assert is_away(await authorize(server, host.client_id))
        await host.start()
        with turned(61):
            assert is_code(await authorize(server, host.client_id))

    @pytest.mark.parametrize("status", [301, 403, 429, 500, 503])
    async def test_an_answer_without_a_document(self, server: Server, host: DocumentHost, status: int) -> None:
        """A host that refuses, redirects or fails is asked once a minute, and the client is not called unknown."""
        host.answer = Answer(b"", status)
        for _ in range(3):
            answer = await authorize(server, host.client_id)
            assert is_away(answer)
            assert answer.json() == {
                "error": "temporarily_unavailable",
                "error_description": f"the client's metadata document could not be fetched from {host.name}",
            }
        assert len(host.requests) == 1

    async def test_people_are_told(self, server: Server, host: DocumentHost) -> None:
        """A browser gets a page that says what could not be read, and from where."""
        await host.stop()
        answer = await authorize(server, host.client_id, accept="text/html")
        assert is_away(answer)
        assert "description could not be fetched" in answer.text
        assert host.name in answer.text
        assert "not registered" not in answer.text

    async def test_another_document_of_the_host_is_asked_for(self, server: Server, host: DocumentHost) -> None:
        """One URL that answers nothing of use does not keep out the others of its host."""
        good = host.answer
        host.answer = Answer(b"", 403)
        assert is_away(await authorize(server, host.client_id.replace("client.json", "other.json")))
        host.answer = good
        assert is_code(await authorize(server, host.client_id))


def changed(**metadata: Any) -> Callable[[DocumentHost], None]:
    """Serve a document with these changes."""
    return lambda host: host.describe(**metadata)


def answered(body: bytes, status: int = 200) -> Callable[[DocumentHost], None]:
    """Serve this answer."""
    return lambda host: setattr(host, "answer", Answer(body, status, REVALIDATE))


class TestChanges:
    """A document that changed since the client was stored."""

    async def test_changed_redirect_uris_are_honoured(self, server: Server, host: DocumentHost) -> None:
        """A new redirect URI is good, and one that was taken out is not any more."""
        tokens = await server.tokens(host.client_id)
        host.describe(redirect_uris=["http://127.0.0.1:9000/moved"])
        assert not is_code(await authorize(server, host.client_id))
        assert is_code(await authorize(server, host.client_id, "http://127.0.0.1:9000/moved"))
        assert (await refresh(server, host.client_id, tokens)).status_code == 200

    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(answered(b"{"), id="not JSON"),
            pytest.param(answered(b"[]"), id="not an object"),
            pytest.param(answered(b"\xff\xfe"), id="not UTF-8"),
            pytest.param(answered(b"\x80"), id="no text"),
            pytest.param(answered(b"[" * 5000), id="deep"),
            pytest.param(answered(b"", 404), id="gone"),
            pytest.param(answered(b"", 410), id="gone for good"),
            pytest.param(changed(client_name="x" * 6000), id="too large"),
            pytest.param(changed(client_id="https://client.example/other.json"), id="of another client"),
            pytest.param(lambda host: host.describe(client_id=f"{host.client_id}/"), id="of a neighbour"),
            pytest.param(changed(token_endpoint_auth_method="client_secret_post"), id="shared secret"),
            pytest.param(changed(token_endpoint_auth_method="private_key_jwt"), id="private_key_jwt"),
            pytest.param(changed(redirect_uris=None), id="no redirect URIs"),
            pytest.param(changed(redirect_uris=[]), id="empty redirect URIs"),
            pytest.param(changed(redirect_uris=REDIRECT_URI), id="no list of redirect URIs"),
            pytest.param(changed(redirect_uris=[1, None, {}, "", "x", "http://["]), id="no URLs"),
            pytest.param(changed(redirect_uris=["javascript://x/%0aalert(1)"]), id="javascript"),
            pytest.param(changed(redirect_uris=["http://evil.example/callback"]), id="http to another machine"),
            pytest.param(
                changed(redirect_uris=["http://evil.example:*/callback"]), id="http to another machine, any port"
            ),
            pytest.param(changed(redirect_uris=["ftp://evil.example/callback"]), id="ftp"),
            pytest.param(changed(redirect_uris=[f"{REDIRECT_URI}#fragment"]), id="fragment"),
            pytest.param(changed(redirect_uris=[f"{REDIRECT_URI}/{i}" for i in range(51)]), id="many redirect URIs"),
            pytest.param(changed(client_uri="no URL"), id="no URL of the client"),
        ],
    )
    async def test_an_invalid_document_lets_nobody_in(
        self, server: Server, host: DocumentHost, spoil: Callable[[DocumentHost], None]
    ) -> None:
        """It is refused at /authorize, at first use and later; a grant from before goes on."""
        good = host.answer
        spoil(host)
        assert not is_code(await authorize(server, host.client_id))
        assert await server.provider.get_client(host.client_id) is None

        host.answer = good
        tokens = await server.tokens(host.client_id)
        spoil(host)
        assert not is_code(await authorize(server, host.client_id))
        assert (await refresh(server, host.client_id, tokens)).status_code == 200

        host.answer = good
        assert is_code(await authorize(server, host.client_id))

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (answered(b"{"), "it is not JSON"),
            (answered(b"[]"), "it is not a JSON object"),
            (changed(client_name="half a character: \ud800"), "it is not JSON"),
            (answered(b"", 404), "its host has no such document (HTTP 404)"),
            (changed(client_name="x" * 6000), "it is larger than 5120 bytes"),
            (changed(client_id="https://client.example/other.json"), "its client_id is not its own URL"),
            (
                changed(token_endpoint_auth_method="private_key_jwt"),
                "it has no public RSA or EC key for private_key_jwt, in jwks or at its jwks_uri",
            ),
            (
                changed(token_endpoint_auth_method="client_secret_jwt"),
                "it offers neither of the supported values of token_endpoint_auth_method: none and private_key_jwt",
            ),
            (
                changed(token_endpoint_auth_method="private_key_jwt", jwks_uri="http://client.example/keys.json"),
                "its jwks_uri is not an https URL with a path",
            ),
            (changed(redirect_uris=None), "it has no redirect_uris"),
            (
                changed(redirect_uris=["https://user@client.example/"]),
                "none of its redirect_uris can be used: a redirect URI has a user",
            ),
            (changed(client_uri="no URL"), "its client_uri is not valid"),
            (changed(grant_types=["client_credentials"]), "its grant_types lack authorization_code"),
        ],
    )
    async def test_what_is_wrong_is_said(
        self, server: Server, host: DocumentHost, spoil: Callable[[DocumentHost], None], reason: str
    ) -> None:
        """The answer names the document's mistake: to programs as an error, to people on a page."""
        spoil(host)
        answer = await authorize(server, host.client_id)
        assert answer.json() == {
            "error": "invalid_request",
            "error_description": f"the client's metadata document at {host.name} cannot be used: {reason}",
        }
        page = await authorize(server, host.client_id, accept="text/html")
        assert page.status_code == 400
        assert reason in page.text
        assert "not registered" not in page.text


class TestLeniency:
    """What a document may have that this server does not need."""

    async def test_chatgpt_comes_in_without_its_key(self, server: Server, host: DocumentHost) -> None:
        """A preference for private_key_jwt is none where `none` is listed: the client is a public one."""
        host.describe(
            client_name="ChatGPT",
            client_uri="https://chatgpt.com/",
            token_endpoint_auth_method="private_key_jwt",
            token_endpoint_auth_methods_supported=["none", "private_key_jwt"],
            token_endpoint_auth_signing_alg="RS256",
            jwks_uri="https://chatgpt.com/oauth/jwks.json",
            response_types=["code"],
        )
        tokens = await server.tokens(host.client_id)
        stored = await server.provider.get_client(host.client_id)
        assert stored is not None
        assert (stored.client_name, stored.token_endpoint_auth_method) == ("ChatGPT", "none")
        assert (await refresh(server, host.client_id, tokens)).status_code == 200

    @pytest.mark.parametrize(
        ("method", "methods"),
        [(None, ["private_key_jwt"]), ("private_key_jwt", ["private_key_jwt"]), ("private_key_jwt", "none")],
    )
    async def test_a_client_that_wants_its_key(
        self, server: Server, host: DocumentHost, method: str | None, methods: Any
    ) -> None:
        """Without `none`, in a list, nobody comes in."""
        host.describe(token_endpoint_auth_method=method, token_endpoint_auth_methods_supported=methods)
        assert not is_code(await authorize(server, host.client_id))

    async def test_bad_redirect_uris_are_left_out(self, server: Server, host: DocumentHost) -> None:
        """The good ones beside them count, and the bad ones are not stored."""
        bad = ["javascript://x/%0aalert(1)", "http://evil.example/callback", "https://[", f"{REDIRECT_URI}#x", 1]
        host.describe(redirect_uris=[*bad, REDIRECT_URI, REDIRECT_URI])
        assert is_code(await authorize(server, host.client_id))
        assert not is_code(await authorize(server, host.client_id, "http://evil.example/callback"))
        stored = await server.provider.get_client(host.client_id)
        assert stored is not None
        assert [str(uri) for uri in stored.redirect_uris or []] == [REDIRECT_URI]

    @pytest.mark.parametrize("loopback", ["localhost", "127.0.0.1", "[::1]"])
    async def test_any_port_by_a_star(self, server: Server, host: DocumentHost, loopback: str) -> None:
        """`http://localhost:*/callback`, as FastMCP's own tool writes it, is good for any port, and no other host."""
        host.describe(redirect_uris=[f"http://{loopback}:*/callback"])
        assert is_code(await authorize(server, host.client_id, f"http://{loopback}:54321/callback"))
        assert not is_code(await authorize(server, host.client_id, f"http://{loopback}:54321/other"))
        assert not is_code(await authorize(server, host.client_id, "http://evil.example:54321/callback"))

    async def test_empty_fields_are_absent(self, server: Server, host: DocumentHost) -> None:
        """An empty text, list or object says nothing."""
        empty: dict[str, Any] = dict.fromkeys(["client_uri", "logo_uri", "tos_uri", "scope", "client_name"], "")
        host.describe(**empty, policy_uri={}, contacts=[], response_types=[], token_endpoint_auth_methods_supported=[])
        assert (await server.tokens(host.client_id))["access_token"]

    async def test_a_secret_in_a_document_is_none(self, server: Server, host: DocumentHost) -> None:
        """What anyone can read proves nothing: the client stays a public one."""
        host.describe(client_secret="not-a-secret", client_secret_expires_at=0)
        assert (await server.tokens(host.client_id))["access_token"]


class Names:
    """A name server of the tests: it does not answer for hosts in `.hang` until it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answering = threading.Event()
        self._getaddrinfo = socket.getaddrinfo

    def getaddrinfo(self, host: Any, *rest: Any, **more: Any) -> Any:
        """What `socket.getaddrinfo` does."""
        if not str(host).endswith(".hang"):
            return self._getaddrinfo(host, *rest, **more)
        self.asked.append(host)
        self.answering.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async def asked_for(self, count: int) -> None:
        """Wait until so many names are being looked up."""
        while len(self.asked) < count:  # noqa: ASYNC110 (they are looked up in threads)
            await asyncio.sleep(0.001)


@pytest.fixture
def names(host: DocumentHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """Names that are looked up as FastMCP looks them up, but for the host's."""
    names = Names()
    of_the_host = ssrf.resolve_hostname

    async def resolve_hostname(hostname: str, port: int = 443) -> list[str]:
        return await (RESOLVE if hostname.endswith(".hang") else of_the_host)(hostname, port)

    monkeypatch.setattr(ssrf, "resolve_hostname", resolve_hostname)
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.answering.set()


class TestBounds:
    """What documents cost a server at most."""

    async def test_hosts_that_hang_hold_up_nobody(
        self, host: DocumentHost, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of 40 requests for hosts whose name server is silent four wait; the loop's executor is free for others."""
        monkeypatch.setattr(documents, "FETCH_SECONDS", 60)
        monkeypatch.setattr(documents, "TURN_SECONDS", 0.5)
        async with running(trusted_proxies=["127.0.0.1"]) as server:
            assert is_code(await authorize(server, host.client_id))
            hung = [
                asyncio.create_task(authorize(server, f"https://{i}.hang/client.json", x_forwarded_for=f"192.0.2.{i}"))
                for i in range(40)
            ]
            await names.asked_for(4)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
            for answer in islice(asyncio.as_completed(hung), 36):
                assert is_away(await answer)
            waiting = [task for task in hung if not task.done()]
            assert len(waiting) == 4
            assert is_code(await authorize(server, host.client_id, x_forwarded_for="198.51.100.1"))
            names.answering.set()
            assert all(is_away(answer) for answer in await asyncio.gather(*waiting))
            assert is_away(await authorize(server, "https://0.hang/other.json"))
            other = host.client_id.replace("client.json", "other.json")
            host.describe(client_id=other)
            assert is_code(await authorize(server, other, x_forwarded_for="198.51.100.1"))

    async def test_one_address_fetches_one_document_at_a_time(
        self, host: DocumentHost, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A second one for the same address waits, and is put off in the end; for another address it is fetched."""
        monkeypatch.setattr(documents, "TURN_SECONDS", 0.2)
        async with running(trusted_proxies=["127.0.0.1"]) as server:
            hung = asyncio.create_task(authorize(server, "https://a.hang/client.json", x_forwarded_for="192.0.2.1"))
            await names.asked_for(1)
            assert is_away(await authorize(server, host.client_id, x_forwarded_for="192.0.2.1"))
            assert host.requests == []
            assert is_code(await authorize(server, host.client_id, x_forwarded_for="192.0.2.2"))
            names.answering.set()
            assert is_away(await hung)

    async def test_what_became_known_meanwhile_is_not_asked_for(
        self, server: Server, host: DocumentHost, names: Names
    ) -> None:
        """Twelve documents of one name that has no address are one question to the name server."""
        ids = [f"https://a.hang/{number}.json" for number in range(12)]
        asking = [asyncio.create_task(authorize(server, client_id)) for client_id in ids]
        await names.asked_for(1)
        names.answering.set()
        assert all(is_away(answer) for answer in await asyncio.gather(*asking))
        assert names.asked == ["a.hang"]

    async def test_not_everybody_may_wait(
        self, host: DocumentHost, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fifty requests, here five, wait for their turn; the others are put off at once."""
        monkeypatch.setattr(documents, "WAITING", 5)
        async with running(rate_limits=NO_LIMITS) as server:
            ids = [f"https://a.hang/{number}.json" for number in range(30)]
            asking = [asyncio.create_task(authorize(server, client_id)) for client_id in ids]
            for answer in islice(asyncio.as_completed(asking), 24):
                assert is_away(await answer)
            assert sum(task.done() for task in asking) == 24  # one is fetched
            await names.asked_for(1)  # by a thread, which may have only just started
            assert len(names.asked) == 1
            names.answering.set()
            await asyncio.gather(*asking)

    async def test_a_fetch_without_a_file_descriptor(
        self, server: Server, host: DocumentHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the system refuses for want of descriptors or threads is a 503, as what the network refuses."""

        def runner() -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "Runner", runner)
            assert is_away(await authorize(server, host.client_id))
        with turned(61):
            assert is_code(await authorize(server, host.client_id))

    async def test_the_second_one_of_an_address_gets_its_turn(
        self, server: Server, host: DocumentHost, names: Names
    ) -> None:
        """Behind a proxy that is not declared all users have one address: they wait for each other, a while."""
        slow = asyncio.create_task(authorize(server, "https://a.hang/client.json"))
        await names.asked_for(1)
        next_one = asyncio.create_task(authorize(server, host.client_id))
        await asyncio.sleep(0.2)
        assert not next_one.done()
        names.answering.set()
        assert is_away(await slow)
        assert is_code(await next_one)

    async def test_requests_for_one_document_share_its_fetch(self, server: Server, host: DocumentHost) -> None:
        """Many users of one client at the same moment are one request to its host."""
        host.describe(cache={"cache-control": "max-age=60"})
        answers = await asyncio.gather(*(authorize(server, host.client_id) for _ in range(8)))
        assert all(is_code(answer) for answer in answers)
        assert len(host.requests) == 1

    async def test_a_fetch_is_given_up_and_remembered(
        self, server: Server, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After ten seconds, here a tenth of one, a request is answered; the next one at once, for a minute."""
        monkeypatch.setattr(documents, "FETCH_SECONDS", 0.1)
        assert is_away(await authorize(server, "https://a.hang/client.json"))
        monkeypatch.setattr(documents, "FETCH_SECONDS", 60)
        assert is_away(await asyncio.wait_for(authorize(server, "https://a.hang/client.json"), 5))
        assert names.asked == ["a.hang"]

    async def test_a_name_without_an_address_is_remembered(
        self, server: Server, host: DocumentHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For all documents of its host, and for a minute."""
        host.addresses.clear()
        assert is_away(await authorize(server, host.client_id))
        host.addresses[HOSTNAME] = ["127.0.0.1"]
        assert is_away(await authorize(server, host.client_id.replace("client.json", "other.json")))
        assert host.requests == []
        with turned(61):
            assert is_code(await authorize(server, host.client_id))

    async def test_certificates_are_not_read_on_the_servers_loop(
        self, server: Server, host: DocumentHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An HTTP client reads the system's certificates, for 30 ms: never in the thread that serves."""
        threads = []
        make = httpcore2.default_ssl_context

        def default_ssl_context(*settings: Any, **more: Any) -> Any:
            threads.append(threading.current_thread())
            return make(*settings, **more)

        monkeypatch.setattr(httpcore2, "default_ssl_context", default_ssl_context)
        assert is_code(await authorize(server, host.client_id))
        assert threads
        assert threading.current_thread() not in threads

    async def test_new_documents_count_as_registrations(self, host: DocumentHost) -> None:
        """Whoever serves many documents leaves as many rows as whoever registers; clients that are known come in."""
        urls = [host.client_id.replace("client.json", f"{i}.json") for i in range(3)]
        limits = RateLimits(registrations_per_address="3/hour")
        async with running(rate_limits=limits, trusted_proxies=["127.0.0.1"]) as server:
            await server.register()
            for url in urls[:2]:
                host.describe(client_id=url)
                assert is_code(await authorize(server, url))
            host.describe(client_id=urls[2])
            answer = await authorize(server, urls[2])
            assert answer.status_code == 429
            assert 0 < int(answer.headers["retry-after"]) <= 3600
            assert await server.provider.get_client(urls[2]) is None
            assert "Too many requests" in (await authorize(server, urls[2], accept="text/html")).text
            assert is_code(await authorize(server, urls[2], x_forwarded_for="192.0.2.1"))
            host.describe(client_id=urls[0], client_name="Changed")
            assert is_code(await authorize(server, urls[0]))


class TestDoctor:
    """`oauth-store doctor`, which fetches a document as the server does."""

    async def test_a_document_that_can_be_had(self, host: DocumentHost) -> None:
        """Says so."""
        finding = await asyncio.to_thread(examine_documents, host.client_id)
        assert (finding.level, finding.advice) == ("ok", None)
        assert len(host.requests) == 1

    async def test_a_document_that_cannot(self, host: DocumentHost) -> None:
        """Says what happened, and what to do: here a host that wants no programs."""
        host.answer = Answer(b"", 403)
        finding = await asyncio.to_thread(examine_documents, host.client_id)
        assert finding.level == "warning"
        assert ": HTTP 403 fetching" in finding.found
        assert "metadata_documents=False" in str(finding.advice)


class TestWithoutDocuments:
    """`metadata_documents=False`, for a server that cannot reach the hosts of documents."""

    async def test_they_are_neither_offered_nor_fetched(self, host: DocumentHost) -> None:
        """The metadata name no documents, and the URL of one is an unknown client."""
        async with running(metadata_documents=False) as server:
            metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
            assert "client_id_metadata_document_supported" not in metadata
            assert "registration_endpoint" in metadata
            assert not is_code(await authorize(server, host.client_id))
            assert "not registered" in (await authorize(server, host.client_id, accept="text/html")).text
            assert host.requests == []

    @pytest.mark.parametrize("kind", KINDS)
    async def test_real_clients_register(self, host: DocumentHost, kind: str, tmp_path: Path) -> None:
        """A client that has a document registers where documents are not offered."""
        async with running(metadata_documents=False) as server:
            app = make_app(kind, str(server.http.base_url.join("/mcp")), "none", tmp_path, host.client_id)
            called = await app.call()
            assert (called.answer, called.authorizations) == (ANSWER, 1)
            assert any("/register" in line for line in called.requests)
            assert host.requests == []

    async def test_clients_that_are_stored_go_on(self, host: DocumentHost, tmp_path: Path) -> None:
        """A client that came with a document before is let in as it is stored, and refreshes."""
        database = str(tmp_path / "oauth.db")
        async with running(database) as server:
            tokens = await server.tokens(host.client_id)
            resource = str(server.http.base_url)
        async with running(database, metadata_documents=False, base_url=resource) as server:
            assert is_code(await authorize(server, host.client_id))
            assert (await refresh(server, host.client_id, tokens)).status_code == 200
            assert len(host.requests) == 1


def only_checks_names(host: str, *_: Any) -> list[Any]:
    """Refuse what `socket.getaddrinfo` refuses, and find nothing."""
    host.encode("idna")
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class TestSSRF:
    """What nobody can make this server fetch."""

    async def test_only_authorize_ever_fetches(self, server: Server, host: DocumentHost) -> None:
        """/token, /revoke and the MCP endpoint ask the host nothing, for a client that is known or not."""
        tokens = await server.tokens(host.client_id)
        fetched = len(host.requests)
        unknown = host.client_id.replace("client.json", "unknown.json")
        for client_id in (host.client_id, unknown):
            for form in (
                {"grant_type": "authorization_code", "code": "code_x", "code_verifier": "x"},
                {"grant_type": "refresh_token", "refresh_token": "refresh_x"},
            ):
                answer = await server.http.post("/token", data=form | {"client_id": client_id})
                assert answer.json()["error"] == ("invalid_client" if client_id == unknown else "invalid_grant")
            answer = await server.http.post("/revoke", data={"token": "access_x", "client_id": client_id})
            assert answer.status_code == (401 if client_id == unknown else 200)
        assert (await refresh(server, host.client_id, tokens)).status_code == 200
        await server.mcp(tokens["access_token"])
        assert len(host.requests) == fetched

    @pytest.mark.parametrize(
        "addresses",
        [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["8.8.8.8", "127.0.0.1"]],
        ids=",".join,
    )
    async def test_a_private_address_is_never_asked(
        self, server: Server, host: DocumentHost, addresses: list[str]
    ) -> None:
        """A name that leads to an address which is not public is refused, and nothing is sent there."""
        host.addresses[HOSTNAME], good = addresses, host.addresses[HOSTNAME]
        host.public.clear()
        assert is_away(await authorize(server, host.client_id))
        assert host.requests == []
        host.addresses[HOSTNAME] = good
        host.public.update(good)
        other = host.client_id.replace("client.json", "other.json")
        host.describe(client_id=other)
        assert is_code(await authorize(server, other)), "one document's trouble is not that of all"

    async def test_a_redirect_is_not_followed(self, server: Server, host: DocumentHost) -> None:
        """A host cannot send this server elsewhere."""
        elsewhere = host.client_id.replace("client.json", "elsewhere.json")
        host.answer = Answer(b"", 302, {"location": elsewhere})
        assert is_away(await authorize(server, host.client_id))
        assert len(host.requests) == 1

    @pytest.mark.parametrize(
        "url",
        [
            "http://{}/client.json",
            "https://{}",
            "https://{}/",
            "https://{}/client.json#",
            "https://{}/client.json#fragment",
            "https://user@{}/client.json",
            "https://{}/a/../client.json",
            "https://{}/./client.json",
            "ftp://{}/client.json",
            "https://{}/cli\u0435nt.json",
            "https://{}/client.json ",
            "https://{}/\tclient.json",
        ],
    )
    async def test_only_https_urls_with_a_path_are_documents(
        self, server: Server, host: DocumentHost, url: str
    ) -> None:
        """Any other client_id is looked up in the database alone."""
        client_id = url.format(f"{HOSTNAME}:{host.port}")
        host.describe(client_id=client_id)
        assert not is_code(await authorize(server, client_id))
        assert host.requests == []

    async def test_a_url_that_is_none_says_nothing_of_its_host(self, server: Server, host: DocumentHost) -> None:
        """FastMCP takes what follows a semicolon for no path: that is asked of nobody, and no failure of the host."""
        assert not is_code(await authorize(server, f"https://{host.name}/;client.json"))
        assert host.requests == []
        assert is_code(await authorize(server, host.client_id))

    @pytest.mark.parametrize(
        "url",
        [
            "https://client.example:99999/client.json",
            "https://client.example:port/client.json",
            "https://[::1/client.json",
            "https://[client]/client.json",
            f"https://{'x' * 64}.example/client.json",
            "https://client..example/client.json",
            "https://client.example\\@evil.example/client.json",
            "https://\u2100.example/client.json",
            "https://client.example/\x00",
            "https://client.example/\ud800".encode("utf-8", "replace").decode(),
            "https:///client.json",
            "https://\u0441lient.example/client.json",  # a Cyrillic letter
            "https://client\u3002example/client.json",
        ],
    )
    async def test_urls_that_are_none(
        self, server: Server, host: DocumentHost, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        """A client_id that only looks like a URL is an unknown client, whatever is wrong with it."""
        monkeypatch.undo()  # with the real name resolution: none of these gets as far as a name server
        monkeypatch.setattr(socket, "getaddrinfo", only_checks_names)
        assert not is_code(await authorize(server, url))
        assert host.requests == []
