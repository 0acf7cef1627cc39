"""Machines: client credentials (RFC 6749, section 4.4), for confidential clients that the owner added by hand."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import RegistrationError, TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import func, select

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.models import ACCESS, REFRESH, Client, Token, is_live
from oauth_store.database.purge import purge
from oauth_store.flows import machine as machines
from oauth_store.flows.clients import OwnersClient
from oauth_store.flows.connected import LiveGrant, end_all, live_grants
from oauth_store.flows.explain import explain
from oauth_store.flows.machine import PresentedSecret
from oauth_store.flows.registered import remove_client
from oauth_store.flows.scopes import change_scopes
from tests.clocks import Clock
from tests.commands import run, run_json
from tests.databases import rows_of, tokens_of, transaction, value_of
from tests.endpoints import Server, basic, running
from tests.steps import (
    REDIRECT_URI,
    Provider,
    authorization_request,
    new_client,
    registration_options,
    token_request,
)
from tests.workers import Processes, machine_until_refused, settle

SECRET = "the-secret-of-the-machine"
HOUR, DAY = 3600, 24 * 3600
OPTIONS = registration_options("read", "write", "admin")


def a_machine(**metadata: Any) -> OAuthClientInformationFull:
    """A machine as the owner's own code registers it."""
    values = {
        "client_id": "nightly",
        "client_name": "Nightly job",
        "client_secret": SECRET,
        "token_endpoint_auth_method": "client_secret_post",
        "grant_types": ["client_credentials"],
        "scope": "read write",
    }
    return OAuthClientInformationFull.model_validate({**values, **metadata})


@pytest.fixture
async def served(database_url: str) -> AsyncIterator[Server]:
    """A server with three scopes, over HTTP, that knows a machine with two of them."""
    async with running(database_url, client_registration_options=OPTIONS) as server:
        await server.provider.register_client(a_machine())
        yield server


@pytest.fixture
async def owner(make_provider: Provider) -> SQLAlchemyOAuthProvider:
    """A provider with three scopes that knows a machine with two of them."""
    provider = make_provider(client_registration_options=OPTIONS)
    await provider.register_client(a_machine())
    return provider


async def ask(server: Server, **form: str) -> httpx2.Response:
    """The response of /token to the machine."""
    values = {"grant_type": "client_credentials", "client_id": "nightly", "client_secret": SECRET}
    return await server.http.post("/token", data=values | form)


async def a_token(server: Server, **form: str) -> str:
    """An access token of the machine."""
    answer = await ask(server, **form)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


async def fetch(provider: SQLAlchemyOAuthProvider, scope: str = "", **other: Any) -> OAuthToken:
    """The machine's tokens, without HTTP."""
    return await machines.grant(provider.issuer, PresentedSecret("nightly", SECRET, scope, **other))


async def grants_of(provider: SQLAlchemyOAuthProvider) -> list[LiveGrant]:
    """The live grants, as the owner sees them."""
    await settle(provider)
    listed, _ = await provider._store.read(live_grants)
    return listed


async def change(provider: SQLAlchemyOAuthProvider, **choice: Any) -> None:
    """Change the scopes of the machine's grant, as its owner does."""
    (grant,) = await grants_of(provider)
    changed = await provider._store.write(change_scopes, grant.grant_id, by="the owner", now=int(time.time()), **choice)
    assert changed is not None


