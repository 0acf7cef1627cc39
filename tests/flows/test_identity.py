"""Enterprise sign-in: an identity provider asserts a user, and the client gets an access token (SEP-990, ID-JAG)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from fastmcp.server.auth.identity_assertion import ID_JAG_GRANT_PROFILE
from fastmcp.utilities.auth import decode_jwt_payload
from mcp.server.auth.provider import IdentityAssertionParams, RegistrationError, TokenError
from mcp.shared.auth import JWT_BEARER_GRANT_TYPE, OAuthClientInformationFull, OAuthToken
from pydantic import AnyUrl
from sqlalchemy import select

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.models import ACCESS, ASSERTION, Client
from oauth_store.flows.connected import end_all, live_grants
from oauth_store.flows.explain import explain
from oauth_store.flows.identity import IDENTITY_BYTES
from oauth_store.flows.registered import remove_client
from tests.assertions import Algorithm, Signer, asserting, claims_of, unsigned
from tests.clocks import away, turned
from tests.commands import run, run_json
from tests.databases import rows_of, tokens_of
from tests.documents import DocumentHost
from tests.endpoints import Server, basic, running
from tests.identities import CLIENT_ID, SECRET, Company, assistant, send_to_enterprise
from tests.steps import BASE_URL, REDIRECT_URI, RESOURCE, provider_on, registration_options
from tests.workers import Processes

OPTIONS = registration_options("read", "write", "admin")


class Office:
    """A server, and the company whose users it lets in."""

    def __init__(self, server: Server, company: Company) -> None:
        self.server = server
        self.company = company
        self.audience = str(server.http.base_url)

    def claims(self, **changed: Any) -> dict[str, Any]:
        """The claims of a good assertion, with these changes."""
        return self.company.claims(self.audience, self.server.resource, **changed)

    def assertion(self, **changed: Any) -> str:
        """A good assertion, with these changes of its claims."""
        return self.company.sign(self.claims(**changed))

    async def ask(self, assertion: str, /, *, headers: Any = None, **form: str) -> httpx2.Response:
        """The answer of /token to the assistant."""
        values = {"grant_type": JWT_BEARER_GRANT_TYPE, "assertion": assertion}
        secret = {} if headers else {"client_id": CLIENT_ID, "client_secret": SECRET}
        return await self.server.http.post("/token", data=values | secret | form, headers=headers)

    async def token(self, **changed: Any) -> str:
        """An access token of a user."""
        answer = await self.ask(self.assertion(**changed))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def kinds(self) -> list[str]:
        """The kinds of all rows."""
        return sorted(row.kind for row in await tokens_of(self.server.provider))


@pytest.fixture
async def company() -> AsyncIterator[Company]:
    """An identity provider that serves."""
    async with Company().open() as company:
        yield company


@pytest.fixture
async def office(company: Company) -> AsyncIterator[Office]:
    """A server with three scopes that knows the assistant."""
    async with running(client_registration_options=OPTIONS, identity_assertion=company.settings()) as server:
        await server.provider.register_client(assistant())
        yield Office(server, company)


def is_refused(answer: httpx2.Response) -> bool:
    """Tell whether an assertion was refused, without a word about the reason."""
    if answer.status_code == 200:
        return False
    assert answer.status_code == 401, answer.text
    assert answer.json() == {"error": "invalid_grant", "error_description": "the identity assertion is not valid"}
    return True


class TestFlow:
    """The right user."""

    @pytest.mark.parametrize("method", ["client_secret_post", "client_secret_basic"])
    @pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
    async def test_an_access_token(self, database_url: str, algorithm: Algorithm, method: str) -> None:
        """It works, is the asserted user's, lasts five minutes, and comes without a refresh token."""
        async with (
            Company(algorithm).open() as company,
            running(database_url, identity_assertion=company.settings()) as server,
        ):
            await server.provider.register_client(assistant(token_endpoint_auth_method=method))
            office = Office(server, company)
            headers = basic(CLIENT_ID, SECRET) if method == "client_secret_basic" else None
            answer = await office.ask(office.assertion(), headers=headers, resource=server.resource)
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert set(body) == {"access_token", "token_type", "expires_in", "scope"}
            assert (body["token_type"], body["expires_in"], body["scope"]) == ("Bearer", 300, "read write")
            token = await server.provider.verify_token(body["access_token"])
            assert token is not None
            assert (token.subject, token.client_id, token.resource) == ("ada@example.com", CLIENT_ID, server.resource)
            assert (await server.mcp(body["access_token"])).status_code not in (401, 403)
            assert await office.kinds() == [ACCESS, ASSERTION]
            with turned(301):
                assert (await server.mcp(body["access_token"])).status_code == 401
            assert not is_refused(await office.ask(office.assertion(), headers=headers))
            assert company.requests == ["/.well-known/openid-configuration", "/keys"]

    async def test_an_issuer_without_discovery(self, company: Company) -> None:
        """The owner may name the keys."""
        settings = company.settings(
            jwks_uris={company.issuer: f"{company.issuer}/keys"}, access_token_expiry_seconds=60
        )
        async with running(identity_assertion=settings) as server:
            await server.provider.register_client(assistant())
            office = Office(server, company)
            assert (await office.ask(office.assertion())).json()["expires_in"] == 60
            assert company.requests == ["/keys"]

    async def test_the_metadata_say_so(self, office: Office) -> None:
        """The grant and its profile are listed where it is on, and nowhere else."""
        metadata = (await office.server.http.get("/.well-known/oauth-authorization-server")).json()
        assert JWT_BEARER_GRANT_TYPE in metadata["grant_types_supported"]
        assert metadata["authorization_grant_profiles_supported"] == [ID_JAG_GRANT_PROFILE]
        async with running() as server:
            metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
            assert JWT_BEARER_GRANT_TYPE not in metadata["grant_types_supported"]
            assert "authorization_grant_profiles_supported" not in metadata
            await server.provider.register_client(assistant())
            answer = await Office(server, office.company).ask(office.assertion())
            assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_grant_type")
            with pytest.raises(TokenError) as refused:
                await server.provider.exchange_identity_assertion(assistant(), IdentityAssertionParams(assertion="x"))
            assert refused.value.error == "unsupported_grant_type"

    async def test_a_client_that_is_only_registered_is_kept(self, company: Company) -> None:
        """An app that has a code flow too is not purged as one that nobody approved."""
        async with running(identity_assertion=company.settings()) as server:
            grants = ["authorization_code", "refresh_token", JWT_BEARER_GRANT_TYPE]
            await server.provider.register_client(assistant(grant_types=grants, redirect_uris=[AnyUrl(REDIRECT_URI)]))
            assert [row[0] for row in await rows_of(server.provider, select(Client.last_used_at))] == [None]
            await Office(server, company).token()
            assert [row[0] for row in await rows_of(server.provider, select(Client.last_used_at))] != [None]


