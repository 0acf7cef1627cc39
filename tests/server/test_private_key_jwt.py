"""Clients with a metadata document that authenticate by an assertion signed with their own key (RFC 7523)."""

import asyncio
import base64
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from joserfc import jwk, jwt
from mcp.shared.auth import OAuthClientInformationFull

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.models import ASSERTION
from oauth_store.database.status import take_inventory
from oauth_store.flows.assertions import ASSERTION_BYTES
from oauth_store.flows.client_keys import check_keys_url, key_sets, read_keys
from oauth_store.flows.connected import live_grants
from oauth_store.flows.explain import explain
from oauth_store.flows.metadata_documents import InvalidDocumentError
from oauth_store.flows.registered import remove_client
from tests.assertions import TAKEN, Algorithm, Signer, asserting, claims_of, unsigned
from tests.clocks import away, turned
from tests.databases import tokens_of
from tests.documents import Answer, DocumentHost
from tests.endpoints import Server, running
from tests.identities import Company, assistant
from tests.steps import BASE_URL, new_client, provider_on, sign_in, token_request
from tests.workers import Processes, send_forms

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")

DAY = 24 * 3600


@dataclass
class App:
    """A client with a document, whose keys are in it or next to it."""

    server: Server
    host: DocumentHost
    inline: bool
    signer: Signer = field(default_factory=Signer)

    def describe(self, *signers: Signer, cache: dict[str, str] | None = None, **metadata: Any) -> None:
        """Serve the document with the public keys of these signers, or of the app's own."""
        keys = [signer.public for signer in signers or (self.signer,)]
        where: dict[str, Any] = {"jwks": {"keys": keys}} if self.inline else {"jwks_uri": self.host.keys_url}
        self.host.describe(**{"token_endpoint_auth_method": "private_key_jwt", **where, **metadata})
        self.host.publish(*keys, cache=cache)

    @property
    def client_id(self) -> str:
        return self.host.client_id

    @property
    def token_url(self) -> str:
        return str(self.server.http.base_url.join("/token"))

    def assertion(self, signer: Signer | None = None, **claims: Any) -> dict[str, str]:
        """The parameters of a good assertion, with these changes to its claims."""
        audience = claims.pop("aud", self.token_url)
        return asserting((signer or self.signer).sign(claims_of(self.client_id, audience, **claims)))

    async def tokens(self) -> dict[str, Any]:
        """The tokens of a new grant."""
        answer = await self.server.exchange(self.client_id, {"client_id": self.client_id, **self.assertion()})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def refresh(self, tokens: dict[str, Any], form: dict[str, str]) -> httpx2.Response:
        """The answer to a refresh that is authenticated by this form."""
        named = {"client_id": self.client_id, "grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
        return await self.server.http.post("/token", data=named | form)

    async def used(self) -> int:
        """How many assertions are stored."""
        return sum(row.kind == ASSERTION for row in await tokens_of(self.server.provider))


@pytest.fixture(params=[True, False], ids=["inline", "jwks_uri"])
async def app(request: pytest.FixtureRequest, server: Server, host: DocumentHost) -> App:
    """An app whose keys are in its document, and one whose keys are at its jwks_uri."""
    app = App(server, host, request.param)
    app.describe()
    return app


def is_refused(answer: httpx2.Response) -> bool:
    """Tell whether a client failed to authenticate, or got its tokens."""
    if answer.status_code == 200:
        return False
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), answer.text
    return True


