"""Measure each step of a flow in this process, with 1, 16 and 64 tasks."""

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mcp.shared.auth import OAuthToken

from benchmarks.contenders import Contender
from benchmarks.timing import Measure, seconds_per_call, take_turns
from tests.steps import new_client

TASKS = (1, 16, 64)
VERIFY_AGAIN, VERIFY_ANEW, VERIFY_UNKNOWN = "verify, seen before", "verify, not seen", "verify, unknown token"
GET_CLIENT, FLOW = "get_client", "register, authorize, exchange"
REFRESH, REVOKE = "load and exchange a refresh token", "load and revoke"


class Grants:
    """The data of a contender: a client, used access tokens, and chains of refresh tokens."""

    def __init__(self, contender: Contender, seconds: float) -> None:
        """Each turn takes about this many `seconds`."""
        self._contender = contender
        self._seconds = seconds
        self._speed: dict[str, float] = {}
        self._used: list[OAuthToken] = []
        self._chains: list[list[OAuthToken]] = []

    async def prepare(self, used: int) -> None:
        """Create a client and its grants."""
        contender = self._contender
        contender.client = new_client()
        await contender.register(contender.client)
        self._chains = [[await contender.sign_in(contender.client)] for _ in range(max(TASKS))]
        self._used = [await contender.sign_in(contender.client) for _ in range(used)]
        for token in self._used:
            await contender.verify(token)  # stamps its first use: from then on it can be remembered
        await contender.settle()

    async def turn(self, step: str, tasks: int) -> float:
        """Repeat a step, and return microseconds per call."""
        count = self._seconds / self._speed.get(step, 0.01)
        seconds = await getattr(self, _METHODS[step])(tasks, max(1, round(count / max(TASKS))) * max(TASKS))
        await self._contender.settle()
        self._speed[step] = seconds
        return float(seconds * 1e6)

    async def _verify_again(self, tasks: int, count: int) -> float:
        tokens = self._used[: max(TASKS)]
        for token in tokens:
            await self._contender.verify(token)
        return await seconds_per_call(self._contender.verify, _repeated(tokens, count), tasks)

    async def _verify_anew(self, tasks: int, count: int) -> float:
        await self._contender.register(new_client())  # a commit, so that no token is remembered
        return await seconds_per_call(self._contender.verify, self._used[:count], tasks)

    async def _verify_unknown(self, tasks: int, count: int) -> float:
        unknown = [OAuthToken(access_token=f"access_{secrets.token_urlsafe(32)}") for _ in range(count)]
        return await seconds_per_call(self._contender.verify, unknown, tasks)

    async def _get_client(self, tasks: int, count: int) -> float:
        return await seconds_per_call(self._contender.get_client, [self._contender.client] * count, tasks)

    async def _flow(self, tasks: int, count: int) -> float:
        return await seconds_per_call(self._contender.flow, [new_client() for _ in range(count)], tasks)

    async def _refresh(self, tasks: int, count: int) -> float:
        chains = self._chains[:tasks]

        async def refresh(chain: list[OAuthToken]) -> None:
            chain[0] = await self._contender.refresh(chain[0])

        return await seconds_per_call(refresh, _repeated(chains, count), tasks)

    async def _revoke(self, tasks: int, count: int) -> float:
        tokens = [await self._contender.sign_in(self._contender.client) for _ in range(min(count, max(TASKS)))]
        return await seconds_per_call(self._contender.revoke, tokens, tasks)


_METHODS = {
    VERIFY_AGAIN: "_verify_again",
    VERIFY_ANEW: "_verify_anew",
    VERIFY_UNKNOWN: "_verify_unknown",
    GET_CLIENT: "_get_client",
    FLOW: "_flow",
    REFRESH: "_refresh",
    REVOKE: "_revoke",
}


async def measure_steps(
    contenders: Mapping[str, Contender], *, rounds: int, seconds: float, used: int, tasks: Sequence[int] = TASKS
) -> list[Measure]:
    """Measure every step with every number of tasks."""
    grants = {name: Grants(contender, seconds) for name, contender in contenders.items()}
    for own in grants.values():
        await own.prepare(used)
    measures = []
    for at_once in tasks:
        for step in _METHODS:
            turns = {
                name: partial(own.turn, step, at_once)
                for name, own in grants.items()
                if not contenders[name].verifies_only or (step.startswith("verify") and at_once == 1)
            }
            measures.append(await take_turns(Measure(step, "us", at_once), turns, rounds))
    return measures


def _repeated(items: Sequence[Any], count: int) -> list[Any]:
    return list(items) * (count // len(items)) or list(items[:count])
