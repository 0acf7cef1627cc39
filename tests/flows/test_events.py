"""Events: each flow makes exactly its own, after its commit, on the log, as counters and on spans; and no secret."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import asyncpg
import httpx2
import pytest
from fastmcp import FastMCP
from mcp.shared.auth import OAuthClientInformationFull
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from oauth_store import PasswordApproval, SQLAlchemyOAuthProvider, events
from oauth_store.credentials import mint, mint_personal_token
from oauth_store.database.purge import INTERVAL_SECONDS
from oauth_store.database.schema import upgrade
from oauth_store.events import EVENTS, emit, emit_after_commit
from oauth_store.pages.passwords import hash_password
from tests.approvals import Asks
from tests.clocks import turned
from tests.databases import create_postgres_database, drop_postgres_database, rows_of
from tests.serving import free_port, serving
from tests.sites import csrf_of
from tests.steps import (
    REDIRECT_URI,
    Provider,
    authorization_params,
    authorization_request,
    authorize,
    new_client,
    pkce,
    provider_on,
    query_of,
    redeem,
    registered,
    sign_in,
    token_request,
)
from tests.workers import answer, present_code, present_refresh_token, settle

PASSWORD = "correct horse battery staple"
PASSWORD_HASH = hash_password(PASSWORD)
RECORD_FIELDS = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "event", "taskName"}


class Telemetry:
    """What an application with OpenTelemetry's SDK and a log handler gets to see."""

    def __init__(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = caplog
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracing, metering = TracerProvider(), MeterProvider([self.reader])
        tracing.add_span_processor(SimpleSpanProcessor(self.exporter))
        monkeypatch.setattr(events, "_tracer", tracing.get_tracer("oauth_store"))
        monkeypatch.setattr(events, "_counter", metering.get_meter("oauth_store").create_counter("oauth_store.events"))
        self.close = metering.shutdown
        caplog.set_level(logging.INFO)
        caplog.set_level(logging.DEBUG, "oauth_store")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def logged(self) -> list[tuple[str, dict[str, Any]]]:
        """The events of the log, with their fields."""
        return [
            (record.event, {name: value for name, value in vars(record).items() if name not in RECORD_FIELDS})
            for record in self.log.records
            if hasattr(record, "event")
        ]

    def counted(self) -> dict[str, int]:
        """How often each event was counted."""
        data = self.reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else []
        return {str(point.attributes["event"]): point.value for metric in metrics for point in metric.data.data_points}  # type: ignore[index,union-attr,misc]

    def traced(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The events of the spans, with the span's name and the fields, in the order of their happening."""
        found = [(told.timestamp, span.name, told) for span in self.spans for told in span.events]
        found.sort(key=lambda item: item[0])
        return [(name, told.name, dict(told.attributes or {})) for _, name, told in found]

    def forget(self) -> None:
        """Look at what comes from now on, but for the counters, which count on."""
        self.log.clear()
        self.exporter.clear()

    def everything(self) -> str:
        """All that was told, as one text."""
        ours = [record for record in self.log.records if not record.name.startswith("httpx")]  # the client's own
        told = [f"{record.getMessage()} {vars(record)!r}" for record in ours]
        data = self.reader.get_metrics_data()
        return "\n".join([*told, *(span.to_json() for span in self.spans), data.to_json() if data is not None else ""])


@pytest.fixture
def telemetry(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    """Watch the log, the counters and the spans, with OpenTelemetry's own SDK."""
    watching = Telemetry(caplog, monkeypatch)
    yield watching
    watching.close()


async def grant_of(provider: SQLAlchemyOAuthProvider) -> str:
    """The id of the one grant there is."""
    rows = await rows_of(provider, "SELECT grant_id FROM oauth_codes")
    (grant_id,) = {bytes(row.grant_id).hex() for row in rows}
    return grant_id


class TestEachFlow:
    """One flow, one event: its name, its fields, its level, its count, and the span of its step."""

    async def check(self, telemetry: Telemetry, *expected: tuple[str, str | None, dict[str, Any]]) -> None:
        """Hold what was told against (event, the step whose span has it, fields)."""
        assert telemetry.logged() == [(name, fields) for name, _, fields in expected]
        levels = [record.levelno for record in telemetry.log.records if hasattr(record, "event")]
        assert levels == [EVENTS[name][0] for name, _, _ in expected]
        assert telemetry.traced() == [
            (f"oauth_store.{step}", f"oauth_store.{name}", {key: str(value) for key, value in fields.items()})
            for name, step, fields in expected
            if step is not None
        ]

    async def test_registration(self, provider: SQLAlchemyOAuthProvider, telemetry: Telemetry) -> None:
        """A registration is told with its client_id."""
        client = new_client()
        await provider.register_client(client)
        await self.check(telemetry, ("client_registered", "register_client", {"client_id": client.client_id}))
        assert telemetry.counted() == {"client_registered": 1}

    async def test_authorization(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """Asking, granting and the exchange are three events of one grant."""
        telemetry.forget()
        await sign_in(provider, client)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id}
        await self.check(
            telemetry,
            ("approval_asked", "store_request", fields),
            ("approval_granted", "approve", fields),
            ("tokens_issued", "exchange_authorization_code", fields),
        )

    async def test_denial(self, make_provider: Provider, telemetry: Telemetry) -> None:
        """A denied request is told."""
        waiting = Asks()
        provider = make_provider(approval=waiting)
        client = await registered(provider)
        await provider.authorize(client, authorization_params())
        telemetry.forget()
        await provider.deny(waiting.handle)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id}
        await self.check(telemetry, ("approval_denied", "deny", fields))

    async def test_subject(self, make_provider: Provider, telemetry: Telemetry) -> None:
        """Where somebody approved, the events of the grant name who."""
        waiting = Asks()
        provider = make_provider(approval=waiting)
        client = await registered(provider)
        await provider.authorize(client, authorization_params())
        telemetry.forget()
        code = query_of(await provider.approve(waiting.handle, subject="ada"))["code"]
        tokens = await redeem(provider, client, code)
        await present_refresh_token(provider, client, tokens.refresh_token)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id, "subject": "ada"}
        assert telemetry.logged() == [
            (name, fields) for name in ("approval_granted", "tokens_issued", "tokens_refreshed")
        ]

    async def test_refresh_replay_and_reuse(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """A refresh, the same answer again, and then the reuse: an event each. The dead grant is silent."""
        first = await sign_in(provider, client)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id}
        telemetry.forget()
        second = await present_refresh_token(provider, client, first.refresh_token)
        await present_refresh_token(provider, client, first.refresh_token)
        await present_refresh_token(provider, client, second.refresh_token)
        with turned(600):
            for _ in range(2):
                assert await answer(present_refresh_token(provider, client, first.refresh_token)) == "invalid_grant"
        await self.check(
            telemetry,
            ("tokens_refreshed", "refresh", fields),
            ("refresh_replayed", "refresh", fields),
            ("tokens_refreshed", "refresh", fields),
            ("reuse_detected", "refresh", fields),
        )
        assert telemetry.counted() == {
            **dict.fromkeys(("approval_asked", "approval_granted", "tokens_issued"), 1),
            "tokens_refreshed": 2,
            "refresh_replayed": 1,
            "reuse_detected": 1,
        }

    async def test_code_replay(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """A code that is presented again is told of."""
        code = await authorize(provider, client)
        await redeem(provider, client, code)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id}
        telemetry.forget()
        assert await answer(present_code(provider, client, code)) == "invalid_grant"
        await self.check(telemetry, ("code_replayed", "exchange_authorization_code", fields))

    async def test_revocation_by_the_client(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """A revocation at /revoke says that it was the client."""
        tokens = await sign_in(provider, client)
        fields = {"grant_id": await grant_of(provider), "client_id": client.client_id, "by": "the client"}
        loaded = await provider.load_refresh_token(client, str(tokens.refresh_token))
        assert loaded is not None
        telemetry.forget()
        await provider.revoke_token(loaded)
        await self.check(telemetry, ("revoked", "revoke_token", fields))

    async def test_purge(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """A purge that deletes something says how much, in a span of its own; one that deletes nothing is silent."""
        await sign_in(provider, client)
        with turned(40 * 24 * 3600) as clock:
            await provider.register_client(new_client())
            await settle(provider)  # the purge that it starts believes no clock yet
            clock.shift(3600)
            telemetry.forget()
            for _ in range(2):
                clock.shift(INTERVAL_SECONDS + 1)
                provider.issuer.after_commit()
                await settle(provider)
            await self.check(telemetry, ("purged", "purge", {"tokens": 2, "codes": 1, "clients": 0}))

    async def test_refusals_are_silent(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """Unknown codes and tokens make no event, and neither does another client's code: anyone may send them."""
        other = await registered(provider)
        code = await authorize(provider, client)
        telemetry.forget()
        assert await answer(present_code(provider, client, "code_unknown")) == "invalid_grant"
        assert await answer(present_code(provider, other, code)) == "invalid_grant"
        assert await answer(present_refresh_token(provider, client, "refresh_unknown")) == "invalid_grant"
        assert await provider.verify_token("access_unknown") is None
        await self.check(telemetry)


async def test_the_whole_way_over_http_tells_no_secret(make_provider: Provider, telemetry: Telemetry) -> None:
    """From the registration to the owner's revocation in the browser: the events in order, and no secret in any."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    provider = make_provider(approval=PasswordApproval(password_hash=PASSWORD_HASH), base_url=url)
    verifier, challenge = pkce()
    secrets = {"password": PASSWORD, "verifier": verifier, "state": "the-very-secret-state", "hash": PASSWORD_HASH}
    async with (
        serving(FastMCP("wiki", auth=provider).http_app(), port),
        httpx2.AsyncClient(base_url=url, headers={"accept": "text/html"}, timeout=60) as http,
    ):
        registration = {"redirect_uris": [REDIRECT_URI], "client_name": "Test"}
        client = (await http.post("/register", json=registration)).json()
        asked = authorization_request(client["client_id"], code_challenge=challenge, state=secrets["state"])
        page = (await http.get("/authorize", params=asked)).headers["location"]
        csrf = csrf_of(await http.get(page))
        form = {"csrf": csrf, "answer": "allow"}
        assert (await http.post(page, data={**form, "password": "a-wrong-password"})).status_code == 403
        code = query_of((await http.post(page, data={**form, "password": PASSWORD})).headers["location"])["code"]
        authentication = {"client_id": client["client_id"], "client_secret": client["client_secret"]}
        first = (await http.post("/token", data=token_request(code, verifier, **authentication))).json()
        again = {"grant_type": "refresh_token", "refresh_token": first["refresh_token"], **authentication}
        second = (await http.post("/token", data=again)).json()
        assert (await http.post("/token", data=again)).json()["refresh_token"] == second["refresh_token"]
        await provider.verify_token(second["access_token"])
        await http.post("/apps", data={"password": PASSWORD})
        session = dict(http.cookies)
        apps = await http.get("/apps")
        grant_id = await grant_of(provider)
        await http.post("/apps", data={"csrf": csrf_of(apps), "revoke": grant_id})
    await settle(provider)
    one = {"client_id": client["client_id"]}
    grant = {"grant_id": grant_id, **one}
    assert telemetry.logged() == [
        ("client_registered", one),
        ("approval_asked", grant),
        ("sign_in_failed", {"address": "127.0.0.1", "reason": "wrong"}),
        ("approval_granted", {**grant, "subject": "owner"}),
        ("tokens_issued", {**grant, "subject": "owner"}),
        ("tokens_refreshed", {**grant, "subject": "owner", "address": "127.0.0.1"}),
        ("refresh_replayed", {**grant, "subject": "owner", "address": "127.0.0.1"}),
        ("revoked", {**grant, "by": "owner"}),
    ]
    secrets |= {"code": code, "csrf": csrf, "page": query_of(page).popitem()[1], "challenge": challenge, **session}
    secrets |= {"client_secret": client["client_secret"], "wrong": "a-wrong-password"}
    secrets |= {f"{name} {kind}": answer[kind] for name, answer in (("first", first), ("second", second))
                for kind in ("access_token", "refresh_token")}  # fmt: skip
    told = telemetry.everything()
    assert grant_id in told
    assert [name for name, secret in secrets.items() if secret in told and "oauth_store_test" not in name] == []


class TestAfterTheCommit:
    async def test_what_is_rolled_back_is_not_told(
        self, provider: SQLAlchemyOAuthProvider, telemetry: Telemetry
    ) -> None:
        """An event of a step that fails before its commit is never told; of one that commits it is, once."""
        fails = True

        def step(session: Session) -> None:
            session.execute(text("DELETE FROM oauth_codes"))
            emit_after_commit(session, "code_replayed", grant_id=b"\1" * 16)
            assert telemetry.logged() == []
            if fails:
                raise KeyError

        with pytest.raises(KeyError):
            await provider._store.write(step)
        assert telemetry.logged() == []
        fails = False
        await provider._store.write(step)
        assert telemetry.logged() == [("code_replayed", {"grant_id": "01" * 16})]

    async def test_a_handler_may_need_the_event_loop(
        self, provider: SQLAlchemyOAuthProvider, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An event is told on the loop: a handler that sends an alert from there does not break the answer."""
        caplog.set_level(logging.INFO, "oauth_store")
        sent: list[asyncio.Task[None]] = []

        class Alert(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                sent.append(asyncio.get_running_loop().create_task(asyncio.sleep(0)))

        handler = Alert()
        logging.getLogger("oauth_store").addHandler(handler)
        try:
            await registered(provider)
        finally:
            logging.getLogger("oauth_store").removeHandler(handler)
        assert len(sent) == 1

    async def test_a_step_that_is_tried_again_tells_once(self, postgres_server: str, telemetry: Telemetry) -> None:
        """A replayed code whose step is rolled back by a real deadlock, and tried again, is one event."""
        url = await create_postgres_database(postgres_server)
        await asyncio.to_thread(upgrade, url)
        administrator = await asyncpg.connect(url)
        # whose timeout is over first loses its transaction: it is to be the step, and not before both wait
        await administrator.execute(f"ALTER DATABASE \"{make_url(url).database}\" SET deadlock_timeout = '2s'")
        async with provider_on(url) as provider:
            client = await registered(provider)
            code = await authorize(provider, client)
            await redeem(provider, client, code)
            assert isinstance(provider._store.writer, AsyncEngine)
            async with provider._store.writer.connect() as other:
                await other.execute(text("SET deadlock_timeout = '1min'"))
                await other.execute(text("SELECT * FROM oauth_tokens FOR UPDATE"))
                states: list[str] = []
                event.listen(
                    provider._store.writer.sync_engine,
                    "handle_error",
                    lambda context: states.append(getattr(context.original_exception, "sqlstate", "")),
                )
                replay = asyncio.create_task(answer(present_code(provider, client, code)))
                while not await administrator.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    pass  # until it holds the code, and waits for the tokens
                await other.execute(text("SELECT * FROM oauth_codes FOR UPDATE"))
                await other.rollback()
                assert await replay == "invalid_grant"
                # where it was quick to try again, it was in the way of the other transaction once more
                assert set(states) == {"40P01"}, "it was not the step that the deadlock cost its transaction"
        assert [name for name, _ in telemetry.logged()].count("code_replayed") == 1
        assert telemetry.counted()["code_replayed"] == 1
        await administrator.close()
        await drop_postgres_database(postgres_server, url)

    async def test_a_client_that_hangs_up_is_traced_to_the_end(
        self, provider: SQLAlchemyOAuthProvider, client: OAuthClientInformationFull, telemetry: Telemetry
    ) -> None:
        """The step goes on without the request, and so does its span, which has the event."""
        code = await authorize(provider, client)
        loaded = await provider.load_authorization_code(client, code)
        assert loaded is not None
        telemetry.forget()
        request = asyncio.create_task(provider.exchange_authorization_code(client, loaded))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await settle(provider)
        assert [(span, name) for span, name, _ in telemetry.traced()] == [
            ("oauth_store.exchange_authorization_code", "oauth_store.tokens_issued")
        ]
        assert [record for record in telemetry.log.records if record.levelno >= logging.WARNING] == []


def test_a_client_cannot_write_log_lines(telemetry: Telemetry) -> None:
    """A client_id with line breaks, escape sequences or spaces is one quoted value on one line."""
    emit("client_registered", client_id="x\nWARNING all is lost\x1b[2J")
    (record,) = telemetry.log.records
    assert record.getMessage() == "client registered: client_id='x\\nWARNING all is lost\\x1b[2J'"
    assert telemetry.logged()[0][1] == {"client_id": "x\nWARNING all is lost\x1b[2J"}


def test_a_secret_in_a_line_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a library or an error puts into a line of our logger: message, arguments, exception."""
    secrets = [mint("access"), mint("refresh"), mint("code"), mint_personal_token()]
    logger = logging.getLogger("oauth_store")
    for secret in secrets:
        logger.warning("%s was presented, and %s", secret, "others")
        logger.error("it failed", exc_info=ValueError(f"no such token: {secret}"))
    lines = "\n".join(map(logging.Formatter().format, caplog.records))
    assert not [secret for secret in secrets if secret in lines]
    assert lines.count("mcp_*** was presented, and others") == 1
    assert lines.count("ValueError: no such token: access_***") == 1


def test_an_application_sets_the_sdk_up_as_ever() -> None:
    """With the global providers that an application sets, before or after the import, everything arrives."""
    script = """
import json
from oauth_store.events import Span, emit
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
metrics.set_meter_provider(MeterProvider([reader]))
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
with Span("approve"):
    emit("approval_granted", grant_id=b"\\1" * 16)
(span,) = exporter.get_finished_spans()
(metric,) = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
print(json.dumps([span.name, [event.name for event in span.events], metric.name, metric.data.data_points[0].value]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [
        "oauth_store.approve",
        ["oauth_store.approval_granted"],
        "oauth_store.events",
        1,
    ]