class TestFlow:
    """A client that signs."""

    @pytest.mark.parametrize("inline", [True, False], ids=["inline", "jwks_uri"])
    @pytest.mark.parametrize("algorithm", TAKEN)
    async def test_it_gets_in_and_stays_in(
        self, database_url: str, host: DocumentHost, algorithm: Algorithm, inline: bool
    ) -> None:
        """It exchanges its code, calls, refreshes and revokes; each assertion leaves a row that expires."""
        async with running(database_url) as server:
            app = App(server, host, inline, Signer(algorithm))
            app.describe()
            tokens = await app.tokens()
            stored = await server.provider.get_client(app.client_id)
            assert stored is not None
            assert (stored.token_endpoint_auth_method, stored.client_secret) == ("private_key_jwt", None)
            assert (await server.mcp(tokens["access_token"])).status_code not in (401, 403)
            answer = await app.refresh(tokens, app.assertion())
            assert answer.status_code == 200
            tokens = answer.json()
            rows = [row for row in await tokens_of(server.provider) if row.kind == ASSERTION]
            assert len(rows) == 2
            assert {row.client_id for row in rows} == {app.client_id}
            assert all(60 <= row.expires_at - time.time() <= 91 for row in rows)
            form = {"client_id": app.client_id, "token": tokens["refresh_token"]}
            assert (await server.http.post("/revoke", data=form)).status_code == 401
            assert (await server.mcp(tokens["access_token"])).status_code not in (401, 403)
            assert (await server.http.post("/revoke", data=form | app.assertion())).status_code == 200
            assert (await server.mcp(tokens["access_token"])).status_code == 401

    async def test_a_client_id_may_be_missing(self, app: App) -> None:
        """It is then the assertion's subject (RFC 7521, section 4.2)."""
        tokens = await app.tokens()
        form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
        assert (await app.server.http.post("/token", data=form | app.assertion())).status_code == 200
        form = {"grant_type": "refresh_token", "refresh_token": "refresh_x", **app.assertion(sub="https://x.example/y")}
        assert is_refused(await app.server.http.post("/token", data=form))

    async def test_it_may_name_the_issuer(self, app: App) -> None:
        """The audience may be the token endpoint, or the issuer as the metadata spells it, or without its slash."""
        metadata = (await app.server.http.get("/.well-known/oauth-authorization-server")).json()
        issuer = metadata["issuer"]
        for audience in (metadata["token_endpoint"], issuer, issuer.rstrip("/"), ["https://other.example", issuer]):
            tokens = await app.tokens()
            assert not is_refused(await app.refresh(tokens, app.assertion(aud=audience)))

    async def test_the_metadata_say_so(self, server: Server) -> None:
        """The method and its algorithms are listed for both endpoints; registration refuses it as before."""
        metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
        for endpoint in ("token", "revocation"):
            assert "private_key_jwt" in metadata[f"{endpoint}_endpoint_auth_methods_supported"]
            algorithms = metadata[f"{endpoint}_endpoint_auth_signing_alg_values_supported"]
            assert set(TAKEN) <= set(algorithms)
            assert not [name for name in algorithms if name == "none" or name.startswith("HS")]
        body = {"redirect_uris": ["http://127.0.0.1:9000/callback"], "token_endpoint_auth_method": "private_key_jwt"}
        assert (await server.http.post("/register", json=body)).status_code == 400

    @pytest.mark.parametrize("server", [{"metadata_documents": False}], indirect=True)
    async def test_they_do_not_where_no_documents_are_taken(self, server: Server) -> None:
        """Without documents no client has keys."""
        metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
        assert "private_key_jwt" not in metadata["token_endpoint_auth_methods_supported"]
        assert "token_endpoint_auth_signing_alg_values_supported" not in metadata

    async def test_a_private_key_is_never_stored(self, server: Server, host: DocumentHost) -> None:
        """A client that publishes its whole key is stored with the public part."""
        app = App(server, host, inline=True)
        app.describe(jwks={"keys": ["no key", {"kty": "OKP"}, app.signer.whole]})
        await app.tokens()
        stored = await server.provider.get_client(app.client_id)
        assert stored is not None
        (key,) = (stored.jwks or {})["keys"]
        assert set(key) in ({"kty", "kid", "crv", "x", "y"}, {"kty", "kid", "n", "e"})

    async def test_a_public_clients_assertion_is_ignored(self, server: Server, host: DocumentHost) -> None:
        """ChatGPT's document offers both methods: it comes in as it always did, and nothing is fetched or stored."""
        app = App(server, host, inline=False)
        app.describe(token_endpoint_auth_methods_supported=["none", "private_key_jwt"])
        tokens = await server.tokens(app.client_id)
        for assertion in (app.assertion()["client_assertion"], "nonsense"):
            answer = await app.refresh(tokens, asserting(assertion))
            assert answer.status_code == 200
            tokens = answer.json()
        assert host.fetches(host.keys_url) == 0
        assert await app.used() == 0


def spoiled(app: App, **changed: Any) -> dict[str, str]:
    return app.assertion(**changed)


def of_another_key(app: App) -> dict[str, str]:
    return app.assertion(Signer(kid=app.signer.kid))


def without_signature(app: App) -> dict[str, str]:
    return asserting(unsigned(claims_of(app.client_id, app.token_url), signature="x"))


def with_a_shared_secret(app: App) -> dict[str, str]:
    key = jwk.OctKey.import_key(json.dumps(app.signer.public))
    claims = claims_of(app.client_id, app.token_url)
    return asserting(jwt.encode({"alg": "HS256", "kid": app.signer.kid}, claims, key, algorithms=["HS256"]))


def of_another_type(app: App) -> dict[str, str]:
    return app.assertion() | {"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"}


def too_long(app: App) -> dict[str, str]:
    return app.assertion(padding="x" * ASSERTION_BYTES)


def nested(_: App) -> dict[str, str]:
    return asserting(".".join(["W1tb" * 2000, "e30", "x"]))  # of brackets


def at_once_with_a_secret(app: App) -> dict[str, str]:
    return app.assertion() | {"client_secret": "x"}


def without(_: App) -> dict[str, str]:
    return {}


def with_an_empty_one(_: App) -> dict[str, str]:
    return asserting("")


def saying(**claims: Any) -> Callable[[App], dict[str, str]]:
    """An assertion whose claims are changed. None leaves one out."""
    return lambda app: app.assertion(**{name: claim() if callable(claim) else claim for name, claim in claims.items()})


