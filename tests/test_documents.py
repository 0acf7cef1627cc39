"""Client ID metadata documents, as /authorize takes them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.clients.apps import ANSWER, KINDS, Outcome, make_app
from tests.clocks import turned
from tests.documents import HOSTNAME, REVALIDATE, Answer, DocumentHost
from tests.endpoints import Server, running
from tests.flows import REDIRECT_URI, authorization_request, query_of, registration_options

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


async def authorize(server: Server, client_id: str, redirect_uri: str = REDIRECT_URI) -> httpx2.Response:
    """The answer to an authorization request."""
    return await server.http.get("/authorize", params=authorization_request(client_id, redirect_uri=redirect_uri))


async def refresh(server: Server, client_id: str, tokens: dict[str, Any]) -> httpx2.Response:
    """The answer to a refresh."""
    form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": tokens["refresh_token"]}
    return await server.http.post("/token", data=form)


def is_code(answer: httpx2.Response) -> bool:
    """Tell whether a client was let in, or refused without a redirect."""
    if answer.status_code == 302:
        return "code" in query_of(answer.headers["location"])
    assert answer.status_code == 400, answer.text
    assert "location" not in answer.headers
    return False


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
            await host.start()
            host.answer = Answer(b"", 503)
            assert is_code(await authorize(server, host.client_id))
            host.addresses.clear()
            assert is_code(await authorize(server, host.client_id))
            assert len(host.requests) == 2

    async def test_an_outage_brings_nothing_back(self, server: Server, host: DocumentHost) -> None:
        """What an invalid document took away stays away while its host is down; the grant from before goes on."""
        tokens = await server.tokens(host.client_id)
        host.describe(redirect_uris=[])
        assert not is_code(await authorize(server, host.client_id))
        await host.stop()
        assert not is_code(await authorize(server, host.client_id))
        assert (await refresh(server, host.client_id, tokens)).status_code == 200

    async def test_a_document_takes_away_only_its_own(self, server: Server, host: DocumentHost) -> None:
        """An invalid document leaves all other clients as they are."""
        client_id = (await server.register())["client_id"]
        await server.tokens(host.client_id)
        host.describe(redirect_uris=[])
        assert not is_code(await authorize(server, host.client_id))
        assert is_code(await authorize(server, client_id))

    async def test_a_client_that_was_never_here_is_refused(self, server: Server, host: DocumentHost) -> None:
        """Without a document and without a row there is nothing to go by; later it works."""
        await host.stop()
        assert not is_code(await authorize(server, host.client_id))
        await host.start()
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
            pytest.param(changed(redirect_uris=[REDIRECT_URI, "javascript://x/%0aalert(1)"]), id="javascript"),
            pytest.param(changed(redirect_uris=[REDIRECT_URI, "http://evil.example/callback"]), id="plain http"),
            pytest.param(changed(redirect_uris=[REDIRECT_URI, "ftp://evil.example/callback"]), id="ftp"),
            pytest.param(changed(redirect_uris=[f"{REDIRECT_URI}#fragment"]), id="fragment"),
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
        host.public.clear()
        host.addresses[HOSTNAME] = addresses
        assert not is_code(await authorize(server, host.client_id))
        assert host.requests == []

    async def test_a_redirect_is_not_followed(self, server: Server, host: DocumentHost) -> None:
        """A host cannot send this server elsewhere."""
        elsewhere = host.client_id.replace("client.json", "elsewhere.json")
        host.answer = Answer(b"", 302, {"location": elsewhere})
        assert not is_code(await authorize(server, host.client_id))
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