def another_type(office: Office) -> str:
    return office.company.sign(office.claims(), typ="JWT")


def no_type(office: Office) -> str:
    return office.company.sign(office.claims(), typ=None)


def another_key(office: Office) -> str:
    return office.company.sign(office.claims(), Signer("RS256", kid=office.company.signer.kid))


def no_signature(office: Office) -> str:
    return unsigned(office.claims(), signature="x")


def nonsense(_: Office) -> str:
    return "nonsense"


def nested(_: Office) -> str:
    return ".".join(["W1tb" * 4000, "e30", "x"])  # of brackets


def too_long(office: Office) -> str:
    return office.assertion(padding="x" * IDENTITY_BYTES)


def claiming(**claims: Any) -> Callable[[Office], str]:
    """An assertion with these changes. None leaves one out."""
    return lambda office: office.assertion(
        **{name: claim() if callable(claim) else claim for name, claim in claims.items()}
    )


REFUSED = {
    "another type": another_type,
    "no type": no_type,
    "another key": another_key,
    "no signature": no_signature,
    "nonsense": nonsense,
    "nested": nested,
    "too long": too_long,
    "aud": claiming(aud="https://other.example"),
    "iss": claiming(iss="https://other.example"),
    "client_id": claiming(client_id="another"),
    "no client_id": claiming(client_id=None),
    "resource": claiming(resource="https://other.example/mcp"),
    "no resource": claiming(resource=None),
    "expired": claiming(exp=away(-1), iat=away(-60)),
    "exp too far": claiming(exp=away(301)),
    "no exp": claiming(exp=None),
    "exp is NaN": claiming(exp=float("nan"), iat=None),
    "exp is infinite": claiming(exp=float("inf"), iat=None),
    "no jti": claiming(jti=None),
    "no sub": claiming(sub=None),
    "sub with a NUL": claiming(sub="ada\0"),
    "sub is a number": claiming(sub=1),
    "sub too long": claiming(sub="a" * 256),
}