NEVER_FETCHED = {
    "none": without,
    "empty": with_an_empty_one,
    "alg none": without_signature,
    "HS256": with_a_shared_secret,
    "another type": of_another_type,
    "too long": too_long,
    "nested": nested,
    "a secret too": at_once_with_a_secret,
    "aud": saying(aud="https://other.example/token"),
    "no aud": saying(aud=[]),
    "iss": saying(iss="https://other.example/client.json"),
    "sub": saying(sub="https://other.example/client.json"),
    "two clients": saying(client_id="https://other.example/client.json"),
    "expired": saying(exp=away(-1), iat=away(-60)),
    "no exp": saying(exp=None),
    "exp as text": saying(exp="tomorrow"),
    "exp is NaN": saying(exp=float("nan")),
    "iat is NaN": saying(iat=float("nan")),
    "exp is infinite": saying(exp=float("inf"), iat=None),
    "not yet valid": saying(nbf=away(120), exp=away(200)),
    "no jti": saying(jti=None),
    "jti is a list": saying(jti=["x"]),
    "an empty jti": saying(jti=""),
}
"""What is refused before any key is needed."""

NEEDS_KEYS = {
    "another key": of_another_key,
    "exp too far": saying(exp=away(301)),
    "exp too far without iat": saying(exp=away(310), iat=None),
    "issued in the future": saying(iat=away(60), exp=away(90)),
}


class TestRefused:
    """What is no assertion of the client: it gets nothing, and leaves no row."""

    @pytest.mark.parametrize("spoil", NEVER_FETCHED.values(), ids=NEVER_FETCHED)
    async def test_without_a_fetch(self, server: Server, host: DocumentHost, spoil: Callable[[App], Any]) -> None:
        """The key set of the client is not asked for, not even once."""
        app = App(server, host, inline=False)
        app.describe()
        code, verifier = await server.code(app.client_id)
        form = token_request(code, verifier, client_id=app.client_id)
        assert is_refused(await server.http.post("/token", data=form | spoil(app)))
        assert is_refused(
            await server.http.post("/revoke", data={"client_id": app.client_id, "token": "x", **spoil(app)})
        )
        assert host.fetches(host.keys_url) == 0
        assert await app.used() == 0
        assert not is_refused(await server.http.post("/token", data=form | app.assertion()))

    @pytest.mark.parametrize("spoil", NEEDS_KEYS.values(), ids=NEEDS_KEYS)
    async def test_by_its_keys(self, app: App, spoil: Callable[[App], dict[str, str]]) -> None:
        """A good assertion for the same token works afterwards."""
        tokens = await app.tokens()
        assert is_refused(await app.refresh(tokens, spoil(app)))
        assert is_refused(
            await app.server.http.post(
                "/revoke", data={"client_id": app.client_id, "token": tokens["access_token"], **spoil(app)}
            )
        )
        assert await app.used() == 1
        assert not is_refused(await app.refresh(tokens, app.assertion()))

    async def test_another_clients_assertion(self, app: App) -> None:
        """It authenticates its own client, and no other."""
        tokens = await app.tokens()
        other = app.client_id.replace("client.json", "other.json")
        app.describe(client_id=other)
        await app.server.code(other)
        assertion = asserting(app.signer.sign(claims_of(other, app.token_url)))
        assert is_refused(await app.refresh(tokens, assertion))
        form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"], "client_id": other}
        answer = await app.server.http.post("/token", data=form | assertion)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_grant")

    async def test_a_client_with_a_secret(self, app: App) -> None:
        """A client that registered for a secret cannot sign, nor do both; one that signs has no secret."""
        client = await app.server.register(token_endpoint_auth_method="client_secret_post")
        assertion = asserting(app.signer.sign(claims_of(client["client_id"], app.token_url)))
        answer = await app.server.exchange(client["client_id"], {"client_id": client["client_id"], **assertion})
        assert is_refused(answer)
        secret = {"client_id": client["client_id"], "client_secret": client["client_secret"]}
        assert is_refused(await app.server.exchange(client["client_id"], secret | assertion))
        assert not is_refused(await app.server.exchange(client["client_id"], secret))

    async def test_a_failed_request_uses_nothing(self, app: App) -> None:
        """A wrong token leaves no row, whoever signs; the same assertion then works for the right one."""
        tokens = await app.tokens()
        rows, assertion = await app.used(), app.assertion()
        answer = await app.refresh({"refresh_token": "refresh_wrong"}, assertion)
        assert answer.json()["error"] == "invalid_grant"
        assert await app.used() == rows
        assert not is_refused(await app.refresh(tokens, assertion))
        assert await app.used() == rows + 1


