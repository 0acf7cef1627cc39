"""The scopes that the owner grants, and those that the owner changes afterwards on a live grant."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest
from mcp.server.auth.provider import AuthorizeError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.models import ACCESS, REFRESH, Token, is_live
from oauth_store.database.status import take_inventory
from oauth_store.flows import refresh as refresh_flow
from oauth_store.flows.clients import OwnersClient
from oauth_store.flows.connected import end_one
from oauth_store.flows.refresh import PresentedRefreshToken
from oauth_store.flows.scopes import ScopeChange, change_scopes, changes_of
from oauth_store.flows.tokens import Pair
from tests.approvals import Asks
from tests.clocks import Clock, turned
from tests.databases import grant_id_of, rows_of, tokens_of, transaction, value_of
from tests.steps import (
    Provider,
    authorization_params,
    new_client,
    query_of,
    redeem,
    refresh,
    registered,
    registration_options,
    sign_in,
)
from tests.workers import Processes, refresh_until_refused, settle

SERVER = {"client_registration_options": registration_options("read", "write", "admin")}


async def asked(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, *scopes: str) -> str:
    """The handle of a request for these scopes."""
    await provider.authorize(client, authorization_params(scopes=list(scopes)))
    assert isinstance(provider._approval, Asks)
    return provider._approval.handle


async def granted(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, handle: str, **choice: Any
) -> str | None:
    """The scopes in the token response, after an approval with this choice."""
    code = query_of(await provider.approve(handle, **choice))["code"]
    return (await redeem(provider, client, code)).scope


class TestApproval:
    """`approve(scopes=...)`: the owner decides, whatever the client asked for."""

    @pytest.fixture
    def provider(self, make_provider: Provider) -> SQLAlchemyOAuthProvider:
        """A server with three scopes, whose approval waits."""
        return make_provider(approval=Asks(), **SERVER)

    @pytest.mark.parametrize(
        ("scopes", "expected"),
        [
            (None, "read write"),
            (["read"], "read"),
            (["admin"], "admin"),
            (["admin", "write", "read"], "read write admin"),
        ],
    )
    async def test_the_choice_is_granted(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, scopes: Any, expected: str
    ) -> None:
        """Less or more than was asked for, and the token response names it (RFC 6749, sections 3.3 and 5.1)."""
        handle = await asked(provider, client, "read", "write")
        assert await granted(provider, client, handle, scopes=scopes) == expected

    async def test_a_required_scope_is_always_granted(self, make_provider: Provider) -> None:
        """A token without it would be refused by every request."""
        provider = make_provider(approval=Asks(), required_scopes=["read"], **SERVER)
        client = await registered(provider)
        assert await granted(provider, client, await asked(provider, client, "read", "write"), scopes=[]) == "read"

    async def test_offline_access_is_kept(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """It is no permission to choose."""
        handle = await asked(provider, client, "read", "write", "offline_access")
        assert await granted(provider, client, handle, scopes=["read"]) == "read offline_access"

    async def test_a_scope_that_the_server_does_not_have(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """It is refused, and the request still waits."""
        handle = await asked(provider, client, "read")
        with pytest.raises(AuthorizeError, match="cannot grant root"):
            await provider.approve(handle, scopes=["read", "root"])
        assert await granted(provider, client, handle) == "read"

    async def test_a_client_that_was_added_by_hand(self, provider: SQLAlchemyOAuthProvider) -> None:
        """It never gets more than its owner named for it."""
        client = OwnersClient.model_validate(new_client(scope="read write").model_dump())
        await provider.register_client(client)
        handle = await asked(provider, client, "read")
        with pytest.raises(AuthorizeError, match="cannot grant admin"):
            await provider.approve(handle, scopes=["read", "admin"])
        assert await granted(provider, client, handle, scopes=["read", "write"]) == "read write"


async def change(provider: SQLAlchemyOAuthProvider, token: OAuthToken, **choice: Any) -> ScopeChange | None:
    """Change the scopes of a token's grant."""
    choice = {"by": "the test", "now": int(time.time()), **choice}
    grant_id = await grant_id_of(provider, token)
    changed = await provider._store.write(change_scopes, grant_id, **choice)
    return None if changed is None else changed[1]


async def scopes_of(provider: SQLAlchemyOAuthProvider, token: OAuthToken) -> list[str] | None:
    """What a token may do at its next call."""
    verified = await provider.verify_token(token.access_token)
    return None if verified is None else verified.scopes