class TestRefused:
    """What gets no token."""

    @pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
    async def test_an_assertion(self, office: Office, make: Callable[[Office], str], caplog: Any) -> None:
        """One text for all reasons; the log has the reason, and not the assertion. No row is left."""
        assertion = make(office)
        assert is_refused(await office.ask(assertion))
        (line,) = [record.getMessage() for record in caplog.records if record.name == "oauth_store"]
        assert line.startswith(f"identity assertion of the client {CLIENT_ID} refused: ")
        assert assertion not in caplog.text
        assert await office.kinds() == []
        assert not is_refused(await office.ask(office.assertion()))

    @pytest.mark.parametrize(
        ("form", "status", "error"),
        [
            ({"client_secret": "wrong"}, 401, "invalid_client"),
            ({"client_secret": ""}, 401, "invalid_client"),
            ({"client_id": "unknown"}, 401, "invalid_client"),
            ({"assertion": ""}, 400, "invalid_request"),
            ({"resource": "https://other.example/mcp"}, 400, "invalid_target"),
            ({"scope": "admin"}, 400, "invalid_scope"),
        ],
    )
    async def test_a_request(self, office: Office, form: dict[str, str], status: int, error: str) -> None:
        """Each mistake has its code, and uses up nothing: the same assertion works without it."""
        assertion = office.assertion()
        answer = await office.ask(assertion, **form)
        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert await office.kinds() == []
        assert not is_refused(await office.ask(assertion))

    @pytest.mark.parametrize(
        "metadata",
        [{"token_endpoint_auth_method": "none", "client_secret": None}, {"grant_types": ["authorization_code"]}],
        ids=["public", "without the grant"],
    )
    async def test_a_client(self, company: Company, metadata: dict[str, Any]) -> None:
        """A public client, and one that did not register for the grant."""
        async with running(identity_assertion=company.settings()) as server:
            grants = ["authorization_code", JWT_BEARER_GRANT_TYPE]
            values = {"grant_types": grants, "redirect_uris": [AnyUrl(REDIRECT_URI)], **metadata}
            await server.provider.register_client(assistant(**values))
            office = Office(server, company)
            form = {} if "client_secret" in metadata else {"client_secret": SECRET}
            values = {"grant_type": JWT_BEARER_GRANT_TYPE, "assertion": office.assertion(), "client_id": CLIENT_ID}
            answer = await server.http.post("/token", data=values | form)
            assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")
            assert company.requests == []

    async def test_an_identity_provider_that_is_down(self) -> None:
        """Nobody comes in on its word, and the request ends."""
        company = Company()
        async with running(identity_assertion=company.settings()) as server:
            await server.provider.register_client(assistant())
            office = Office(server, company)
            assert is_refused(await office.ask(office.assertion()))

    async def test_it_cannot_sign_in_with_a_browser(self, office: Office) -> None:
        """The client has no redirect URI, and no other grant."""
        answer = await office.server.http.get("/authorize", params={"client_id": CLIENT_ID, "response_type": "code"})
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")


class TestScopes:
    """What the assertion gives, the server has and the client may have."""

    @pytest.mark.parametrize(
        ("asserted", "asked", "own", "granted"),
        [
            ("read write", "", None, "read write"),
            ("read write", "write", None, "write"),
            ("read", "read admin", None, "read"),
            ("read mail", "", None, "read"),
            ("read write", "", "write", "write"),
            ("read write offline_access", "", None, "read write"),
            ("", "", None, None),
            (None, "", None, None),
        ],
    )
    async def test_they_are_narrowed(
        self, company: Company, asserted: str | None, asked: str, own: str | None, granted: str | None
    ) -> None:
        """By the server's list, by what the owner named for the client, and by the request: never widened."""
        async with running(client_registration_options=OPTIONS, identity_assertion=company.settings()) as server:
            await server.provider.register_client(assistant(scope=own))
            office = Office(server, company)
            answer = await office.ask(office.assertion(scope=asserted), scope=asked)
            assert answer.json().get("scope") == granted

    @pytest.mark.parametrize(("asserted", "asked"), [("mail", ""), ("read", "write"), ("", "read")])
    async def test_none_is_left(self, office: Office, asserted: str, asked: str) -> None:
        """A token without any of them is none."""
        answer = await office.ask(office.assertion(scope=asserted), scope=asked)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
        assert await office.kinds() == []

    async def test_a_server_without_a_list(self, company: Company) -> None:
        """It has those that are asserted; scp is another name of the claim, and a word that is no scope is dropped."""
        async with running(identity_assertion=company.settings()) as server:
            await server.provider.register_client(assistant())
            office = Office(server, company)
            answer = await office.ask(office.assertion(scope=None, scp=["read", "no scope", "write"]))
            assert answer.json()["scope"] == "read write"

    @pytest.mark.parametrize("by", ["server", "setting"])
    async def test_a_required_one(self, company: Company, by: str) -> None:
        """Without it the assertion is refused, and a request cannot leave it out."""
        required = ["write"] if by == "setting" else None
        settings: dict[str, Any] = {"required_scopes": ["write"]} if by == "server" else {}
        async with running(identity_assertion=company.settings(required_scopes=required), **settings) as server:
            await server.provider.register_client(assistant())
            office = Office(server, company)
            assert is_refused(await office.ask(office.assertion(scope="read")))
            assert is_refused(await office.ask(office.assertion(scope="")))
            answer = await office.ask(office.assertion(scope="read write admin"), scope="read")
            assert answer.json()["scope"] == "read write"