class TestToken:
    """The response of /token."""

    @pytest.mark.parametrize("method", ["client_secret_post", "client_secret_basic"])
    async def test_a_machine_added_on_the_command_line_calls(
        self, served: Server, database_url: str, method: str
    ) -> None:
        """Its secret gets it an access token without a refresh token, which the MCP endpoint accepts."""
        added = run_json(
            *("clients", "add", "Cron", "--machine", "--scopes", "read", "--auth-method", method), database=database_url
        )
        form = {"grant_type": "client_credentials", "resource": served.resource}
        headers = {}
        if method == "client_secret_basic":
            headers = basic(added["client_id"], added["client_secret"])
        else:
            form |= {"client_id": added["client_id"], "client_secret": added["client_secret"]}
        answer = await served.http.post("/token", data=form, headers=headers)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        token = answer.json()
        secret = token.pop("access_token")
        assert token == {"token_type": "Bearer", "expires_in": 3600, "scope": "read"}
        assert (await served.mcp(secret)).status_code == 200
        verified = await served.provider.verify_token(secret)
        assert verified is not None
        assert (verified.client_id, verified.subject, verified.scopes) == (added["client_id"], None, ["read"])
        assert verified.resource == served.resource

    @pytest.mark.parametrize("wrong", [{"client_secret": "wrong"}, {"client_secret": ""}, {"client_id": "Nightly"}])
    async def test_a_wrong_secret(self, served: Server, wrong: dict[str, str]) -> None:
        """A wrong or missing secret, or an unknown client, is invalid_client, and stores nothing."""
        answer = await ask(served, **wrong)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert await tokens_of(served.provider) == []

    @pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"token_endpoint_auth_method": "client_secret_post"},
            {"token_endpoint_auth_method": "client_secret_basic", "added_by_owner": True},
        ],
    )
    async def test_registration_never_makes_a_machine(self, served: Server, metadata: dict[str, Any]) -> None:
        """A registration that names client_credentials loses it, and the client is unauthorized_client at /token."""
        named = ["authorization_code", "client_credentials", "refresh_token"]
        registered = await served.register(grant_types=named, **metadata)
        assert registered["grant_types"] == ["authorization_code", "refresh_token"]
        answer = await ask(
            served, client_id=registered["client_id"], client_secret=registered.get("client_secret") or ""
        )
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")

    @pytest.mark.parametrize("uris", [[REDIRECT_URI], None])
    async def test_registration_for_nothing_else_is_refused(self, served: Server, uris: list[str] | None) -> None:
        """A registration for client_credentials alone is invalid_client_metadata, with redirect URIs or without."""
        metadata = {"redirect_uris": uris, "grant_types": ["client_credentials"], "client_name": "Job"}
        answer = await served.http.post("/register", json=metadata)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client_metadata")

    @pytest.mark.parametrize(
        "client",
        [
            new_client(client_secret=SECRET, token_endpoint_auth_method="client_secret_post"),
            new_client(grant_types=["authorization_code", "client_credentials"]),
            new_client(
                grant_types=["authorization_code", "client_credentials"],
                client_secret=SECRET,
                token_endpoint_auth_method="client_secret_post",
            ),
            OwnersClient.model_validate(
                new_client(client_secret=SECRET, token_endpoint_auth_method="client_secret_post").model_dump()
            ),
        ],
        ids=["confidential", "public", "both grants", "an app of the owner's"],
    )
    async def test_any_other_client(self, served: Server, client: OAuthClientInformationFull) -> None:
        """A client that the owner did not add as a machine is unauthorized_client, whatever its row says."""
        await served.provider.register_client(client)
        answer = await ask(served, client_id=client.client_id, client_secret=client.client_secret or "")
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")

    async def test_another_resource(self, served: Server) -> None:
        """A resource that is not this server is invalid_target (RFC 8707, section 2.2)."""
        answer = await ask(served, resource="https://other.example.com/mcp")
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_target")

    async def test_its_token_in_any_other_place(self, served: Server) -> None:
        """A machine's token is neither a code nor a refresh token, of the machine or of another client."""
        token = await a_token(served)
        app = (await served.register())["client_id"]
        machine = {"client_id": "nightly", "client_secret": SECRET}
        for client, error in ((machine, "unauthorized_client"), ({"client_id": app}, "invalid_grant")):
            for form in (
                token_request(token, "v" * 43, **client),
                {"grant_type": "refresh_token", "refresh_token": token, **client},
            ):
                answer = await served.http.post("/token", data=form)
                assert answer.json()["error"] == error
        assert (await served.http.post("/revoke", data={"client_id": app, "token": token})).status_code == 200
        assert (await served.mcp(token)).status_code == 200

    @pytest.mark.parametrize("accept", ["application/json", "text/html"])
    async def test_it_cannot_authorize(self, served: Server, accept: str) -> None:
        """At /authorize a machine is unauthorized_client, or a page that says so; nothing is stored or redirected."""
        request = authorization_request("nightly")
        answer = await served.http.get("/authorize", params=request, headers={"accept": accept})
        assert answer.status_code == 400
        if accept == "text/html":
            assert "This app cannot sign in here" in answer.text
        else:
            assert answer.json()["error"] == "unauthorized_client"
        assert await value_of(served.provider, "SELECT count(*) FROM oauth_codes") == 0

    async def test_nothing_usable_is_stored(self, owner: SQLAlchemyOAuthProvider) -> None:
        """Neither the secret nor the token is in any row, and no secret opens the row that keeps the grant's scopes."""
        token = await fetch(owner)
        rows = await tokens_of(owner)
        assert sorted(row.kind for row in rows) == [ACCESS, REFRESH]
        stored = repr([*rows, *await rows_of(owner, select(Client.__table__))])
        assert token.access_token not in stored
        assert SECRET not in stored

    async def test_event(self, owner: SQLAlchemyOAuthProvider, caplog: pytest.LogCaptureFixture) -> None:
        """Each token is a `tokens_issued` event with its grant and client, and without a secret."""
        caplog.set_level("INFO", "oauth_store")
        token = await fetch(owner)
        (grant,) = await grants_of(owner)
        (event,) = [vars(record) for record in caplog.records if getattr(record, "event", "") == "tokens_issued"]
        assert (event["grant_id"], event["client_id"]) == (grant.grant_id.hex(), "nightly")
        assert token.access_token not in caplog.text
        assert SECRET not in caplog.text


