"""Clients, thieves, a clock and a restarting server do what they like, and a model of a hundred lines foretells it all.

The model knows each grant as a chain of pairs, what of it was consumed, used or ended, and when. Hypothesis picks the
steps: clients that refresh and hear the answer or do not, two tasks or two servers at once, old tokens and codes
presented again, revocations, purges, restarts, and a clock that jumps in both directions. Each answer must be the one
that the rules of a refresh give for the model; and after each step the rows in the database must be what
the model knows: at most one live pair of a grant, none of an ended one, nothing live again that was dead, and the same
resource, subject and original scopes from the approval to the last token.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import time_machine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mcp.shared.auth import OAuthToken
from sqlalchemy import delete, select

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database.models import Client, Code, Token
from oauth_store.database.purge import purge
from oauth_store.flows.tokens import SET_BACK_SECONDS
from tests.approvals import Owner
from tests.databases import rows_of, transaction
from tests.steps import BASE_URL, RESOURCE, authorize, new_client
from tests.workers import Answer, answer, present_code, present_for_revocation, present_refresh_token, settle

T = TypeVar("T")

CODE_EXPIRY, ACCESS_EXPIRY, REFRESH_EXPIRY, GRACE = 100, 300, 1500, 60
START = 1_800_000_000


@dataclass
class Pair:
    """A token pair, as the model knows it."""

    access: str
    refresh: str
    scopes: set[str]
    created_at: int
    used: bool = False
    consumed_at: int | None = None
    access_purged: bool = False
    refresh_purged: bool = False
    wiped: bool = False
    """Whether the answer to its refresh token is forgotten, so that it cannot be given again."""

    @property
    def access_expires_at(self) -> int:
        return self.created_at + ACCESS_EXPIRY

    @property
    def refresh_expires_at(self) -> int:
        return self.created_at + REFRESH_EXPIRY


@dataclass
class Grant:
    """What the owner approved once: a code, and the chain of pairs that came from it."""

    client: Any
    scopes: set[str]
    subject: str
    code: str
    code_expires_at: int
    code_consumed: bool = False
    code_purged: bool = False
    pairs: list[Pair] = field(default_factory=list)
    ended: bool = False
    held: int = 0
    """The pair that its client has: behind the newest, if answers were lost."""
    honest: bool = True
    """Whether its tokens were only ever presented as a client presents them."""

    def knows(self, pair: Pair, now: int) -> bool:
        """Whether the pair's refresh token is found at all."""
        return not self.ended and not pair.refresh_purged and now < pair.refresh_expires_at

    def access_lives(self, pair: Pair, now: int) -> bool:
        dead = self.ended or pair.access_purged or pair.consumed_at is not None
        return not dead and now < pair.access_expires_at

    def refresh_lives(self, pair: Pair, now: int) -> bool:
        return self.knows(pair, now) and pair.consumed_at is None

    def successor(self, pair: Pair) -> Pair:
        return self.pairs[self.pairs.index(pair) + 1]

    def sealed(self, pair: Pair) -> Pair | None:
        """The pair that a consumed one still leads to."""
        successor = self.successor(pair)
        return None if pair.wiped or successor.refresh_purged else successor

    def refreshed(self, pair: Pair, scopes: set[str], now: int) -> str | Pair | None:
        """Foretell what a refresh gives: an error, the pair that it gives again, or None for a new pair."""
        if not self.knows(pair, now):
            return "invalid_grant"
        if not scopes <= self.scopes:
            return "invalid_scope"
        if pair.consumed_at is None:
            return None
        within_grace = -SET_BACK_SECONDS < now - pair.consumed_at < GRACE
        successor = self.sealed(pair)
        while within_grace and successor is not None and successor.consumed_at is not None:
            successor = self.sealed(successor)
        live = successor is not None and self.refresh_lives(successor, now)
        if not within_grace and (successor is None or successor.used or not live):
            self.ended = True
            return "invalid_grant"
        if successor is None or not live or (scopes != successor.scopes and not successor.access_purged):
            return "invalid_grant"
        return successor