class TestOnce:
    """An assertion is good once."""

    async def test_a_second_time(self, office: Office) -> None:
        """Of the same issuer; another issuer may use the same jti."""
        assertion = office.assertion(jti="one")
        assert not is_refused(await office.ask(assertion))
        assert is_refused(await office.ask(assertion))
        assert is_refused(await office.ask(office.assertion(jti="one", sub="bob")))
        assert await office.kinds() == [ACCESS, ASSERTION]
        (row,) = [row for row in await tokens_of(office.server.provider) if row.kind == ASSERTION]
        assert 120 <= row.expires_at - time.time() <= 151

    async def test_two_issuers_may_choose_the_same_jti(self, company: Company) -> None:
        """It is the issuer's own."""
        async with Company().open() as other:
            settings = company.settings().model_copy(update={"trusted_issuers": [company.issuer, other.issuer]})
            async with running(identity_assertion=settings) as server:
                await server.provider.register_client(assistant())
                for issuer in (company, other):
                    office = Office(server, issuer)
                    assert not is_refused(await office.ask(office.assertion(jti="one")))

    async def test_at_two_processes(self, database_url: str, company: Company) -> None:
        """Of twenty requests at once at two processes, and of one more in turn, one succeeds."""
        async with provider_on(database_url) as provider:
            await provider.register_client(assistant())
        form = {"grant_type": JWT_BEARER_GRANT_TYPE, "client_id": CLIENT_ID, "client_secret": SECRET}
        form["assertion"] = company.sign(company.claims(BASE_URL, RESOURCE))
        job = (send_to_enterprise, company.settings(), [form] * 10)
        async with Processes(2) as processes:
            answers = await processes.run(database_url, job, job)
        outcomes = [answer if isinstance(answer, str) else "token" for some in answers for answer in some]
        assert sorted(outcomes) == ["invalid_grant"] * 19 + ["token"]
        async with Processes(1) as processes:
            assert await processes.run(database_url, (send_to_enterprise, company.settings(), [form])) == [
                ["invalid_grant"]
            ]
        async with provider_on(database_url) as provider:
            assert sorted(row.kind for row in await tokens_of(provider)) == [ACCESS, ASSERTION]