class TestChange:
    """The owner changes the scopes of a live grant."""

    async def test_it_counts_at_the_next_call(
        self, make_provider: Provider, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """A token that its client keeps loses a scope, gets it back, and gets a new one; in every process."""
        other = make_provider()
        token = await sign_in(provider, client)
        for choice, expected in (
            ({"remove": ["write"]}, ["read"]),
            ({"add": ["write"]}, ["read", "write"]),
            ({"add": ["admin"], "remove": ["read"]}, ["write", "admin"]),
            ({"add": ["read"], "remove": None}, ["read"]),
        ):
            for server in (provider, other):  # as often as it takes to be remembered
                for _ in range(3):
                    await scopes_of(server, token)
            await change(provider, token, **choice)
            for server in (provider, other):
                assert await scopes_of(server, token) == expected

    async def test_every_refresh_keeps_it(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """The next pairs have the scopes that the owner chose, and a client that asks for more gets no more."""
        token = await sign_in(provider, client)
        await change(provider, token, remove=["write"])
        for _ in range(3):
            token = await refresh(provider, client, token)
            assert token.scope == "read"
            assert await scopes_of(provider, token) == ["read"]
        presented = PresentedRefreshToken(client.client_id, str(token.refresh_token), scope="read write")
        assert (await refresh_flow.refresh(provider.issuer, presented)).scope == "read"

    @pytest.mark.parametrize(
        ("choice", "expected"), [({"remove": ["write"]}, "read"), ({"add": ["admin"]}, "read write admin")]
    )
    @pytest.mark.parametrize("rotations", [1, 3])
    async def test_a_repeated_refresh_has_the_scopes_of_now(
        self,
        provider: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        choice: dict[str, Any],
        expected: str,
        rotations: int,
    ) -> None:
        """A client whose answer was lost gets the pair that is live, with what the owner has chosen since."""
        first = token = await sign_in(provider, client)
        for _ in range(rotations):
            token = await refresh(provider, client, token)
        await change(provider, token, **choice)
        again = await refresh(provider, client, first)
        assert (again.access_token, again.scope) == (token.access_token, expected)

    async def test_a_client_s_own_narrowing_is_its_token_s(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """An access token that its client narrowed gets what is added, and not what the client left out."""
        token = await refresh(provider, client, await sign_in(provider, client), ["read"])
        await change(provider, token, add=["admin"])
        assert await scopes_of(provider, token) == ["read", "admin"]
        token = await refresh(provider, client, token)
        assert token.scope == "read write admin"

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ({"add": ["admin"]}, "read write admin"),
            ({"add": ["admin"], "remove": None}, "admin"),
            ({"remove": ["write"]}, "read"),
        ],
    )
    async def test_a_client_that_repeats_the_last_response(
        self,
        provider: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        choice: dict[str, Any],
        expected: str,
    ) -> None:
        """Where a client sends the scopes of its last token response, as mcp-remote does, the owner's choice stays.

        Also where the response to that refresh was lost; and once it has heard of a scope, it may leave it out.
        """
        first = await sign_in(provider, client)
        await change(provider, first, **choice)
        presented = PresentedRefreshToken(client.client_id, str(first.refresh_token), scope=str(first.scope))
        with turned(1):
            second = await refresh_flow.refresh(provider.issuer, presented)
            assert second.scope == expected
            assert await scopes_of(provider, second) == expected.split()
            again = await refresh_flow.refresh(provider.issuer, presented)
            assert (again.access_token, again.scope) == (second.access_token, expected)
            third = await refresh_flow.refresh(
                provider.issuer,
                PresentedRefreshToken(client.client_id, str(second.refresh_token), scope=expected.split()[0]),
            )
        assert third.scope == expected.split()[0]

    async def test_a_client_without_refresh_tokens(self, provider: SQLAlchemyOAuthProvider) -> None:
        """The grant's scopes are in its access token then."""
        client = await registered(provider, grant_types=["authorization_code"])
        token = await sign_in(provider, client)
        assert token.refresh_token is None
        changed = await change(provider, token, remove=["write"])
        assert changed is not None
        assert changed.removed == ("write",)
        assert await scopes_of(provider, token) == ["read"]

    async def test_another_user_or_server_changes_nothing(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """Nor does one who names a grant that has ended."""
        token = await sign_in(provider, client)
        assert await change(provider, token, remove=["write"], subject="eve") is None
        assert await change(provider, token, remove=["write"], resources=["https://other.example/mcp"]) is None
        assert await scopes_of(provider, token) == ["read", "write"]
        grant_id = await grant_id_of(provider, token)
        loaded = await provider.load_access_token(token.access_token)
        assert loaded is not None
        await provider.revoke_token(loaded)
        assert await provider._store.write(change_scopes, grant_id, remove=["write"], by="x", now=0) is None

    async def test_a_change_is_recorded(
        self,
        provider: SQLAlchemyOAuthProvider,
        client: OAuthClientInformationFull,
        caplog: pytest.LogCaptureFixture,
        clock: Clock,
    ) -> None:
        """What was added and removed, when and by whom; a choice that changes nothing leaves no record."""
        caplog.set_level(logging.INFO, "oauth_store")
        token = await sign_in(provider, client)
        grant_id = await grant_id_of(provider, token)
        await change(provider, token, remove=["write"], by="ada, on a page")
        await change(provider, token, remove=["write"], by="nobody")
        clock.shift(5)
        await change(provider, token, add=["admin", "write"], by="ada, on a page")
        now = int(time.time())
        assert await provider._store.read(changes_of, [grant_id]) == {
            grant_id: [
                ScopeChange((), ("write",), now - 5, "ada, on a page"),
                ScopeChange(("admin", "write"), (), now, "ada, on a page"),
            ]
        }
        events = [record for record in caplog.records if getattr(record, "event", "") == "scopes_changed"]
        assert [(record.__dict__.get("added"), record.__dict__.get("removed")) for record in events] == [
            (None, "write"),
            ("admin write", None),
        ]
        assert token.access_token not in caplog.text

    async def test_changes_of_one_second_keep_their_order(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """The last one is the last: the owner reads there whether the app still has a scope."""
        token = await sign_in(provider, client)
        grant_id = await grant_id_of(provider, token)
        now = int(time.time())
        for _ in range(4):
            await change(provider, token, remove=["write"], now=now)
            await change(provider, token, add=["write"], now=now)
        found = (await provider._store.read(changes_of, [grant_id]))[grant_id]
        assert [bool(of_grant.added) for of_grant in found] == [False, True] * 4

    async def test_the_record_is_no_live_token(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """`status` counts what the server accepts."""
        token = await sign_in(provider, client)
        await change(provider, token, remove=["write"])
        inventory = await provider._store.read(take_inventory, provider._store, int(time.time()))
        rows = inventory.tables["oauth_tokens"]
        assert (rows.rows, rows.live, rows.idle) == (3, 2, 1)

    async def test_a_change_that_fails_changes_nothing(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull
    ) -> None:
        """All rows of the grant change in one transaction."""
        token = await sign_in(provider, client)
        grant_id = await grant_id_of(provider, token)

        def failing(session: Session) -> None:
            change_scopes(session, grant_id, remove=["write"], by="x", now=0)
            session.execute(text("SELECT nonsense FROM nowhere"))

        with pytest.raises(Exception, match="nowhere"):
            await provider._store.write(failing)
        assert {(row.kind, row.scopes) for row in await tokens_of(provider)} == {
            (ACCESS, "read write"),
            (REFRESH, "read write"),
        }


async def live_scopes(provider: SQLAlchemyOAuthProvider, grant_id: bytes) -> set[str]:
    """What the live tokens of a grant may do."""
    live = is_live(int(time.time())) & Token.kind.in_((ACCESS, REFRESH))
    return {row.scopes for row in await rows_of(provider, select(Token.scopes).where(Token.grant_id == grant_id, live))}


class TestAtTheSameMoment:
    """Narrowing wins against a refresh that runs at the same moment, and no grant is lost."""

    async def test_a_refresh_that_has_read_the_scopes(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A refresh that read them before the change, and writes after it, begins again."""
        token = await sign_in(provider, client)
        grant_id = await grant_id_of(provider, token)
        may_write, has_read = threading.Event(), threading.Event()
        mint = Pair.mint

        def mint_late(*, with_refresh_token: bool) -> Pair:
            if not has_read.is_set():  # the first time
                has_read.set()
                if provider._store.sqlite:
                    may_write.wait(30)
                else:
                    await_only(asyncio.to_thread(may_write.wait, 30))
            return mint(with_refresh_token=with_refresh_token)

        monkeypatch.setattr(Pair, "mint", mint_late)
        refreshing = asyncio.create_task(refresh(provider, client, token))
        await asyncio.to_thread(has_read.wait, 30)
        async with transaction(provider) as session:
            await session.run_sync(change_scopes, grant_id, remove=["write"], by="x", now=int(time.time()))
        may_write.set()
        assert (await refreshing).scope == "read"
        assert await live_scopes(provider, grant_id) == {"read"}

    async def test_eight_processes_refresh(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """The scopes of eight grants change 48 times while each of them is refreshed without a pause.

        Once a change is committed, no live token of the grant has the scope that was taken away.
        """
        clients = [await registered(provider) for _ in range(8)]
        tokens = [await sign_in(provider, client) for client in clients]
        grant_ids = [await grant_id_of(provider, token) for token in tokens]

        async def change_all() -> None:
            for client in clients:
                rows = select(func.count()).where(Token.client_id == client.client_id)
                while await value_of(provider, rows) < 8:  # until it refreshes
                    await settle(provider)
            for count in range(24):
                grant_id = grant_ids[count % 8]
                turns: list[tuple[list[str], list[str], str]] = [(["write"], [], "read"), ([], ["write"], "read write")]
                for remove, add, left in turns:
                    changed = await provider._store.write(
                        change_scopes, grant_id, remove=remove, add=add, by="x", now=count
                    )
                    assert changed is not None, "the grant was lost"
                    assert changed[1].removed + changed[1].added == ("write",)
                    assert await live_scopes(provider, grant_id) == {left}
            for grant_id in grant_ids:
                await provider._store.write(end_one, grant_id, None, None, by="x", now=int(time.time()))

        async with Processes(8) as processes:
            jobs = [
                (refresh_until_refused, client, str(token.refresh_token))
                for client, token in zip(clients, tokens, strict=True)
            ]
            changing = asyncio.create_task(change_all())
            answers = await processes.run(database_url, *jobs)
            await changing
        for of_one in answers:
            *pairs, last = of_one
            assert last == "invalid_grant"
            assert len(pairs) > 10
            assert {pair.scope for pair in pairs if isinstance(pair, OAuthToken)} <= {"read", "read write"}
