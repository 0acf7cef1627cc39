"""Events for operators: log records with fields, counters and span events. Never a secret."""

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from opentelemetry import context, metrics, trace
from sqlalchemy.orm import Session

from oauth_store.masking import SecretFilter

logger = logging.getLogger("oauth_store")
logger.addFilter(SecretFilter())

EVENTS = {
    "client_registered": (logging.INFO, "client registered"),
    "approval_asked": (logging.INFO, "approval requested"),
    "approval_granted": (logging.INFO, "approval granted"),
    "approval_denied": (logging.INFO, "approval denied"),
    "sign_in_failed": (logging.WARNING, "sign-in failed"),
    "tokens_issued": (logging.INFO, "tokens issued"),
    "tokens_refreshed": (logging.INFO, "tokens refreshed"),
    "refresh_replayed": (logging.INFO, "refresh response repeated"),
    "used_pair_replayed": (logging.WARNING, "refresh response repeated, with a pair that is in use"),
    "reuse_detected": (logging.WARNING, "refresh token reused, grant revoked"),
    "code_replayed": (logging.WARNING, "authorization code replayed, grant revoked"),
    "token_created": (logging.INFO, "personal token created"),
    "passkey_added": (logging.INFO, "passkey added"),
    "passkey_removed": (logging.INFO, "passkey removed"),
    "browser_stays": (logging.INFO, "browser stays signed in"),
    "browser_signed_out": (logging.INFO, "browser signed out"),
    "scopes_changed": (logging.INFO, "scopes changed"),
    "revoked": (logging.INFO, "grant revoked"),
    "purged": (logging.INFO, "purged"),
}
"""Each event's level and log message. docs/events.md has their fields and meanings."""

# Only the API, which comes with FastMCP: it does nothing until the application sets up an SDK.
_counter = metrics.get_meter("oauth_store").create_counter(
    "oauth_store.events", unit="{event}", description="Events in the OAuth store, by `event`"
)
_tracer = trace.get_tracer("oauth_store")
_EVENTS = "oauth_store_events"
"""The key of a session's `info` under which events wait for its COMMIT."""
Listener = Callable[[str, Mapping[str, str | int]], None]
"""Gets an event, with its fields."""
listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
"""Gets the events that are reported in this context."""


def emit(event: str, **fields: str | int | bytes | None) -> None:
    """Report an event, after the commit that made it true. Fields are ids, names and numbers; ids may be bytes."""
    level, sentence = EVENTS[event]
    attributes = {
        name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items() if value is not None
    }
    if logger.isEnabledFor(level):
        details = " ".join(f"{name}={_on_one_line(value)}" for name, value in attributes.items())
        logger.log(level, "%s: %s", sentence, details, extra={"event": event, **attributes}, stacklevel=2)
    _counter.add(1, {"event": event})
    if (listening := listener.get()) is not None:
        listening(event, attributes)
    trace.get_current_span().add_event(f"oauth_store.{event}", {name: str(value) for name, value in attributes.items()})


def emit_after_commit(session: Session, event: str, **fields: str | int | bytes | None) -> None:
    """Report an event once the step commits: never if it is rolled back, and only once if it is retried."""
    session.info.setdefault(_EVENTS, []).append((event, fields))


def emit_committed(session: Session, to: Listener | None) -> None:
    """Report the events of a committed session, `to` a listener too. Called in the step's own task."""
    for event, fields in session.info.pop(_EVENTS, ()):
        listener.set(to)
        emit(event, **fields)


class Span:
    """Trace a flow step. Its errors are for the client, or already logged, so no span has their text.

    A class, because the SDK's errors are frozen dataclasses: raised through a `@contextmanager`, such as
    OpenTelemetry's own, they become a FrozenInstanceError.
    """

    def __init__(self, step: str) -> None:
        self._step = step

    def __enter__(self) -> None:
        self._span = _tracer.start_span(f"oauth_store.{self._step}")
        self._token = context.attach(trace.set_span_in_context(self._span))

    def __exit__(self, *_error: object) -> None:
        context.detach(self._token)
        self._span.end()


def _on_one_line(value: str | int | None) -> str:
    """Quote a value if needed: a client chooses its client_id, and must not be able to write log lines."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