class TestKeyClients:
    """A client that the owner added with a key."""

    @pytest.mark.parametrize("overridden", [False, True])
    async def test_both_assertions_are_good_once(self, company: Company, overridden: bool) -> None:
        """Its own is used up with the user's, in one transaction: a request that fails uses neither."""
        kind = Overriding if overridden else SQLAlchemyOAuthProvider
        async with running(kind=kind, identity_assertion=company.settings()) as server:
            signer = Signer()
            keys = {"keys": [signer.whole]}
            client = assistant(client_secret=None, token_endpoint_auth_method="private_key_jwt", jwks=keys)
            await server.provider.register_client(client)
            [stored] = await rows_of(server.provider, "SELECT client_metadata FROM oauth_clients")
            assert '"d"' not in stored.client_metadata  # its owner has published too much
            office = Office(server, company)

            def form(jti: str) -> dict[str, str]:
                claims = claims_of(CLIENT_ID, str(server.http.base_url.join("/token")), jti=jti)
                return {"client_secret": "", **asserting(signer.sign(claims))}

            user = office.assertion()
            assert is_refused(await office.ask(office.assertion(client_id="another"), **form("one")))
            assert await office.kinds() == []
            assert (await office.ask(user, **form("one"))).status_code == 200
            assert await office.kinds() == ([ASSERTION] if overridden else [ACCESS, ASSERTION, ASSERTION])
            again = await office.ask(office.assertion(), **form("one"))
            assert (again.status_code, again.json()["error"]) == (401, "invalid_client")
            without = await office.ask(user, client_secret="")
            assert (without.status_code, without.json()["error"]) == (401, "invalid_client")

    async def test_a_document_is_not_enough(self, host: DocumentHost, company: Company) -> None:
        """A client that nobody added, however its document describes it, presents no user."""
        async with running(identity_assertion=company.settings()) as server:
            signer = Signer()
            host.describe(
                token_endpoint_auth_method="private_key_jwt",
                jwks={"keys": [signer.public]},
                grant_types=["authorization_code", JWT_BEARER_GRANT_TYPE],
            )
            await server.code(host.client_id)
            office = Office(server, company)
            claims = claims_of(host.client_id, str(server.http.base_url.join("/token")))
            form = {"client_id": host.client_id, "client_secret": "", **asserting(signer.sign(claims))}
            answer = await office.ask(office.assertion(client_id=host.client_id), **form)
            assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")
            assert company.requests == []

    async def test_an_application_that_copies_the_request(self, company: Company) -> None:
        """A subclass may narrow it by a copy: the client's own assertion is used up once."""

        class Narrows(SQLAlchemyOAuthProvider):
            async def exchange_identity_assertion(
                self, client: OAuthClientInformationFull, params: IdentityAssertionParams
            ) -> OAuthToken:
                narrowed = params.model_copy(update={"scopes": ["read"]})
                return await super().exchange_identity_assertion(client, narrowed)

        async with running(kind=Narrows, identity_assertion=company.settings()) as server:
            signer = Signer()
            keys = {"keys": [signer.public]}
            client = assistant(client_secret=None, token_endpoint_auth_method="private_key_jwt", jwks=keys)
            await server.provider.register_client(client)
            office = Office(server, company)
            claims = claims_of(CLIENT_ID, str(server.http.base_url.join("/token")))
            answer = await office.ask(office.assertion(), client_secret="", **asserting(signer.sign(claims)))
            assert answer.json()["scope"] == "read"

    async def test_times_that_are_none(self, company: Company) -> None:
        """NaN, with which every comparison is false, and a resource that is no URL give no token, and no 500."""
        async with running(identity_assertion=company.settings()) as server:
            await server.provider.register_client(assistant())
            office = Office(server, company)
            for changed in ({"iat": float("nan"), "exp": time.time() + 10**8}, {"resource": "http://[::1"}):
                assert is_refused(await office.ask(office.assertion(**changed)))
            assert await office.kinds() == []


asked: list[tuple[str | None, IdentityAssertionParams]] = []


class Overriding(SQLAlchemyOAuthProvider):
    """An application that decides by itself, and notes what it was asked."""

    async def exchange_identity_assertion(
        self, client: OAuthClientInformationFull, params: IdentityAssertionParams
    ) -> OAuthToken:
        asked.append((client.client_id, params))
        if decode_jwt_payload(params.assertion)["client_id"] != client.client_id:
            raise TokenError("invalid_grant", "the identity assertion is not valid")
        return OAuthToken(access_token="its own", expires_in=1)


class TestOverridden:
    """A subclass that implements the SDK's method."""

    async def test_it_is_asked(self, company: Company) -> None:
        """Without any setting: the grant is on, and the method gets the client and what the request says."""
        asked.clear()
        async with running(kind=Overriding) as server:
            await server.provider.register_client(assistant())
            metadata = (await server.http.get("/.well-known/oauth-authorization-server")).json()
            assert metadata["authorization_grant_profiles_supported"] == [ID_JAG_GRANT_PROFILE]
            office = Office(server, company)
            assertion = office.assertion()
            answer = await office.ask(assertion, scope="read write", resource=server.resource)
            assert answer.json() == {"access_token": "its own", "token_type": "Bearer", "expires_in": 1}
            (client_id, params), *others = asked
            assert not others
            assert (client_id, params.assertion, params.scopes) == (CLIENT_ID, assertion, ["read", "write"])
            assert params.resource == server.resource
            assert (await office.ask(assertion, client_secret="wrong")).status_code == 401
            assert len(asked) == 1