class TestScopes:
    """What a token may do (RFC 6749, section 3.3)."""

    @pytest.mark.parametrize(
        ("asked", "granted"),
        [
            ("", "read write"),
            ("read", "read"),
            ("read write admin", "read write"),
            ("read offline_access", "read"),
            ("offline_access", "read write"),
            ("admin", None),
            ("nonsense", None),
        ],
    )
    async def test_what_a_machine_asks_for(self, served: Server, asked: str, granted: str | None) -> None:
        """It gets what it asks for, of what the owner named for it; if that is nothing, the error is invalid_scope."""
        answer = await ask(served, scope=asked)
        if granted is None:
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
            assert await grants_of(served.provider) == []
        else:
            assert answer.json()["scope"] == granted

    async def test_required_scopes(self, make_provider: Provider) -> None:
        """Every token has the scopes that the server requires, also where the machine names others."""
        provider = make_provider(client_registration_options=OPTIONS, required_scopes=["admin"])
        await provider.register_client(a_machine())
        assert (await fetch(provider)).scope == "read write admin"
        assert (await fetch(provider, "read")).scope == "read admin"

    async def test_without_a_choice_of_the_owner(self, make_provider: Provider) -> None:
        """A machine for which the owner names no scope has those of the server."""
        provider = make_provider(client_registration_options=OPTIONS)
        await provider.register_client(a_machine(scope=None))
        assert (await fetch(provider)).scope == "read write admin"

    async def test_a_server_without_scopes(self, make_provider: Provider) -> None:
        """A token without scopes is one where the server has none."""
        provider = make_provider()
        await provider.register_client(a_machine(scope=None))
        assert (await fetch(provider)).scope is None

    async def test_a_machine_narrows_its_token_alone(self, owner: SQLAlchemyOAuthProvider) -> None:
        """The grant keeps its scopes: the owner sees them all, and the next token has them."""
        assert (await fetch(owner, "read")).scope == "read"
        (grant,) = await grants_of(owner)
        assert grant.scopes == ("read", "write")
        assert (await fetch(owner)).scope == "read write"

    async def test_the_owner_s_narrowing_holds(self, owner: SQLAlchemyOAuthProvider, clock: Clock) -> None:
        """A scope that the owner removed is gone from the live token and from later ones, also a week later."""
        token = await fetch(owner)
        await change(owner, remove=["write"])
        verified = await owner.verify_token(token.access_token)
        assert verified is not None
        assert verified.scopes == ["read"]
        for later in (0, 2 * HOUR, 7 * DAY):
            clock.shift(later)
            assert (await fetch(owner, "read write")).scope == "read"
            with pytest.raises(TokenError) as refused:
                await fetch(owner, "write")
            assert refused.value.error == "invalid_scope"
        await change(owner, add=["write"])
        assert (await fetch(owner)).scope == "read write"

    async def test_never_more_than_the_owner_named(self, owner: SQLAlchemyOAuthProvider) -> None:
        """A machine that is registered anew with fewer scopes loses the others at its next token."""
        await fetch(owner)
        await owner.register_client(a_machine(scope="read"))
        assert (await fetch(owner)).scope == "read"


