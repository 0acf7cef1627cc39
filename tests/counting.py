"""What each step of a flow asks of the database: statements, transactions, and hops to SQLite's thread and back."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.database.sqlite import Lane
from tests.approvals import Asks
from tests.databases import engine_of
from tests.steps import BASE_URL, authorization_params, new_client, query_of
from tests.workers import settle


@dataclass(frozen=True)
class Cost:
    """Of one step, once everything is open.

    A statement may insert several rows. BEGIN, COMMIT and ROLLBACK are no statements, but a transaction; in autocommit,
    there is none. A hop is a wait for SQLite's thread.
    """

    statements: int
    transactions: int
    hops: int = 0


class Counter:
    """Counts what the drivers are asked for, on every connection that a provider opens from now on."""

    def __init__(self, provider: SQLAlchemyOAuthProvider) -> None:
        self._provider = provider
        self._statements = 0
        self._sent: list[str] = []
        self._sqlite = provider._store.sqlite
        writer, reader = engine_of(provider._store.writer), engine_of(provider._store.reader)
        for engine in {writer, reader} if writer.pool is not reader.pool else {writer}:  # one of the other's hears both
            event.listen(engine, "connect", self._listen)
            event.listen(engine, "before_cursor_execute", self._count)

    def _count(self, *_: object) -> None:
        self._statements += 1

    def _listen(self, connection: DBAPIConnection, _record: object) -> None:
        adapted: Any = connection
        if self._sqlite:
            adapted.set_trace_callback(self._sent.append)
        else:
            adapted.driver_connection.add_query_logger(lambda record: self._sent.append(record.query))

    async def of(self, step: Awaitable[Any]) -> tuple[Cost, Any]:
        """Return what a step costs, and its answer. What is done off its path is not counted."""
        self._sent.clear()
        self._statements = hops = 0
        run = Lane.run

        async def hop(self: Lane, work: Callable[[], Any]) -> Any:
            nonlocal hops
            hops += 1
            return await run(self, work)

        with patch.object(Lane, "run", hop):
            answer = await step
            statements = self._statements
        await asyncio.sleep(0)  # asyncpg tells soon
        begins = sum(sent.startswith("BEGIN") for sent in self._sent)
        pings = self._sent.count(";")
        await settle(self._provider)
        return Cost(statements + pings, begins, hops), answer


async def count_steps(url: str) -> dict[str, Cost]:
    """Return what each step costs on a database, by its name."""
    asks = Asks()
    provider = SQLAlchemyOAuthProvider(url, base_url=BASE_URL, approval=asks)
    provider.set_mcp_path("/mcp")
    counter = Counter(provider)
    costs: dict[str, Cost] = {}

    async def count(name: str, step: Awaitable[Any]) -> Any:
        costs[name], answer = await counter.of(step)
        return answer

    async with provider:
        client = new_client()
        await provider.register_client(client)
        await provider.verify_token("access_unknown")  # by now both engines are connected

        await count("register_client", provider.register_client(new_client()))
        await count("get_client", provider.get_client(client.client_id))
        await count("authorize", provider.authorize(client, authorization_params()))
        code = query_of(await count("approve", provider.approve(asks.handle)))["code"]
        loaded = await count("load_authorization_code", provider.load_authorization_code(client, code))
        token = await count("exchange_authorization_code", provider.exchange_authorization_code(client, loaded))

        await count("verify, first use (its stamp is off the path)", provider.verify_token(token.access_token))
        await count("verify, not seen", provider.verify_token(token.access_token))
        await count("verify, seen before", provider.verify_token(token.access_token))
        await count("verify, unknown token", provider.verify_token("access_unknown"))

        live = await count("load_refresh_token", provider.load_refresh_token(client, token.refresh_token))
        await count("exchange_refresh_token", provider.exchange_refresh_token(client, live, live.scopes))
        replayed = provider.exchange_refresh_token(client, live, live.scopes)
        await count("exchange_refresh_token, replayed", replayed)
        await count("revoke_token", provider.revoke_token(live))
    return costs