class TestOnce:
    """An assertion is good once."""

    async def test_a_second_time(self, app: App) -> None:
        """Not for another grant, not for a refresh that is answered again, and not at the other endpoint."""
        first, second = await app.tokens(), await app.tokens()
        assertion = app.assertion()
        assert not is_refused(await app.refresh(first, assertion))
        assert is_refused(await app.refresh(first, assertion))
        assert is_refused(await app.refresh(second, assertion))
        form = {"client_id": app.client_id, "token": second["refresh_token"]}
        assert is_refused(await app.server.http.post("/revoke", data=form | assertion))
        assert not is_refused(await app.refresh(second, app.assertion()))

    async def test_a_refresh_that_is_answered_again_uses_one(self, app: App) -> None:
        """A client that lost the response gets it with a new assertion, which is used up by that."""
        tokens, assertion = await app.tokens(), app.assertion()
        first = await app.refresh(tokens, app.assertion())
        again = await app.refresh(tokens, assertion)
        assert again.json()["refresh_token"] == first.json()["refresh_token"]
        assert is_refused(await app.refresh(tokens, assertion))

    async def test_two_clients_may_choose_the_same_jti(self, app: App) -> None:
        """It is the client's own."""
        await app.tokens()
        jti = "one"
        assert not is_refused(await app.refresh(await app.tokens(), app.assertion(jti=jti)))
        other = app.client_id.replace("client.json", "other.json")
        app.describe(client_id=other)
        code, verifier = await app.server.code(other)
        assertion = asserting(app.signer.sign(claims_of(other, app.token_url, jti=jti)))
        answer = await app.server.http.post("/token", data=token_request(code, verifier, client_id=other) | assertion)
        assert answer.status_code == 200

    async def test_its_row_is_no_token(self, app: App, caplog: pytest.LogCaptureFixture) -> None:
        """The text whose hash is stored opens, revokes and explains nothing; the row goes with its client."""
        tokens = await app.tokens()
        name = json.dumps(["urn:ietf:params:oauth:client-assertion-type:jwt-bearer", app.client_id, "one"])
        assert not is_refused(await app.refresh(tokens, app.assertion(jti="one")))
        assert (await app.server.mcp(name)).status_code == 401
        assert (await app.refresh({"refresh_token": name}, app.assertion())).json()["error"] == "invalid_grant"
        caplog.set_level(logging.INFO, "oauth_store")
        form = {"client_id": app.client_id, "token": name}
        assert (await app.server.http.post("/revoke", data=form | app.assertion())).status_code == 200
        assert "revoked" not in caplog.text
        store = app.server.provider._store
        assert (await store.read(explain, name, int(time.time()))).state == "unknown"
        assert await app.used() == 2
        listed, _ = await store.read(live_grants)
        inventory = await store.read(take_inventory, store, int(time.time()))
        assert (len(listed), inventory.tables["oauth_tokens"].live) == (1, 2)
        await store.write(remove_client, app.client_id, "the test", int(time.time()))
        assert await app.used() == 0

    async def test_in_turn_at_two_processes(self, database_url: str) -> None:
        """The second process knows what the first one has seen."""
        forms, signer = await grants_of_a_signing_client(database_url, 2)
        assertion = signed_by(signer)
        async with Processes(1) as processes:
            ((first,),) = await processes.run(database_url, (send_forms, [forms[0] | assertion]))
        async with Processes(1) as processes:
            ((second,),) = await processes.run(database_url, (send_forms, [forms[1] | assertion]))
        assert not isinstance(first, str)
        assert second == "invalid_client"

    @pytest.mark.parametrize("grants", [1, 20])
    async def test_at_once_at_two_processes(self, database_url: str, grants: int) -> None:
        """Of twenty requests with one assertion, for one grant or for twenty, one succeeds, and one row is left."""
        forms, signer = await grants_of_a_signing_client(database_url, grants)
        assertion = signed_by(signer)
        sent = [(forms * 20)[i] | assertion for i in range(20)]
        async with Processes(2) as processes:
            answers = await processes.run(database_url, (send_forms, sent[:10]), (send_forms, sent[10:]))
        outcomes = [answer if isinstance(answer, str) else "tokens" for some in answers for answer in some]
        assert sorted(outcomes) == ["invalid_client"] * 19 + ["tokens"]
        async with provider_on(database_url) as provider:
            rows = await tokens_of(provider)
        assert sum(row.kind == ASSERTION for row in rows) == 1
        assert sum(row.kind == "refresh_token" and row.consumed_at is not None for row in rows) == 1


SIGNING = "https://client.example/client.json"


async def grants_of_a_signing_client(url: str, count: int) -> tuple[list[dict[str, str]], Signer]:
    """Requests to refresh, one for each of so many grants of a client with keys in its registration."""
    signer = Signer()
    async with provider_on(url) as provider:
        client = new_client(
            client_id=SIGNING, token_endpoint_auth_method="private_key_jwt", jwks={"keys": [signer.public]}
        )
        await provider.register_client(client)
        tokens = [await sign_in(provider, client) for _ in range(count)]
    named = {"grant_type": "refresh_token", "client_id": SIGNING}
    return [named | {"refresh_token": str(pair.refresh_token)} for pair in tokens], signer


def signed_by(signer: Signer) -> dict[str, str]:
    return asserting(signer.sign(claims_of(SIGNING, f"{BASE_URL}/token")))