class TestGrant:
    """All tokens of a machine at a server belong to one grant."""

    async def test_one_line(self, served: Server, database_url: str) -> None:
        """`grants` and `clients` show a machine once, without a host or a subject."""
        for _ in range(3):
            await a_token(served)
        (grant,) = run_json("grants", database=database_url)["grants"]
        assert (grant["client_name"], grant["hosts"], grant["subject"]) == ("Nightly job", [], None)
        assert grant["scopes"] == ["read", "write"]
        (client,) = run_json("clients", database=database_url)["clients"]
        assert (client["live_grants"], client["hosts"], client["confidential"]) == (1, [], True)
        for command, cells in (
            ("grants", ["Nightly job", "-", "read write"]),
            ("clients", ["Nightly job", "-", "yes"]),
        ):
            line = run(command, database=database_url).stdout.splitlines()[2]
            assert line.split("   ")[1:4] == cells or all(f" {cell} " in line for cell in cells)

    async def test_the_owner_changes_it(self, served: Server, database_url: str) -> None:
        """`oauth-store scopes` removes a scope from a machine's grant, and the next token does not have it."""
        await a_token(served)
        (grant,) = await grants_of(served.provider)
        changed = run_json("scopes", grant.grant_id.hex(), "--remove", "write", "--yes", database=database_url)
        assert (changed["scopes"], changed["removed"]) == (["read"], ["write"])
        assert (await ask(served)).json()["scope"] == "read"

    async def test_it_is_continued(self, owner: SQLAlchemyOAuthProvider, clock: Clock) -> None:
        """A token of a later night continues the grant, even if the last one has expired and is purged."""
        await fetch(owner)
        (first,) = await grants_of(owner)
        for _ in range(3):
            clock.shift(20 * DAY)
            async with transaction(owner) as session:
                await session.run_sync(purge, int(time.time()))
            await fetch(owner)
        (grant,) = await grants_of(owner)
        now = int(time.time())
        assert (grant.grant_id, grant.granted_at) == (first.grant_id, first.granted_at)
        assert (grant.last_used_at, grant.expires_at) == (now, now + 30 * DAY)
        clock.shift(31 * DAY)
        assert await grants_of(owner) == []
        await fetch(owner)
        (grant,) = await grants_of(owner)
        assert grant.grant_id != first.grant_id

    async def test_a_machine_is_never_purged(self, owner: SQLAlchemyOAuthProvider) -> None:
        """A machine stays, whether or not it has ever asked for a token, also one that replaced a registration."""
        await owner.register_client(new_client(client_id="later", scope="read"))
        await owner.register_client(a_machine(client_id="later"))
        async with transaction(owner) as session:
            purged = await session.run_sync(purge, int(time.time()) + 400 * DAY)
        assert purged["clients"] == 0

    async def test_revoked(self, served: Server, database_url: str) -> None:
        """`revoke` ends every token at the next call; the machine may get a new one, in a new grant."""
        tokens = [await a_token(served) for _ in range(3)]
        (before,) = await grants_of(served.provider)
        assert run("revoke", before.grant_id.hex(), "--yes", database=database_url).stdout == "Revoked 1 grant.\n"
        for token in tokens:
            assert (await served.mcp(token)).status_code == 401
        assert (await served.mcp(await a_token(served))).status_code == 200
        (grant,) = await grants_of(served.provider)
        assert grant.grant_id != before.grant_id

    async def test_removed(self, served: Server, database_url: str) -> None:
        """`clients remove` is the end: its tokens are refused, and its secret gets no other one."""
        token = await a_token(served)
        assert run("clients", "remove", "nightly", "--yes", database=database_url).returncode == 0
        assert (await served.mcp(token)).status_code == 401
        answer = await ask(served)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert await tokens_of(served.provider) == []

    async def test_a_machine_revokes_its_own(self, served: Server) -> None:
        """Any token of the machine ends its grant at /revoke (RFC 7009), and only with its secret."""
        first, second = await a_token(served), await a_token(served)
        form = {"client_id": "nightly", "token": first}
        assert (await served.http.post("/revoke", data=form)).status_code == 401
        assert (await served.http.post("/revoke", data=form | {"client_secret": SECRET})).status_code == 200
        assert (await served.mcp(second)).status_code == 401

    async def test_two_servers_on_one_database(self, owner: SQLAlchemyOAuthProvider, make_provider: Provider) -> None:
        """Each has a grant of its own: a token of one is refused at the other, and each ends only its own."""
        other = make_provider(client_registration_options=OPTIONS, base_url="http://127.0.0.1:8001")
        here, there = await fetch(owner), await fetch(other)
        assert len(await grants_of(owner)) == 2
        assert await owner.verify_token(there.access_token) is None
        await owner._store.write(end_all, None, owner.issuer.known, by="the owner", now=int(time.time()))
        assert await owner.verify_token(here.access_token) is None
        assert await other.verify_token(there.access_token) is not None

    async def test_explained(self, owner: SQLAlchemyOAuthProvider, database_url: str, clock: Clock) -> None:
        """`explain` says for each of its tokens how the machine goes on."""
        token = (await fetch(owner)).access_token
        shown = run("explain", database=database_url, answer=token)
        assert "  Host:       -\n" in shown.stdout
        await settle(owner)
        clock.shift(2 * HOUR)
        async with transaction(owner) as session:
            expired = await session.run_sync(explain, token, int(time.time()))
        assert (expired.state, expired.grant_live) == ("expired", True)
        assert expired.text.endswith("Its client gets a new one with its secret.")
        token = (await fetch(owner)).access_token
        await owner._store.write(end_all, None, None, by="the owner", now=int(time.time()))
        async with transaction(owner) as session:
            revoked = await session.run_sync(explain, token, int(time.time()))
        assert revoked.state == "revoked"
        assert "`oauth-store clients remove`" in revoked.advice


