"""What a client presents, and processes that present it at the same moment, each with a provider of its own."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import httpx2
from fastmcp.server.auth import AccessToken
from mcp.server.auth.middleware.client_auth import AuthenticationError
from mcp.server.auth.provider import RefreshToken, TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from starlette.applications import Starlette

from oauth_store import SQLAlchemyOAuthProvider, StoreResource
from oauth_store.flows import machine
from oauth_store.flows.machine import PresentedSecret
from tests.forks import context
from tests.steps import BASE_URL, provider_on

Answer = OAuthToken | str
"""What a client gets: a token pair, or an error code."""
Work = Callable[..., Awaitable[list[Answer]]]

START_TIMEOUT_SECONDS = 120


async def present_code(provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, code: str) -> OAuthToken:
    """What the token endpoint does with a code, once it has checked redirect_uri and PKCE."""
    loaded = await provider.load_authorization_code(client, code)
    if loaded is None:
        raise TokenError("invalid_grant", "authorization code does not exist")
    return await provider.exchange_authorization_code(client, loaded)


async def present_refresh_token(
    provider: SQLAlchemyOAuthProvider,
    client: OAuthClientInformationFull,
    refresh_token: str | None,
    scopes: list[str] | None = None,
) -> OAuthToken:
    """What the token endpoint does with a refresh token. Without `scopes`, the request names none."""
    loaded = await provider.load_refresh_token(client, str(refresh_token))
    if loaded is None:
        raise TokenError("invalid_grant", "refresh token does not exist")
    return await provider.exchange_refresh_token(client, loaded, loaded.scopes if scopes is None else scopes)


async def present_for_revocation(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, presented: str
) -> bool:
    """What the revocation endpoint does with a token. Tells whether it found it."""
    token: RefreshToken | AccessToken | None = await provider.load_refresh_token(client, presented)
    if token is None:
        token = await provider.load_access_token(presented)
    if token is None or token.client_id != client.client_id:
        return False
    await provider.revoke_token(token)
    return True


async def answer(step: Awaitable[OAuthToken]) -> Answer:
    """The tokens, or the error code."""
    try:
        return await step
    except TokenError as error:
        return error.error


async def settle(provider: SQLAlchemyOAuthProvider | StoreResource) -> None:
    """Wait for what a provider does off its requests' path: stamps and purges."""
    while provider._store._steps:
        await asyncio.wait(provider._store._steps)  # gather() does not let the loop remove those that are done


# The work of processes: it begins when all of them are ready.


async def redeem_one_code(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, code: str
) -> list[Answer]:
    """Present a code once."""
    return [await answer(present_code(provider, client, code))]


async def refresh_with_tasks(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, refresh_token: str, tasks: int
) -> list[Answer]:
    """Present one refresh token in so many tasks at once."""
    return await asyncio.gather(*(answer(present_refresh_token(provider, client, refresh_token)) for _ in range(tasks)))


async def refresh_until_refused(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, refresh_token: str
) -> list[Answer]:
    """Refresh again and again with what the last refresh gave. The last answer is the error code."""
    answers: list[Answer] = []
    while True:
        answers.append(await answer(present_refresh_token(provider, client, refresh_token)))
        last = answers[-1]
        if isinstance(last, str):
            return answers
        refresh_token = str(last.refresh_token)


async def revoke_after_refreshing(
    provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, refresh_token: str, refreshes: int
) -> list[Answer]:
    """Follow the refreshes of another process for a while, then revoke the first token. Ends with "revoked"."""
    answers: list[Answer] = []
    presented = refresh_token
    for _ in range(refreshes):
        last = await answer(present_refresh_token(provider, client, presented))
        answers.append(last)
        if isinstance(last, OAuthToken):
            presented = str(last.refresh_token)
    assert await present_for_revocation(provider, client, refresh_token)
    return [*answers, "revoked"]


async def machine_until_refused(
    provider: SQLAlchemyOAuthProvider, client_id: str, secret: str, times: int | None = None
) -> list[Answer]:
    """Get a machine's tokens, so many times or until it is refused. The last answer is the error code then."""
    answers: list[Answer] = []
    while times is None or len(answers) < times:
        try:
            answers.append(await answer(machine.grant(provider.issuer, PresentedSecret(client_id, secret))))
        except AuthenticationError:
            answers.append("invalid_client")
        if isinstance(answers[-1], str):
            break
    return answers


async def send_forms(provider: SQLAlchemyOAuthProvider, forms: list[dict[str, str]]) -> list[Answer]:
    """Send forms to /token, all at once."""
    transport = httpx2.ASGITransport(Starlette(routes=provider.get_routes("/mcp")))
    async with httpx2.AsyncClient(transport=transport, base_url=BASE_URL) as http:
        answers = await asyncio.gather(*(http.post("/token", data=form) for form in forms))
    bodies = [answer.json() for answer in answers]
    return [str(body["error"]) if "error" in body else OAuthToken.model_validate(body) for body in bodies]


class Processes:
    """Processes that all begin their work at the same moment."""

    def __init__(self, count: int) -> None:
        self._pool = ProcessPoolExecutor(count, context(), initializer=_join, initargs=(context().Barrier(count),))

    async def __aenter__(self) -> "Processes":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._pool.shutdown)

    async def run(self, url: str, *jobs: tuple[Any, ...]) -> list[list[Answer]]:
        """Do one job in each process, and return their answers. There must be as many jobs as processes.

        A job is a function of this module and its arguments after the provider.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(loop.run_in_executor(self._pool, _work, url, work, arguments) for work, *arguments in jobs)
        )


_start: Barrier


def _join(start: Barrier) -> None:
    global _start
    _start = start


def _work(url: str, work: Work, arguments: list[Any]) -> list[Answer]:
    return asyncio.run(_on_a_provider(url, work, arguments))


async def _on_a_provider(url: str, work: Work, arguments: list[Any]) -> list[Answer]:
    async with provider_on(url) as provider:
        await provider.check_schema()
        _start.wait(START_TIMEOUT_SECONDS)
        return await work(provider, *arguments)