backs = st.sampled_from([0, 0, 1, 1, 1, 2, 5])
"""How many pairs before the newest one."""
waits = st.sampled_from([0] * 4 + [1, GRACE - 1] + [GRACE] * 4 + [ACCESS_EXPIRY - 1, ACCESS_EXPIRY, REFRESH_EXPIRY - 1])
narrowed = st.sampled_from([None, None, None, {"read"}, {"write"}, {"read", "write"}])
meddlings = st.sampled_from(["look", "look", "spy", "spy", "code", "revoke", "race"])
whiches = st.integers(0, 9)
"""Which grant: see `pick`."""


class Refreshing(RuleBasedStateMachine):
    """Two providers on one database, as two servers behind one address are, and the model beside them."""

    def __init__(self, database: str) -> None:
        super().__init__()
        self.database = database
        self.exits = contextlib.ExitStack()
        self.clock = self.exits.enter_context(time_machine.travel(START, tick=False))
        self.runner = self.exits.enter_context(asyncio.Runner())
        self.owner = Owner(f"subject {number}" for number in itertools.count())
        self.known: list[Grant] = []
        self.latest = START
        self.was_set_back = False
        self.open()
        self.clients = [new_client(), new_client()]
        self.run(self.begin())

    def open(self) -> None:
        self.providers = [
            SQLAlchemyOAuthProvider(
                self.database,
                base_url=BASE_URL,
                approval=self.owner,
                authorization_code_expiry_seconds=CODE_EXPIRY,
                access_token_expiry_seconds=ACCESS_EXPIRY,
                refresh_token_expiry_seconds=REFRESH_EXPIRY,
                refresh_grace_seconds=GRACE,
            )
            for _ in range(2)
        ]
        for provider in self.providers:
            provider.set_mcp_path("/mcp")
            self.run(provider.check_schema())
        self.one, self.other = self.providers

    async def begin(self) -> None:
        async with transaction(self.one) as session:
            for table in (Token, Code, Client):
                await session.execute(delete(table))
        for client in self.clients:
            await self.one.register_client(client)

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Take a step, and wait for what it left to be done: stamps and purges."""

        async def settled() -> T:
            result = await step
            for provider in self.providers:
                await settle(provider)
            return result

        return self.runner.run(settled())

    def teardown(self) -> None:
        with self.exits:
            self.runner.run(self.close())

    async def close(self) -> None:
        for provider in self.providers:
            await provider.aclose()

    @property
    def now(self) -> int:
        return int(time.time())

    def lively(self) -> list[Grant]:
        """The grants of which something can still be refreshed."""
        return [grant for grant in self.known if any(grant.knows(pair, self.now) for pair in grant.pairs)]

    def pick(self, which: int) -> Grant:
        """A grant: most often a lively one, and a new one if there is none; sometimes the first, which may be dead."""
        if which == 9:
            return self.known[0]
        if not self.lively():
            self.first_sign_in(client=which % 2, scopes=["read", "write"])
        lively = self.lively()
        return lively[which % len(lively)]

    # What clients do

    @initialize(client=st.integers(0, 1), scopes=st.sampled_from([["read"], ["read", "write"]]))
    def first_sign_in(self, client: int, scopes: list[str]) -> None:
        """There is somebody from the beginning."""
        self.sign_in(client=client, scopes=scopes, delay=0, times=1)

    @precondition(lambda self: len(self.lively()) < 3)
    @rule(
        client=st.integers(0, 1),
        scopes=st.sampled_from([["read"], ["read", "write"]]),
        delay=st.sampled_from([0, 0, 0, 0, CODE_EXPIRY - 1, CODE_EXPIRY]),
        times=st.sampled_from([1, 1, 1, 1, 2, 4]),
    )
    def sign_in(self, client: int, scopes: list[str], delay: int, times: int) -> None:
        """The owner approves a request, and its code is presented, now or later, once or several times at once.

        Two grants of one client are two devices that share its client_id.
        """
        code = self.run(authorize(self.one, self.clients[client], scopes=scopes))
        subject = f"subject {len(self.known)}"
        grant = Grant(self.clients[client], set(scopes), subject, code, self.now + CODE_EXPIRY)
        self.known.append(grant)
        self.turn_clock(delay)
        self.present_code(grant, times)

    @precondition(lambda self: self.known)
    @rule(which=whiches, after=waits, works=st.booleans(), keeps=st.booleans(), times=st.sampled_from([1, 1, 2]))
    def refresh(self, which: int, after: int, works: bool, keeps: bool, times: int) -> None:
        """A client refreshes with what it has, once or from two addresses at once.

        The answer gets lost unless it `works` with it or `keeps` it. If it works with it and then forgets it, its next
        refresh looks like a thief's.
        """
        grant = self.pick(which)
        if not grant.pairs:
            return
        self.turn_clock(after)
        pair = grant.pairs[grant.held]
        # where the clock was set back, a successor may expire before the pair that it follows
        outlived = self.now >= grant.pairs[-1].refresh_expires_at
        authorized = grant.knows(pair, self.now) and grant.honest and not pair.wiped and not outlived
        answers = self.present(grant, pair, None, times)
        if authorized:
            assert "invalid_grant" not in answers, "a client was signed out that did nothing wrong"
        if not isinstance(answers[0], OAuthToken):
            return
        answered = next(n for n, known in enumerate(grant.pairs) if known.access == answers[0].access_token)
        if works:
            self.verify(grant, grant.pairs[answered])
            grant.honest = grant.honest and keeps
        if keeps:
            grant.held = answered

    @precondition(lambda self: self.known)
    @rule(which=whiches)
    def work(self, which: int) -> None:
        """A client presents the access token that it has."""
        grant = self.pick(which)
        if grant.pairs:
            self.verify(grant, grant.pairs[grant.held])

    # What others do, and clients that are confused

    @precondition(lambda self: self.known)
    @rule(which=whiches, back=backs, after=waits, scopes=narrowed, times=st.sampled_from([1, 1, 2]))
    def replay(self, which: int, back: int, after: int, scopes: set[str] | None, times: int) -> None:
        """Somebody presents a refresh token, new or old, maybe for other scopes."""
        grant = self.pick(which)
        if grant.pairs:
            self.turn_clock(after)
            grant.honest = False
            self.present(grant, grant.pairs[max(0, len(grant.pairs) - 1 - back)], scopes, times)

    @precondition(lambda self: self.known)
    @rule(which=whiches, back=backs, what=meddlings, kind=st.sampled_from(["access", "refresh"]))
    def meddle(self, which: int, back: int, what: str, kind: str) -> None:
        """Somebody looks tokens up, uses them, presents a code again, or revokes."""
        grant = self.pick(which)
        if what == "code":
            self.present_code(grant, 1)
        elif grant.pairs:
            pair = grant.pairs[max(0, len(grant.pairs) - 1 - back)]
            if what == "look":
                self.look(grant, pair)
            elif what == "spy":
                grant.honest = False
                self.verify(grant, pair)
            elif what == "revoke":
                self.revoke(grant, pair, kind)
            else:
                self.revoke_while_it_refreshes(grant, pair)

    def look(self, grant: Grant, pair: Pair) -> None:
        """Looking a token up, and presenting it as another client, does nothing: the model takes no notice."""
        stranger = self.clients[grant.client is self.clients[0]]
        assert self.at_once([present_code(self.one, stranger, grant.code)]) == ["invalid_grant"]
        found = self.run(self.other.load_access_token(pair.access))
        assert (found is not None) == grant.access_lives(pair, self.now)
        loaded = self.run(self.other.load_refresh_token(grant.client, pair.refresh))
        assert (loaded is not None) == grant.knows(pair, self.now)
        assert self.at_once([present_refresh_token(self.one, stranger, pair.refresh)]) == ["invalid_grant"]
        for secret in (pair.access, pair.refresh):
            assert not self.run(present_for_revocation(self.one, stranger, secret))

    def revoke(self, grant: Grant, pair: Pair, kind: str) -> None:
        """A client signs out, with any token that it ever had."""
        found = grant.access_lives(pair, self.now) if kind == "access" else grant.knows(pair, self.now)
        assert self.run(present_for_revocation(self.one, grant.client, getattr(pair, kind))) == found
        grant.ended = grant.ended or found

    def revoke_while_it_refreshes(self, grant: Grant, pair: Pair) -> None:
        """One server revokes a grant while the other refreshes it."""
        newest = grant.pairs[-1]
        found = grant.knows(pair, self.now)

        async def race() -> tuple[Answer, bool]:
            return await asyncio.gather(
                answer(present_refresh_token(self.one, grant.client, newest.refresh)),
                present_for_revocation(self.other, grant.client, pair.refresh),
            )

        answered, revoked = self.run(race())
        assert revoked == found
        if isinstance(answered, OAuthToken):
            assert grant.refresh_lives(newest, self.now)
            newest.used, newest.consumed_at = True, self.now
            self.issued(grant, answered, grant.scopes)
        elif not found:  # so the refresh did not come second either
            assert grant.refreshed(newest, grant.scopes, self.now) == answered
        grant.ended = grant.ended or found

    # What time and operators do

    @rule(what=st.sampled_from(["purge", "purge", "restart", "set back"]), seconds=st.sampled_from([1, 60, 300]))
    def operate(self, what: str, seconds: int) -> None:
        """What has expired is purged, the servers are restarted, or somebody sets the clock back."""
        if what == "set back":
            self.was_set_back = True
            self.turn_clock(-seconds)
        elif what == "purge":
            self.run(self.purge())
        else:
            self.runner.run(self.close())
            self.open()

    async def purge(self) -> None:
        async with transaction(self.one) as session:
            await session.run_sync(purge, self.now)

    def turn_clock(self, seconds: int) -> None:
        self.clock.shift(seconds)
        self.latest = max(self.latest, self.now)

    # How it is checked

    def at_once(self, steps: Any) -> list[Answer]:
        async def gather() -> list[Answer]:
            return await asyncio.gather(*map(answer, steps))

        return self.run(gather())

    def present(self, grant: Grant, pair: Pair, scopes: set[str] | None, times: int) -> list[Answer]:
        """Present a refresh token, and compare the answers with the model's."""
        providers = itertools.cycle(self.providers)
        asked = None if scopes is None else sorted(scopes)
        answers = self.at_once(
            present_refresh_token(next(providers), grant.client, pair.refresh, asked) for _ in range(times)
        )
        for answered in answers:
            expected = grant.refreshed(pair, grant.scopes if scopes is None else scopes, self.now)
            if expected is None:
                assert isinstance(answered, OAuthToken), answered
                pair.used, pair.consumed_at = True, self.now
                self.issued(grant, answered, grant.scopes if scopes is None else scopes)
                assert answered.expires_in == ACCESS_EXPIRY
            elif isinstance(expected, Pair):
                assert isinstance(answered, OAuthToken), answered
                assert (answered.access_token, answered.refresh_token) == (expected.access, expected.refresh)
                granted = grant.scopes if expected.access_purged else expected.scopes
                assert set(str(answered.scope).split()) == granted
                left = 0 if expected.access_purged else max(0, expected.access_expires_at - self.now)
                assert answered.expires_in == left
            else:
                assert answered == expected
        return answers

    def present_code(self, grant: Grant, times: int) -> None:
        """Present a code, and compare the answers with the model's."""
        providers = itertools.cycle(self.providers)
        answers = self.at_once(present_code(next(providers), grant.client, grant.code) for _ in range(times))
        if grant.code_purged or self.now >= grant.code_expires_at:
            assert answers == ["invalid_grant"] * times
            return
        pairs = [token for token in answers if isinstance(token, OAuthToken)]
        assert len(pairs) == (not grant.code_consumed)
        assert len(pairs) + answers.count("invalid_grant") == times
        grant.ended = grant.code_consumed or times > 1
        grant.code_consumed = True
        for token in pairs:
            assert token.expires_in == ACCESS_EXPIRY
            self.issued(grant, token, grant.scopes)

    def verify(self, grant: Grant, pair: Pair) -> None:
        """Present an access token, and compare the answer with the model's."""
        verified = self.run(self.other.verify_token(pair.access))
        assert (verified is not None) == grant.access_lives(pair, self.now)
        if verified is not None:
            pair.used = True
            assert verified.subject == grant.subject
            assert verified.resource == RESOURCE
            assert set(verified.scopes) == pair.scopes

    def issued(self, grant: Grant, token: OAuthToken, scopes: set[str]) -> None:
        assert set(str(token.scope).split()) == scopes
        grant.pairs.append(Pair(token.access_token, str(token.refresh_token), scopes, self.now))

    @invariant()
    def the_rows_are_what_the_model_knows(self) -> None:
        """Every stored token is one of the model's, with the grant's own subject, resource, scopes and liveness."""
        codes, stored = self.run(self.stored())
        for grant in self.known:
            grant_ids = set()
            live = []
            code = codes.get(hash_secret(grant.code))
            grant.code_purged = code is None
            assert code or self.latest >= grant.code_expires_at, "purged, though it had not expired"
            if code:
                grant_ids.add(code.grant_id)
                assert (code.subject, code.resource, set(code.scopes.split())) == (
                    grant.subject,
                    RESOURCE,
                    grant.scopes,
                )
                assert (code.consumed_at is not None) == grant.code_consumed
            for pair in grant.pairs:
                access, refresh = (
                    stored.pop(hash_secret(pair.access), None),
                    stored.pop(hash_secret(pair.refresh), None),
                )
                pair.access_purged = access is None
                pair.refresh_purged = refresh is None
                assert access or self.latest >= pair.access_expires_at, "purged, though it had not expired"
                assert refresh or self.latest >= pair.refresh_expires_at, "purged, though it had not expired"
                for row in filter(None, (access, refresh)):
                    grant_ids.add(row.grant_id)
                    scopes = pair.scopes if row is access else grant.scopes
                    assert (row.client_id, row.subject, row.resource, set(row.scopes.split())) == (
                        grant.client.client_id,
                        grant.subject,
                        RESOURCE,
                        scopes,
                    )
                    assert row.created_at == pair.created_at
                    assert (row.revoked_at is not None) == (row.revoked_reason is not None) == grant.ended
                    assert (row.consumed_at is not None) == (pair.consumed_at is not None)
                    if row.consumed_at is None and row.revoked_at is None and self.now < row.expires_at:
                        live.append(row)
                if refresh:
                    assert refresh.paired_hash == hash_secret(pair.access)
                    assert refresh.expires_at == pair.refresh_expires_at
                    assert (refresh.first_used_at is not None) == pair.used
                    assert refresh.replay is None or (pair.consumed_at is not None and not grant.ended)
                    pair.wiped = pair.consumed_at is not None and refresh.replay is None
                    # The purge tells by the clock which answers are older than others.
                    needed = pair.wiped and not grant.ended and grant.successor(pair).consumed_at is None
                    assert not needed or self.was_set_back, "wiped, though its successor was never refreshed"
                if access:
                    assert access.paired_hash == hash_secret(pair.refresh)
                    assert access.expires_at == pair.access_expires_at
            assert len(grant_ids) <= 1
            assert len(live) <= 2
            assert not (grant.ended and live)
            assert len({row.kind for row in live}) == len(live), "two live pairs of one grant"
            if len(live) == 2:
                assert live[0].paired_hash == live[1].token_hash, "live tokens of two pairs"
        assert not stored, "tokens that the model knows nothing of"

    async def stored(self) -> tuple[dict[bytes, Any], dict[bytes, Any]]:
        codes = {row.code_hash: row for row in await rows_of(self.one, select(Code.__table__))}
        return codes, {row.token_hash: row for row in await rows_of(self.one, select(Token.__table__))}


def explore(new_database: Callable[[], str], examples: int) -> None:
    """Try so many sequences of steps."""
    run_state_machine_as_test(
        lambda: Refreshing(new_database()),  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize="OAUTH_STORE_TEST_FULL" not in os.environ,  # the same sequences every time, unless asked
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.timeout(900)  # if it fails: Hypothesis takes up to five minutes to find the shortest sequence that does
def test_every_answer_is_the_model_s(database_url: str, tmp_path: Path) -> None:
    """Whatever clients, thieves and the clock do, each answer is the one of the table, and the invariants hold."""
    if "://" in database_url:
        explore(lambda: database_url, 15)
        return
    numbers = itertools.count()

    def new_database() -> str:
        return shutil.copyfile(database_url, tmp_path / f"{next(numbers)}.db").as_posix()

    explore(new_database, 40)
