"""Programs for processes of their own, which the tests kill, freeze, crowd, and cut off from their database."""

import asyncio
import concurrent.futures.thread  # noqa: F401  (a server that has given up its rights could not import it any more)
import gc
import json
import logging
import os
import pprint  # noqa: F401  (the same)
import random
import secrets
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import uvicorn
from fastmcp import FastMCP
from mcp.server.auth.provider import TokenError
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_store import AutoApproval, DatabaseUnavailable, RateLimits, SQLAlchemyOAuthProvider
from tests.databases import engine_of
from tests.forks import context
from tests.steps import BASE_URL, authorize, new_client, redeem, refresh, sign_in
from tests.workers import present_code, present_for_revocation, present_refresh_token, settle

START_SECONDS = 120
"""How long a process may take to start, on a machine that others use too."""


class Child:
    """A process of its own that runs a function of this module; its first argument is a pipe to here."""

    def __init__(self, program: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = context().Pipe()
        self.process: ForkServerProcess = context().Process(target=program, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def receive(self, seconds: float = START_SECONDS) -> Any:
        """The next thing that the process sends. Raises if it ends before, or sends nothing in time."""
        assert self.pipe.poll(seconds), f"nothing came from process {self.process.pid} in {seconds} s"
        return self.pipe.recv()

    def kill(self) -> None:
        """SIGKILL, as a crash or the kernel that is out of memory would."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


NO_LIMITS = RateLimits(
    registrations_per_address=None, registrations=None, authorizations_per_address=None, authorizations=None
)


def new_provider(url: str, base_url: str = BASE_URL) -> SQLAlchemyOAuthProvider:
    """A provider that lets everyone in, as often as they like."""
    provider = SQLAlchemyOAuthProvider(
        url, base_url=base_url, approval=AutoApproval(), rate_limits=NO_LIMITS, refresh_grace_seconds=600
    )
    provider.set_mcp_path("/mcp")
    return provider


# Crashes


class Journal:
    """What a process was about to do, and what was acknowledged, on disk before it goes on."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._steps = 0

    async def step(self, name: str, answer: Coroutine[Any, Any, Any], **what: Any) -> Any:
        """Take a step between two lines of the journal, and return its answer."""
        self._steps += 1
        number = self._steps
        self._write(number=number, step=name, **what)
        answered = await answer
        await asyncio.sleep(random.uniform(0, 0.01))  # the answer is on its way
        self._write(number=number, answer=answered.model_dump() if isinstance(answered, OAuthToken) else answered)
        return answered

    def _write(self, **entry: Any) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        os.fsync(self._file)


def flow_until_killed(pipe: Connection, url: str, journal: Path, tasks: int) -> None:
    """Register, authorize, exchange, refresh and revoke, with a journal of it. Each task tells of its first grant."""
    asyncio.run(_flow_until_killed(pipe, url, Journal(journal), tasks))


async def _flow_until_killed(pipe: Connection, url: str, journal: Journal, tasks: int) -> None:
    provider = new_provider(url)
    await asyncio.gather(*(_grant_after_grant(provider, journal, pipe) for _ in range(tasks)))


async def _grant_after_grant(provider: SQLAlchemyOAuthProvider, journal: Journal, pipe: Connection) -> None:
    told = False
    while True:
        client = new_client()
        about = {"client": client.model_dump_json()}
        await journal.step("register", provider.register_client(client), **about)
        for _ in range(random.randint(1, 3)):
            about["grant"] = secrets.token_hex(4)
            code = await journal.step("authorize", authorize(provider, client), **about)
            if random.random() < 0.1:
                continue  # its user went away
            token = await journal.step("exchange", redeem(provider, client, code), presented=code, **about)
            if not told:  # only once: a pipe that nobody reads is full after a few hundred words, and then send() waits
                pipe.send("a grant")
                told = True
            for _ in range(random.randint(0, 5)):
                token = await journal.step(
                    "refresh",
                    present_refresh_token(provider, client, token.refresh_token),
                    presented=token.refresh_token,
                    **about,
                )
            if random.random() < 0.5:
                presented = random.choice([token.access_token, token.refresh_token])
                await journal.step(
                    "revoke", present_for_revocation(provider, client, presented), presented=presented, **about
                )


def create_schema(pipe: Connection, url: str) -> None:
    """Open an empty database for the first time, and say when it begins and when it is done."""

    async def open_and_close() -> None:
        async with new_provider(url) as provider:
            pipe.send("begins")
            await provider.check_schema()
        pipe.send("done")

    asyncio.run(open_and_close())


# Crowds


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What is logged as an error meanwhile, by whomever: a step in the background has nobody else to tell."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.name}: {record.getMessage()}")

    handler = Collect(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


class Board:
    """Where processes leave codes and tokens for each other: a few files, of which the newest replaces an old one."""

    _SLOTS = 12

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def leave(self, kind: str, client: OAuthClientInformationFull, secret: str) -> None:
        """Show the others a secret of a client."""
        new = self._directory / secrets.token_hex(8)
        new.write_text(json.dumps({"client": client.model_dump_json(), "secret": secret}))
        new.replace(self._directory / f"{kind}-{random.randrange(self._SLOTS)}")

    def take(self, kind: str) -> tuple[OAuthClientInformationFull, str] | None:
        """What somebody has left, or None."""
        try:
            entry = json.loads((self._directory / f"{kind}-{random.randrange(self._SLOTS)}").read_text())
        except FileNotFoundError:
            return None
        return OAuthClientInformationFull.model_validate_json(entry["client"]), entry["secret"]


class Crowd:
    """The tasks of one process. What they saw is judged together with what the other processes saw."""

    def __init__(self, url: str, board: Path) -> None:
        self.provider = new_provider(url)
        self.board = Board(board)
        self.operations: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answers: list[tuple[str, str, str]] = []
        """What was presented, and the access and the refresh token that came back."""
        self.revoked: list[str] = []
        """Refresh tokens whose grants were ended."""

    async def run(self, seconds: float, tasks: int) -> None:
        """Let so many tasks do as clients do, for so long."""
        async with self.provider:
            deadline = time.monotonic() + seconds
            with complaints() as lines:
                ended = await asyncio.gather(*(self._task(deadline) for _ in range(tasks)), return_exceptions=True)
                await self.provider.aclose()
            self.wrong += [repr(error) for error in ended if error is not None] + lines

    async def _task(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            client = new_client()
            await self.provider.register_client(client)
            self.operations["register"] += 1
            for _ in range(random.randint(1, 4)):
                code = await authorize(self.provider, client)
                self.operations["authorize"] += 1
                if random.random() < 0.2:
                    await self._crowd_around(client, code)
                else:
                    await self._live(client, code)

    async def _crowd_around(self, client: OAuthClientInformationFull, code: str) -> None:
        """Present a code that others present too: they end the grant, but never get two pairs for it."""
        self.board.leave("code", client, code)
        await self._present(client, code)
        await self._meddle()

    async def _live(self, client: OAuthClientInformationFull, code: str) -> None:
        """A grant from its code to its end."""
        token = await self._expect(client, code)
        for _ in range(random.randint(0, 5)):
            await self._verify(token, live=True)
            if random.random() < 0.5:
                self.board.leave("refresh", client, str(token.refresh_token))
            times = random.choice([1, 1, 1, 2, 3])
            answers = await asyncio.gather(*(self._expect(client, str(token.refresh_token)) for _ in range(times)))
            await self._verify(token, live=False)
            token = answers[0]
            await self._meddle()
        if random.random() < 0.5:
            await self._revoke(client, token)

    async def _revoke(self, client: OAuthClientInformationFull, token: OAuthToken) -> None:
        """End a grant, also while it is refreshed: then nothing of it may live, in whichever order that happens."""
        refreshes = [self._present(client, str(token.refresh_token)) for _ in range(random.choice([0, 1, 2]))]
        revocation = present_for_revocation(self.provider, client, str(token.refresh_token))
        *_, found = await asyncio.gather(*refreshes, revocation)
        if not found:
            self.wrong.append("a refresh token was not found by the revocation")
        self.operations["revoke"] += 1
        self.revoked.append(str(token.refresh_token))
        self.board.leave("revoked", client, str(token.refresh_token))
        await self._verify(token, live=False)

    async def _meddle(self) -> None:
        """Present what others have left."""
        for kind in random.sample(["code", "refresh", "revoked"], 2):
            found = self.board.take(kind)
            if found is not None:
                answered = await self._present(*found)
                if kind == "revoked" and answered is not None:
                    self.wrong.append("a token of a grant that was revoked is good for a refresh")

    async def _present(self, client: OAuthClientInformationFull, secret: str) -> OAuthToken | None:
        present = present_code if secret.startswith("code_") else present_refresh_token
        self.operations["exchange" if secret.startswith("code_") else "refresh"] += 1
        try:
            token = await present(self.provider, client, secret)
        except TokenError as error:
            if error.error != "invalid_grant":
                self.wrong.append(f"{error.error}: {error.error_description}")
            return None
        self.answers.append((secret, token.access_token, str(token.refresh_token)))
        return token

    async def _expect(self, client: OAuthClientInformationFull, secret: str) -> OAuthToken:
        token = await self._present(client, secret)
        assert token is not None, f"a live {secret.split('_')[0]} was refused"
        return token

    async def _verify(self, token: OAuthToken, *, live: bool) -> None:
        self.operations["verify"] += 1
        if (await self.provider.verify_token(token.access_token) is not None) != live:
            self.wrong.append(f"an access token was {'refused' if live else 'accepted'}")


def join_crowd(pipe: Connection, url: str, board: Path, seconds: float, tasks: int) -> None:
    """Do as clients do when the word comes, and send what was seen."""
    crowd = Crowd(url, board)
    asyncio.run(crowd.provider.check_schema())
    pipe.send("ready")
    pipe.recv()
    asyncio.run(crowd.run(seconds, tasks))
    pipe.send(
        {
            "operations": dict(crowd.operations),
            "wrong": crowd.wrong,
            "answers": crowd.answers,
            "revoked": crowd.revoked,
        }
    )


def refresh_with_tasks(pipe: Connection, url: str, seconds: float, tasks: int) -> None:
    """Refresh one grant per task, as fast as it goes, beside a ticker of 1 ms; send how that went."""
    pipe.send(asyncio.run(_refresh_with_tasks(url, seconds, tasks)))


async def _refresh_with_tasks(url: str, seconds: float, tasks: int) -> dict[str, float]:
    refreshes = 0
    gaps: list[float] = []

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    async def refresh_again_and_again(client: OAuthClientInformationFull, token: OAuthToken) -> None:
        nonlocal refreshes
        while time.monotonic() < deadline:
            token = await present_refresh_token(provider, client, token.refresh_token)
            refreshes += 1

    async with new_provider(url) as provider:
        client = new_client()
        await provider.register_client(client)
        signed_in = [await redeem(provider, client, await authorize(provider, client)) for _ in range(tasks)]
        started = time.monotonic()
        deadline = started + seconds
        ticker = asyncio.create_task(tick())
        await asyncio.gather(*(refresh_again_and_again(client, token) for token in signed_in))
        elapsed = time.monotonic() - started
        ticker.cancel()
    gaps.sort()
    return {
        "refreshes_per_second": refreshes / elapsed,
        "longest_stall": gaps[-1],
        "p99_stall": gaps[len(gaps) * 99 // 100],
    }


# Outages


def serve(pipe: Connection, url: str, port: int, log: Path, user: int | None = None) -> None:
    """Be an MCP server until SIGTERM; log to a file, and say when it listens."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", force=True)
    provider = new_provider(url, base_url=f"http://127.0.0.1:{port}")

    @asynccontextmanager
    async def lifespan(_server: FastMCP) -> AsyncIterator[None]:
        async with provider:
            yield

    mcp = FastMCP("chaos", auth=provider, lifespan=lifespan)
    pools = {engine_of(place).pool for place in (provider._store.writer, provider._store.reader)}
    opened = 0

    def count(*_: object) -> None:
        nonlocal opened
        opened += 1

    for pool in pools:
        event.listen(pool, "connect", count)

    @mcp.tool
    def read_page(title: str) -> str:
        return f"{title}: for authorized clients only"

    @mcp.custom_route("/state", methods=["GET"])
    async def state(_request: Request) -> JSONResponse:
        checked_out = sum(getattr(pool, "checkedout", int)() for pool in pools)
        return JSONResponse({"steps": len(provider._store._steps), "checked_out": checked_out, "opened": opened})

    app = CancelWhenGone(mcp.http_app(stateless_http=True, json_response=True))
    # By default uvicorn closes a connection that is idle for 5 seconds, perhaps just as a client sends on it.
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, timeout_keep_alive=300, log_config=None, access_log=False, ws="none"
    )
    if user is not None:
        os.setuid(user)
    asyncio.run(_serve(uvicorn.Server(config), pipe))


async def _serve(server: uvicorn.Server, pipe: Connection) -> None:
    async def report() -> None:
        while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.005)
        pipe.send("listens")

    async with asyncio.TaskGroup() as group:
        group.create_task(report())
        await server.serve()


class CancelWhenGone:
    """Cancels a request whose client hung up, as some servers and middlewares do; uvicorn itself does not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        request = asyncio.ensure_future(self.app(scope, messages.get, send))

        async def listen() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    request.cancel()
                    return

        listener = asyncio.create_task(listen())
        try:
            await asyncio.wait([request])
            if not request.cancelled():
                request.result()
        finally:
            listener.cancel()


def hold_lock(pipe: Connection, path: str, exclusively: bool = False) -> None:
    """Lock an SQLite file for writing, or for everything, say so, and let go after so many seconds, or at a word."""
    connection = sqlite3.connect(path, isolation_level=None)
    if exclusively:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN IMMEDIATE")
    pipe.send("locked")
    pipe.poll(pipe.recv())
    connection.execute("ROLLBACK")
    connection.close()
    pipe.send("unlocked")


# Forks


def fork_after_use(pipe: Connection, url: str) -> None:
    """Use a provider, fork, and use it in both processes, as a server does that was loaded before its workers.

    Send the child's exit status, whether it knew the parent's token, the parent the child's, and the parent its own.
    """
    provider = new_provider(url)
    client = new_client()

    async def begin() -> OAuthToken:
        await provider.register_client(client)
        token = await sign_in(provider, client)
        for _ in range(3):  # until it is remembered
            assert await provider.verify_token(token.access_token) is not None
            await settle(provider)
        return token

    async def go_on(token: OAuthToken) -> tuple[bool, str]:
        known = await provider.verify_token(token.access_token) is not None
        await provider.register_client(client)
        return known, (await sign_in(provider, client)).access_token

    token = asyncio.run(begin())
    read, write = os.pipe()
    parent_closed, closed = os.pipe()
    if os.fork() == 0:
        asyncio.run(provider.check_schema())
        os.read(parent_closed, 1)  # what SQLite does when the last connection of a file is closed must not reach here
        os.write(write, json.dumps(asyncio.run(go_on(token))).encode())
        gc.collect()
        sys.exit()
    if url != ":memory:":
        asyncio.run(provider.aclose())
    os.write(closed, b".")
    os.close(write)
    with os.fdopen(read) as answer:
        known, access_token = json.load(answer)
    _, status = os.wait()

    async def look() -> tuple[int, bool, bool, bool]:
        shared = await provider.verify_token(access_token) is not None
        still_known, _ = await go_on(token)
        await provider.aclose()
        return status, known, shared, still_known

    pipe.send(asyncio.run(look()))


def fork_with_an_engine(pipe: Connection, url: URL) -> None:
    """Fork a process that has used an engine that was passed in, and go on in both.

    Send the child's exit status, and the scopes of the parent's next refresh.
    """
    engine = create_async_engine(url)
    provider = SQLAlchemyOAuthProvider(engine, base_url=BASE_URL, approval=AutoApproval())
    client = new_client()

    def forked(access_token: str) -> int:
        child = os.fork()
        if child == 0:
            known = asyncio.run(provider.verify_token(access_token))
            os._exit(0 if known is not None else 1)
        return os.waitpid(child, 0)[1]

    async def use() -> tuple[int, str | None]:
        await provider.register_client(client)
        token = await sign_in(provider, client)
        status = await asyncio.to_thread(forked, token.access_token)
        again = await refresh(provider, client, token)
        await engine.dispose()
        return status, again.scope

    pipe.send(asyncio.run(use()))


def use_in_several_loops(pipe: Connection, url: URL) -> None:
    """Use an engine that was passed in, in two event loops one after the other, and in two that dispose it.

    Send what the second refused, and how many of the last two served.
    """
    engine = create_async_engine(url)
    provider = SQLAlchemyOAuthProvider(engine, base_url=BASE_URL, approval=AutoApproval())
    client = new_client()

    async def use() -> None:
        await provider.register_client(client)
        await sign_in(provider, client)

    async def use_and_dispose() -> None:
        await use()
        await engine.dispose()

    asyncio.run(use())
    refusal, served = None, 0
    try:
        asyncio.run(use())
    except DatabaseUnavailable as error:
        refusal = str(error)
    asyncio.run(engine.dispose(close=False))
    for _ in range(2):
        asyncio.run(use_and_dispose())
        served += 1
    pipe.send((refusal, served))


def fork_amid_writes(pipe: Connection, url: str) -> None:
    """Fork ten times from another thread while the event loop writes, and use the provider in each child.

    Send the access tokens of the children, None for one that could not, and how many flows the parent did meanwhile.
    """
    provider = new_provider(url)
    client = new_client()

    async def write_until(done: threading.Event) -> int:
        flows = 0
        while not done.is_set():
            assert await provider.verify_token((await sign_in(provider, client)).access_token) is not None
            flows += 1
        return flows

    async def in_child() -> str:
        await provider.check_schema()
        return (await sign_in(provider, client)).access_token

    def fork_and_wait() -> str | None:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os.write(write, asyncio.run(asyncio.wait_for(in_child(), 20)).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            token = answer.read()
        os.waitpid(child, 0)
        return token or None

    def fork_often(done: threading.Event) -> list[str | None]:
        try:
            return [fork_and_wait() for _ in range(10)]
        finally:
            done.set()

    async def parent() -> tuple[list[str | None], int]:
        await provider.register_client(client)
        done = threading.Event()
        writing = [asyncio.create_task(write_until(done)) for _ in range(4)]
        tokens = await asyncio.to_thread(fork_often, done)
        flows = sum([await task for task in writing])
        known = [token if token and await provider.verify_token(token) else None for token in tokens]
        await provider.aclose()
        return known, flows

    pipe.send(asyncio.run(parent()))
