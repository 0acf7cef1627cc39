"""The journal of a process that was killed, and what must be true of its database."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mcp.server.auth.provider import TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import func, select

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.credentials import hash_secret
from oauth_store.database.models import Code, Token
from tests.databases import value_of
from tests.steps import redeem
from tests.workers import present_refresh_token


class Grant:
    """What the journal tells of one grant: steps begun, and the answers of those that were acknowledged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    @property
    def client(self) -> OAuthClientInformationFull:
        return OAuthClientInformationFull.model_validate_json(self.steps[0]["client"])

    @property
    def acknowledged(self) -> list[dict[str, Any]]:
        return [step for step in self.steps if "answer" in step]

    @property
    def interrupted(self) -> dict[str, Any] | None:
        """The step that was begun when the process was killed."""
        return self.steps[-1] if "answer" not in self.steps[-1] else None

    def answer(self, name: str, ago: int = 0) -> Any:
        """The last answer to a step, or the one so many before it."""
        answers = [step["answer"] for step in self.acknowledged if step["step"] == name]
        return answers[-1 - ago] if len(answers) > ago else None

    @property
    def token(self) -> OAuthToken | None:
        """The pair that the client has."""
        pair = self.answer("refresh") or self.answer("exchange")
        return None if pair is None else OAuthToken.model_validate(pair)


def read_journal(path: Path) -> tuple[list[OAuthClientInformationFull], list[Grant]]:
    """The clients whose registration was acknowledged, and the grants."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # killed while it wrote this line: neither was the step begun, nor its answer given
        entry = json.loads(line)
        steps.setdefault(entry["number"], entry).update(entry)
    clients: list[OAuthClientInformationFull] = []
    grants: dict[str, Grant] = {}
    for step in steps.values():
        if "grant" in step:
            grants.setdefault(step["grant"], Grant()).steps.append(step)
        elif "answer" in step:
            clients.append(OAuthClientInformationFull.model_validate_json(step["client"]))
    return clients, list(grants.values())


class Ledger:
    """What must stay true of the grants of all processes that were killed so far."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._alive: list[tuple[OAuthClientInformationFull, OAuthToken]] = []
        self._dead: list[tuple[OAuthClientInformationFull, OAuthToken]] = []

    async def check(self, provider: SQLAlchemyOAuthProvider, journal: Path) -> None:
        """Hold a provider against the journal of a process that was killed."""
        clients, grants = read_journal(journal)
        for client in clients:
            found = await provider.get_client(client.client_id)
            assert found is not None, "a registration that was acknowledged is lost"
            assert found.client_name == client.client_name
        await asyncio.gather(*(self._check_grant(provider, grant) for grant in grants))
        self.counts["kills"] += 1
        self.counts["registrations"] += len(clients)
        for grant in grants:
            self.counts.update(f"{step['step']} acknowledged" for step in grant.acknowledged)

    async def _check_grant(self, provider: SQLAlchemyOAuthProvider, grant: Grant) -> None:
        step = grant.interrupted
        if step is not None:
            self.counts[f"{step['step']} interrupted"] += 1
        if grant.answer("revoke"):
            assert grant.token is not None
            self._dead.append((grant.client, grant.token))
            await self._is_dead(provider, *self._dead[-1])
            return
        if grant.token is not None:
            await self._check_pair(provider, grant, grant.token)
        elif grant.answer("authorize") is not None:
            await self._check_code(provider, grant, grant.answer("authorize"))

    async def _check_code(self, provider: SQLAlchemyOAuthProvider, grant: Grant, code: str) -> None:
        """A code is redeemable, unless its exchange was begun: then it may have its two tokens instead."""
        row = await value_of(provider, select(Code).where(Code.code_hash == hash_secret(code)))
        tokens = select(func.count()).select_from(Token).where(Token.grant_id == row.grant_id)
        count = await value_of(provider, tokens)
        assert count == (0 if row.consumed_at is None else 2), "an exchange is half done"
        if row.consumed_at is None:
            token = await redeem(provider, grant.client, code)
            await self._is_alive(provider, grant.client, token)
            self._alive.append((grant.client, token))
        else:
            assert grant.interrupted is not None, "a code is used that nobody presented"
            assert grant.interrupted["step"] == "exchange"
            self.counts["exchange committed, its answer lost"] += 1

    async def _check_pair(self, provider: SQLAlchemyOAuthProvider, grant: Grant, token: OAuthToken) -> None:
        client, step = grant.client, grant.interrupted
        if step is None:
            await self._is_alive(provider, client, token)
            before = grant.answer("refresh", ago=1) or grant.answer("exchange")
            if grant.answer("refresh"):
                again = await present_refresh_token(provider, client, before["refresh_token"])
                assert again.refresh_token == token.refresh_token, "a refresh was answered with two pairs"
            self._alive.append((client, token))
        elif step["step"] == "refresh":
            # Committed or not, the client presents what it has, and is served. So is one that asks twice.
            if await provider.verify_token(token.access_token) is None:
                self.counts["refresh committed, its answer lost"] += 1
            successor = await present_refresh_token(provider, client, token.refresh_token)
            again = await present_refresh_token(provider, client, token.refresh_token)
            assert again.refresh_token == successor.refresh_token
            await self._is_alive(provider, client, successor)
            self._alive.append((client, successor))
        elif await provider.verify_token(token.access_token) is not None:
            self._alive.append((client, token))
            await self._is_alive(provider, client, token)
        else:
            self.counts["revoke committed, its answer lost"] += 1
            self._dead.append((client, token))
            await self._is_dead(provider, client, token)

    async def _is_alive(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, token: OAuthToken
    ) -> None:
        assert await provider.verify_token(token.access_token) is not None, "an access token is lost"
        assert await provider.load_refresh_token(client, str(token.refresh_token)) is not None

    async def _is_dead(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, token: OAuthToken
    ) -> None:
        assert await provider.verify_token(token.access_token) is None, "a revoked access token came back"
        with pytest.raises(TokenError, match="invalid_grant"):
            await present_refresh_token(provider, client, token.refresh_token)

    async def check_all_again(self, provider: SQLAlchemyOAuthProvider) -> None:
        """Whatever was good once stayed so through all later kills, and can be refreshed; what was revoked did not."""
        for client, token in self._alive:
            await self._is_alive(provider, client, token)
            await self._is_alive(provider, client, await present_refresh_token(provider, client, token.refresh_token))
        for client, token in self._dead:
            await self._is_dead(provider, client, token)