class TestOwner:
    """What the owner sees and does."""

    async def test_it_is_a_grant_as_all_others(self, office: Office) -> None:
        """It is listed under its user, explained, and ended with the user's others or by the client."""
        provider, now = office.server.provider, int(time.time())
        store = provider._store
        tokens = [await office.token(sub=user) for user in ("ada", "ada", "bob")]
        (grant, _), total = await store.read(live_grants, subject="ada")
        assert (total, grant.client_name, grant.scopes) == (2, "Assistant", ("read", "write"))
        assert 0 < grant.expires_at - now <= 301
        about = await store.read(explain, tokens[0], now)
        assert (about.state, about.subject, about.grant_live) == ("live", "ada", True)
        assert len(await store.write(end_all, "ada", [office.server.resource], by="ada", now=now)) == 2
        assert [(await office.server.mcp(token)).status_code == 401 for token in tokens] == [True, True, False]
        about = await store.read(explain, tokens[0], now)
        assert (about.state, "new assertion of the identity provider" in about.advice) == ("revoked", True)
        about = await store.read(explain, tokens[2], now + 301)
        assert (about.state, about.advice) == ("expired", "No action is needed.")
        assert "new assertion of the identity provider" in about.text
        form = {"client_id": CLIENT_ID, "client_secret": SECRET, "token": tokens[2]}
        assert (await office.server.http.post("/revoke", data=form)).status_code == 200
        assert (await office.server.mcp(tokens[2])).status_code == 401
        await store.write(remove_client, CLIENT_ID, "the test", now)
        assert await office.kinds() == []

    @pytest.mark.parametrize(
        "metadata",
        [
            {"client_secret": None},
            {"token_endpoint_auth_method": "none"},
            {"redirect_uris": [AnyUrl(REDIRECT_URI)]},
            {"client_secret": None, "token_endpoint_auth_method": "private_key_jwt"},
            {"token_endpoint_auth_method": "private_key_jwt", "jwks": {"keys": []}, "client_secret": None},
        ],
    )
    async def test_what_is_no_such_client(self, provider: SQLAlchemyOAuthProvider, metadata: dict[str, Any]) -> None:
        """It needs a secret or keys, and has no redirect URI."""
        with pytest.raises(RegistrationError):
            await provider.register_client(assistant(**metadata))

    async def test_a_client_with_keys_needs_no_secret(self, provider: SQLAlchemyOAuthProvider) -> None:
        """The owner's own code registers its keys."""
        keys = {"keys": [Signer().public]}
        await provider.register_client(
            assistant(client_secret=None, token_endpoint_auth_method="private_key_jwt", jwks=keys)
        )
        assert (await provider.get_client(CLIENT_ID)) is not None

    async def test_a_registration_cannot_name_the_grant(self, office: Office) -> None:
        """The SDK refuses it."""
        body = {"redirect_uris": [REDIRECT_URI], "grant_types": ["authorization_code", JWT_BEARER_GRANT_TYPE]}
        answer = await office.server.http.post("/register", json=body)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")

    async def test_the_command(self, database_url: str, company: Company) -> None:
        """The owner adds it by hand, under the id that the identity provider knows; no id is given twice."""
        added = ("clients", "add", "Assistant", "--identity-assertion", "--client-id", "okta-0oa1", "--scopes", "read")
        reply = await asyncio.to_thread(run_json, *added, database=database_url)
        assert (reply["client_id"], reply["redirect_uris"], reply["scopes"]) == ("okta-0oa1", [], ["read"])
        async with running(database_url, identity_assertion=company.settings()) as server:
            office = Office(server, company)
            assertion = office.assertion(client_id="okta-0oa1")
            answer = await office.ask(assertion, client_id="okta-0oa1", client_secret=reply["client_secret"])
            assert answer.json()["scope"] == "read"
        refused = await asyncio.to_thread(run, *added, database=database_url)
        assert refused.returncode == 1
        assert "exists" in refused.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--identity-assertion", "--machine"),
            ("--identity-assertion", "--redirect-uri", REDIRECT_URI),
            ("--identity-assertion", "--auth-method", "none"),
            ("--machine", "--client-id", "x"),
            ("--identity-assertion", "--client-id", "https://app.example.com/client.json"),
            ("--identity-assertion", "--client-id", "two words"),
            ("--identity-assertion", "--client-id", "token-" + "0" * 32),
        ],
    )
    def test_the_command_refuses(self, tmp_path: Any, arguments: tuple[str, ...]) -> None:
        """What contradicts itself, and an id that means something else."""
        done = run("clients", "add", "X", *arguments, database=str(tmp_path / "oauth.db"))
        assert done.returncode in (1, 2)
        assert done.stderr
        assert not (tmp_path / "oauth.db").exists()