class TestKeys:
    """Where the keys come from."""

    async def test_a_set_is_fetched_once(self, server: Server, host: DocumentHost) -> None:
        """It is kept as long as its host says; keys in a document need no fetch."""
        app = App(server, host, inline=False)
        app.describe()
        tokens = await app.tokens()
        for _ in range(2):
            tokens = (await app.refresh(tokens, app.assertion())).json()
        assert host.fetches(host.keys_url) == 1
        with turned(3601):
            assert not is_refused(await app.refresh(tokens, app.assertion()))
        assert host.fetches(host.keys_url) == 2

    async def test_a_set_that_may_not_be_kept_is_kept_for_a_moment(self, server: Server, host: DocumentHost) -> None:
        """Otherwise each request would make this server fetch."""
        app = App(server, host, inline=False)
        app.describe(cache={"cache-control": "no-store"})
        tokens = await app.tokens()
        assert not is_refused(await app.refresh(tokens, app.assertion()))
        assert host.fetches(host.keys_url) == 1

    async def test_new_keys(self, app: App) -> None:
        """A client that signs with a new key gets in at once; one fetch shows the new keys, and the old are over."""
        old, new = app.signer, Signer()
        tokens = await app.tokens()
        app.describe(new)
        url = app.client_id if app.inline else app.host.keys_url
        with turned(31):
            fetched = app.host.fetches(url)
            answer = await app.refresh(tokens, app.assertion(new))
            assert answer.status_code == 200, answer.text
            assert app.host.fetches(url) == fetched + 1
            assert is_refused(await app.refresh(answer.json(), app.assertion(old)))
            assert not is_refused(await app.refresh(answer.json(), app.assertion(new)))
            stored = await app.server.provider.get_client(app.client_id)
            assert stored is not None
            assert not app.inline or (stored.jwks or {})["keys"][0]["kid"] == new.kid

    async def test_a_stranger_makes_this_server_fetch_rarely(self, app: App) -> None:
        """Assertions that no key of the client has signed lead to one fetch in 30 seconds; the client still gets in."""
        tokens = await app.tokens()
        url = app.client_id if app.inline else app.host.keys_url
        with turned(31):
            fetched = app.host.fetches(url)
            for _ in range(5):
                assert is_refused(await app.refresh(tokens, of_another_key(app)))
            assert app.host.fetches(url) == fetched + 1
            assert not is_refused(await app.refresh(tokens, app.assertion()))

    @pytest.mark.parametrize(
        "answer", [Answer(b"", 500), Answer(b"", 404), Answer(b"no JSON"), Answer(b'{"keys": []}')]
    )
    async def test_keys_that_cannot_be_had(
        self, server: Server, host: DocumentHost, answer: Answer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The client is asked to come back, and keeps its registration; its host is not asked again for a minute."""
        app = App(server, host, inline=False)
        app.describe()
        good, host.keys = host.keys, answer
        code, verifier = await server.code(app.client_id)
        form = token_request(code, verifier, client_id=app.client_id)
        for path in ("/token", "/token", "/revoke"):
            refused = await server.http.post(path, data=form | {"token": "x"} | app.assertion())
            assert (refused.status_code, refused.json()["error"]) == (503, "temporarily_unavailable")
            assert 0 < int(refused.headers["retry-after"]) <= 60
        assert f"keys of the client {app.client_id} cannot be retrieved: " in caplog.text
        assert host.fetches(host.keys_url) == 1
        assert await app.used() == 0
        host.keys = good
        with turned(61):
            assert not is_refused(await server.http.post("/token", data=form | app.assertion()))

    async def test_keys_that_move(self, server: Server, host: DocumentHost) -> None:
        """A client whose document names other keys gets in with them, although the old set is gone."""
        app = App(server, host, inline=False)
        app.describe()
        tokens, new = await app.tokens(), Signer()
        app.inline = True
        app.describe(new)
        host.keys = Answer(b"", 404)
        with turned(3601):
            answer = await app.refresh(tokens, app.assertion(new))
            assert answer.status_code == 200, answer.text
            assert is_refused(await app.refresh(answer.json(), app.assertion()))

    async def test_a_host_that_is_down(self, app: App) -> None:
        """Known keys still count. Where a signature needs newer ones, the client is asked to come back."""
        tokens = await app.tokens()
        await app.host.stop()
        with turned(31):
            answer = await app.refresh(tokens, app.assertion(Signer()))
            assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
            assert not is_refused(await app.refresh(tokens, app.assertion()))

    async def test_a_document_that_no_longer_has_keys(self, server: Server, host: DocumentHost) -> None:
        """A client whose document turned bad does not get in with a key that it never had."""
        app = App(server, host, inline=True)
        app.describe()
        tokens = await app.tokens()
        host.answer = Answer(b"", 404)
        with turned(31):
            for _ in range(3):
                assert is_refused(await app.refresh(tokens, app.assertion(Signer())))
            assert host.fetches(app.client_id) == 2

    async def test_a_set_that_is_too_large(self, server: Server, host: DocumentHost) -> None:
        """More than 32 KiB are not read."""
        app = App(server, host, inline=False)
        app.describe()
        host.keys.body += b" " * 32 * 1024
        answer = await server.exchange(app.client_id, {"client_id": app.client_id, **app.assertion()})
        assert answer.status_code == 503

    async def test_weak_and_foreign_keys(self, server: Server, host: DocumentHost) -> None:
        """An RSA key of less than 2048 bits, one for encryption and one of a shared secret are no keys."""
        app = App(server, host, inline=True)
        weak = {"kty": "RSA", "n": "x" * 171, "e": "AQAB"}
        secret = jwk.OctKey.generate_key(256).as_dict(private=True)
        app.describe(jwks={"keys": [weak, secret, app.signer.public | {"use": "enc"}]})
        answer = await server.http.get("/authorize", params={"client_id": app.client_id, "response_type": "code"})
        assert answer.status_code == 400
        assert "no public RSA or EC key" in answer.json()["error_description"]


class TestRemovedKeys:
    """Keys that a client no longer publishes."""

    async def test_after_a_day_at_most(self, app: App) -> None:
        """A key that is replaced is over a day later, although no signature has failed."""
        old, new = app.signer, Signer()
        tokens = await app.tokens()
        app.describe(new)
        with turned(DAY + 1):
            assert is_refused(await app.refresh(tokens, app.assertion(old)))
            assert not is_refused(await app.refresh(tokens, app.assertion(new)))

    async def test_a_document_is_read_once_a_day(self, server: Server, host: DocumentHost) -> None:
        """A client that signs well makes this server ask for its document daily, and at the first authorization."""
        app = App(server, host, inline=True)
        app.describe()
        tokens = await app.tokens()
        assert host.fetches(app.client_id) == 1
        with turned(DAY + 1):
            for _ in range(3):
                tokens = (await app.refresh(tokens, app.assertion())).json()
        assert host.fetches(app.client_id) == 2

    async def test_a_set_that_moves(self, server: Server, host: DocumentHost) -> None:
        """The keys at an address that a document no longer names are over, although they are still there."""
        app = App(server, host, inline=False)
        app.describe()
        tokens, old = await app.tokens(), app.signer
        app.inline, app.signer = True, Signer()
        app.describe()
        host.publish(old.public)
        with turned(DAY + 1):
            assert is_refused(await app.refresh(tokens, app.assertion(old)))
            assert not is_refused(await app.refresh(tokens, app.assertion()))

    async def test_a_host_that_is_away(self, server: Server, host: DocumentHost) -> None:
        """Stored keys count for as long as their document cannot be read."""
        app = App(server, host, inline=True)
        app.describe()
        tokens = await app.tokens()
        await host.stop()
        with turned(3 * DAY):
            for _ in range(2):
                answer = await app.refresh(tokens, app.assertion())
                assert answer.status_code == 200, answer.text
                tokens = answer.json()

    async def test_a_document_that_is_gone(self, server: Server, host: DocumentHost) -> None:
        """The grants of a client go on, but the document that was kept lets it in no more."""
        app = App(server, host, inline=True)
        app.describe()
        host.answer.headers = {"cache-control": "max-age=86400"}
        tokens = await app.tokens()
        host.answer = Answer(b"", 410)
        with turned(31):
            assert is_refused(await app.refresh(tokens, app.assertion(Signer())))
            query = {"client_id": app.client_id, "response_type": "code"}
            assert (await server.http.get("/authorize", params=query)).status_code == 400
            stored = await server.provider.get_client(app.client_id)
            assert stored is not None
            assert stored.redirect_uris is None
            assert not is_refused(await app.refresh(tokens, app.assertion()))

    async def test_a_document_without_keys(self, server: Server, host: DocumentHost) -> None:
        """A client that publishes none any more gets in with none, until it publishes some."""
        app = App(server, host, inline=True)
        app.describe()
        tokens, good = await app.tokens(), host.answer
        app.describe(jwks={"keys": []})
        with turned(DAY + 1):
            for _ in range(2):
                assert is_refused(await app.refresh(tokens, app.assertion()))
        host.answer = good
        with turned(DAY + 40):
            assert not is_refused(await app.refresh(tokens, app.assertion()))

    @pytest.mark.parametrize("answer", [Answer(b"", 404), Answer(b'{"keys": []}')], ids=["gone", "empty"])
    async def test_a_set_without_keys(self, server: Server, host: DocumentHost, answer: Answer) -> None:
        """Once this server has seen that the set is empty, none of its keys counts."""
        app = App(server, host, inline=False)
        app.describe()
        tokens = await app.tokens()
        host.keys = answer
        with turned(31):
            for signer in (Signer(), app.signer, app.signer):
                assert (await app.refresh(tokens, app.assertion(signer))).status_code == 503

    async def test_a_client_that_turns_public(self, server: Server, host: DocumentHost) -> None:
        """It needs no assertion any more: a good one is ignored."""
        app = App(server, host, inline=True)
        app.describe()
        tokens = await app.tokens()
        host.describe()
        with turned(DAY + 1):
            assert not is_refused(await app.refresh(tokens, app.assertion()))


class TestStrangers:
    """What assertions that no key of the client has signed cannot do."""

    async def test_replace_a_client_of_the_owner(self, host: DocumentHost) -> None:
        """A client that the owner added stays as it is, and nothing is fetched, also at /authorize."""
        signer = Signer()
        async with Company().open() as company, running(identity_assertion=company.settings()) as server:
            own = {"client_secret": None, "token_endpoint_auth_method": "private_key_jwt"}
            keys = {"keys": [signer.public]}
            await server.provider.register_client(assistant(client_id=host.client_id, jwks=keys, **own))
            before = await server.provider.get_client(host.client_id)
            app = App(server, host, inline=True)
            app.describe(scope="admin")
            assert is_refused(await app.refresh({"refresh_token": "x"}, app.assertion()))
            query = {"client_id": host.client_id, "response_type": "code"}
            assert (await server.http.get("/authorize", params=query)).status_code == 400
            assert await server.provider.get_client(host.client_id) == before
            assert host.requests == []

    async def test_make_this_server_write(
        self, server: Server, host: DocumentHost, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Many at once lead to one fetch and one change of the registration."""
        app = App(server, host, inline=True)
        app.describe()
        await app.tokens()
        app.describe(client_name="another name")
        caplog.set_level(logging.INFO, "oauth_store")
        with turned(31):
            caplog.clear()
            forms = [app.assertion(Signer(app.signer.algorithm)) for _ in range(20)]
            answers = await asyncio.gather(*(app.refresh({"refresh_token": "x"}, form) for form in forms))
            assert all(map(is_refused, answers))
        assert caplog.text.count("client registered") == 1
        assert host.fetches(app.client_id) == 2

    async def test_fill_the_log(self, server: Server, host: DocumentHost, caplog: pytest.LogCaptureFixture) -> None:
        """FastMCP has nothing to warn of, whatever key an assertion names."""
        app = App(server, host, inline=True)
        app.describe()
        tokens = await app.tokens()
        logger = logging.getLogger("fastmcp")
        logger.addHandler(caplog.handler)
        for header in ({"kid": None}, {"kid": "other"}):
            claims = claims_of(app.client_id, app.token_url)
            assert is_refused(await app.refresh(tokens, asserting(Signer().sign(claims, **header))))
            assert not is_refused(await app.refresh(tokens, asserting(app.signer.sign(claims, **header))))
        logger.removeHandler(caplog.handler)
        assert [record for record in caplog.records if record.name.startswith("fastmcp")] == []

    async def test_hide_an_outage(self, app: App) -> None:
        """While newer keys cannot be had, the answer stays the same; then they count at once."""
        tokens, new = await app.tokens(), Signer()
        await app.host.stop()
        with turned(31):
            for _ in range(3):
                assert (await app.refresh(tokens, app.assertion(new))).status_code == 503
        await app.host.start()
        app.describe(new)
        with turned(92):
            assert not is_refused(await app.refresh(tokens, app.assertion(new)))


def bare(signer: Signer, **more: Any) -> dict[str, Any]:
    """A public key without a name or a purpose, but with these members."""
    members = {"kty", "crv", "x", "y", "n", "e"}
    return {name: value for name, value in signer.public.items() if name in members} | more


class TestSets:
    """Which keys of a set count."""

    @pytest.mark.parametrize("kid", ["same", None])
    @pytest.mark.parametrize("place", [0, 4, 5])
    async def test_keys_of_one_name(self, server: Server, host: DocumentHost, kid: str | None, place: int) -> None:
        """The first five that fit are tried, also without names, and foreign kinds do not count."""
        app = App(server, host, inline=True, signer=Signer(kid="same"))
        named = {} if kid is None else {"kid": kid}
        kinds: tuple[Algorithm, ...] = ("RS256",) if app.signer.algorithm == "ES256" else ("ES256",)
        keys = [bare(Signer(kind), **named) for kind in kinds] + [bare(Signer(), **named) for _ in range(place)]
        app.describe(jwks={"keys": [*keys, bare(app.signer, **named)]})
        claims = claims_of(app.client_id, app.token_url)
        assertion = asserting(app.signer.sign(claims, kid=kid))
        answer = await server.exchange(app.client_id, {"client_id": app.client_id, **assertion})
        assert is_refused(answer) == (place > 4)

    async def test_another_curve(self, server: Server, host: DocumentHost) -> None:
        """A key on another curve is passed over, although it has the name."""
        app = App(server, host, inline=True, signer=Signer(kid="same"))
        other = jwk.ECKey.generate_key("P-384").as_dict(private=False)
        app.describe(jwks={"keys": [{**other, "kid": "same"}, app.signer.public]})
        await app.tokens()

    @pytest.mark.parametrize(
        "spoiled",
        [
            {"key_ops": ["encrypt"]},
            {"key_ops": "verify"},
            {"alg": "RSA-OAEP"},
            {"alg": "HS256"},
            {"alg": ["RS256"]},
            {"kid": "x" * 201},
            {"kid": "é"},
            {"kid": 5},
            {"n": "AQAB"},
        ],
        ids=str,
    )
    def test_what_is_passed_over(self, spoiled: dict[str, Any]) -> None:
        """A key with a strange name, or for another purpose."""
        good = bare(Signer("RS256"), kid="x" * 200, key_ops=["sign", "verify"], alg="RS256")
        assert read_keys({"keys": [good | spoiled, good]})["keys"] == [
            {name: value for name, value in good.items() if name != "key_ops"}
        ]
        with pytest.raises(InvalidDocumentError):
            read_keys({"keys": [good | spoiled]})

    @pytest.mark.parametrize(("bits", "counts"), [(2047, False), (2048, True), (8192, True), (8193, False)])
    def test_the_size_of_an_rsa_key(self, bits: int, counts: bool) -> None:
        """It is that of its modulus, whatever zeros are before it."""
        good = bare(Signer("RS256"))
        for zeros in (0, 1):
            number = ((1 << bits) - 1).to_bytes((bits + 7) // 8 + zeros)
            key = good | {"n": base64.urlsafe_b64encode(number).decode().rstrip("=")}
            assert read_keys({"keys": [key, good]})["keys"] == ([key, good] if counts else [good])

    @pytest.mark.parametrize("n", ["A" * 340 + "AQ", "A" * 1000, "_" * 1001], ids=["small", "zero", "no base64"])
    def test_a_number_that_is_none(self, n: str) -> None:
        """Its length says nothing."""
        with pytest.raises(InvalidDocumentError):
            read_keys({"keys": [{"kty": "RSA", "n": n, "e": "AQAB"}]})

    async def test_what_is_kept_is_small(self, host: DocumentHost) -> None:
        """All the sets that a process keeps are less than 5 MiB, however their owners fill them."""
        small = {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "A" * 43}
        large = {"kty": "RSA", "n": "_" * 1366, "e": "AQAB", "kid": "x" * 200}
        many, sources = "x" * 20_000, key_sets()
        for key, count in ((small, 200), (large, 19)):
            host.publish(*[key] * count, cache={"cache-control": "max-age=3600", "etag": f'"{many}"'})
            assert len(host.keys.body) < 32 * 1024
            for number in range(110):
                await sources.fetch(f"{host.keys_url}?{len(key)}{number}", "one address")
            assert size_of(sources._kept) < 5 * 1024 * 1024


def size_of(thing: Any) -> int:
    """How many bytes something takes, with all that is in it."""
    if isinstance(thing, Mapping):
        inside: list[Any] = [*thing, *thing.values()]
    elif isinstance(thing, list):
        inside = thing
    else:
        inside = [getattr(thing, name) for name in getattr(thing, "__slots__", ())]
    return sys.getsizeof(thing) + sum(map(size_of, inside))


class TestAddresses:
    """Where keys cannot be."""

    @pytest.mark.parametrize(
        "url",
        [
            "http://client.example/keys.json",
            "https://client.example",
            "https://client.example:99999/keys.json",
            "https://10.0.0.1/keys.json",
            "https://[::1]/keys.json",
            "https://169.254.169.254/keys.json",
            "https://localhost/keys.json",
        ],
    )
    def test_urls_that_are_refused(self, url: str) -> None:
        """They can never be fetched."""
        with pytest.raises(InvalidDocumentError, match="its jwks_uri "):
            check_keys_url(url)

    @pytest.mark.parametrize("url", ["https://client.example/keys.json", "https://8.8.8.8:8443/keys"])
    def test_urls_that_are_not(self, url: str) -> None:
        """Others may work."""
        check_keys_url(url)

    async def test_a_document_that_names_one(self, server: Server, host: DocumentHost) -> None:
        """It is refused when the client connects."""
        app = App(server, host, inline=False)
        app.describe(jwks_uri="https://10.0.0.1/keys.json")
        answer = await server.http.get("/authorize", params={"client_id": app.client_id, "response_type": "code"})
        assert answer.status_code == 400
        assert "its jwks_uri is not at a public address" in answer.json()["error_description"]

    @pytest.mark.parametrize("server", [{"metadata_documents": False}], indirect=True)
    async def test_a_server_that_fetches_none(
        self, server: Server, host: DocumentHost, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The log names the setting that keeps a stored client out; keys in a registration work."""
        app = App(server, host, inline=True)
        client = {"client_id": app.client_id, "token_endpoint_auth_method": "private_key_jwt"}
        await server.provider.register_client(new_client(**client, jwks={"keys": [app.signer.public]}))
        await app.tokens()
        await server.provider.register_client(new_client(**client, jwks_uri=host.keys_url))
        assert (await app.refresh({"refresh_token": "x"}, app.assertion())).status_code == 503
        assert "this server fetches none, because of metadata_documents=False" in caplog.text


class PlainProvider(SQLAlchemyOAuthProvider):
    """One whose own `get_client` makes new clients of what is stored."""

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:  # type: ignore[override]
        client = await super().get_client(client_id)
        return client and OAuthClientInformationFull(**client.model_dump())


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "jwks_uri"])
async def test_an_application_with_a_client_of_its_own(host: DocumentHost, inline: bool) -> None:
    """A client with keys gets in, and its new keys count."""
    async with running(kind=PlainProvider) as server:
        app, new = App(server, host, inline), Signer()
        app.describe()
        tokens = await app.tokens()
        app.describe(new)
        with turned(31):
            assert not is_refused(await app.refresh(tokens, app.assertion(new)))