class TestRegistration:
    """The owner's own code registers a machine with `register_client()`."""

    async def test_a_plain_client(self, owner: SQLAlchemyOAuthProvider) -> None:
        """It needs no redirect URI, and is stored as a client of the owner's, however often it is registered."""
        for _ in range(2):
            await owner.register_client(a_machine())
        (row,) = await rows_of(owner, select(Client.client_metadata, Client.last_used_at))
        metadata = json.loads(row.client_metadata)
        assert (metadata["added_by_owner"], row.last_used_at) == (True, 0)
        assert "redirect_uris" not in metadata

    @pytest.mark.parametrize(
        ("metadata", "error"),
        [
            ({"client_secret": None}, "needs a secret"),
            ({"token_endpoint_auth_method": "none"}, "needs a secret"),
            ({"redirect_uris": [REDIRECT_URI]}, "has no redirect URI"),
            ({"scope": "root"}, "scopes not valid here"),
            ({"scope": "x " * 101}, "more than 100 scopes"),
            ({"grant_types": ["authorization_code", "client_credentials"]}, "redirect_uris is missing"),
        ],
    )
    async def test_refused(self, owner: SQLAlchemyOAuthProvider, metadata: dict[str, Any], error: str) -> None:
        """Without a secret, with redirect URIs, or with scopes that the server lacks, it is refused."""
        with pytest.raises(RegistrationError) as refused:
            await owner.register_client(a_machine(client_id="other", **metadata))
        assert error in str(refused.value.error_description)


async def live_scopes(provider: SQLAlchemyOAuthProvider) -> set[str]:
    """What the machine's live access tokens may do."""
    live = is_live(int(time.time())) & (Token.kind == ACCESS)
    return {row.scopes for row in await rows_of(provider, select(Token.scopes).where(live))}


class TestAtTheSameMoment:
    """Several processes get tokens of one machine."""

    async def test_eight_first_tokens(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """Eight processes that ask at once for a first token get tokens of one grant."""
        await provider.register_client(a_machine())
        async with Processes(8) as processes:
            answers = await processes.run(database_url, *[(machine_until_refused, "nightly", SECRET, 3)] * 8)
        assert all(isinstance(answer, OAuthToken) for of_one in answers for answer in of_one)
        (grant,) = await grants_of(provider)
        assert {row.grant_id for row in await tokens_of(provider)} == {grant.grant_id}
        assert await value_of(provider, select(func.count()).where(Token.kind == ACCESS)) == 24
        assert await value_of(provider, select(func.count()).where(Token.kind == REFRESH)) == 1

    async def test_narrowing_wins(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """While eight processes get tokens, no live token has a scope once its removal is committed.

        After each revocation, the live tokens are those of one new grant; removed, the machine is refused everywhere.
        """
        await provider.register_client(a_machine())

        async def ten_more() -> None:
            issued = select(func.count()).where(Token.kind == ACCESS)
            before = await value_of(provider, issued)
            while await value_of(provider, issued) < before + 10:
                await settle(provider)

        async def own() -> None:
            for turn in range(8):
                await ten_more()
                await change(provider, remove=["write"])
                assert await live_scopes(provider) <= {"read"}
                await ten_more()
                assert await live_scopes(provider) <= {"read"}
                if turn % 2:
                    await change(provider, add=["write"])
                else:
                    await provider._store.write(end_all, None, None, by="the owner", now=int(time.time()))
                    await ten_more()
                    assert len(await grants_of(provider)) == 1

        async with Processes(8) as processes:
            job = (machine_until_refused, "nightly", SECRET)
            working = asyncio.create_task(processes.run(database_url, *[job] * 8))
            try:
                await own()
            finally:
                await provider._store.write(remove_client, "nightly", "the owner", int(time.time()))
            answers = await working
        assert {of_one[-1] for of_one in answers} == {"invalid_client"}
        assert await tokens_of(provider) == []

    async def test_a_change_that_is_under_way(self, owner: SQLAlchemyOAuthProvider) -> None:
        """A token that is asked for while the owner's change waits for its commit has the scopes of after it."""
        await fetch(owner)
        (grant,) = await grants_of(owner)
        async with transaction(owner) as session:
            await session.run_sync(
                change_scopes, grant.grant_id, remove=["write"], by="the owner", now=int(time.time())
            )
            asking = asyncio.create_task(fetch(owner))
            await asyncio.sleep(0.2)
            assert not asking.done()
        assert (await asking).scope == "read"

    async def test_a_machine_that_is_removed_meanwhile(self, owner: SQLAlchemyOAuthProvider) -> None:
        """It is refused like any unknown client, and leaves no row."""
        await fetch(owner)
        async with transaction(owner) as session:
            await session.run_sync(remove_client, "nightly", "the owner", int(time.time()))
            asking = asyncio.create_task(fetch(owner))
            await asyncio.sleep(0.2)
        with pytest.raises(AuthenticationError):
            await asking
        assert await tokens_of(owner) == []
