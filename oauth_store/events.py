"""What happened, for the operator: as log records with fields, as counters, and on spans. Never a secret."""

import logging

from opentelemetry import context, metrics, trace
from sqlalchemy.orm import Session

logger = logging.getLogger("oauth_store")

EVENTS = {
    "client_registered": (logging.INFO, "client registered"),
    "approval_asked": (logging.INFO, "approval asked for"),
    "approval_granted": (logging.INFO, "approval granted"),
    "approval_denied": (logging.INFO, "approval denied"),
    "sign_in_failed": (logging.WARNING, "sign-in failed"),
    "tokens_issued": (logging.INFO, "tokens issued"),
    "tokens_refreshed": (logging.INFO, "tokens refreshed"),
    "refresh_replayed": (logging.INFO, "refresh answered again"),
    "used_pair_replayed": (logging.WARNING, "refresh answered again with a pair that is in use"),
    "reuse_detected": (logging.WARNING, "refresh token reused, its grant is revoked"),
    "code_replayed": (logging.WARNING, "authorization code replayed, its grant is revoked"),
    "scopes_changed": (logging.INFO, "scopes changed"),
    "revoked": (logging.INFO, "grant revoked"),
    "purged": (logging.INFO, "purged"),
}
"""Each event's level, and what the log says. docs/events.md has their fields and meanings."""

# The API alone, which FastMCP brings: it does nothing until the application sets up an SDK.
_counter = metrics.get_meter("oauth_store").create_counter(
    "oauth_store.events", unit="{event}", description="What happened in the OAuth store, by `event`"
)
_tracer = trace.get_tracer("oauth_store")
_EVENTS = "oauth_store_events"
"""In a session's `info`, where they wait for its COMMIT."""


def emit(event: str, **fields: str | int | bytes | None) -> None:
    """Tell of an event, after the commit that made it true. Fields are ids, names and numbers; ids may be bytes."""
    level, sentence = EVENTS[event]
    attributes = {
        name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items() if value is not None
    }
    if logger.isEnabledFor(level):
        details = " ".join(f"{name}={_on_one_line(value)}" for name, value in attributes.items())
        logger.log(level, "%s: %s", sentence, details, extra={"event": event, **attributes}, stacklevel=2)
    _counter.add(1, {"event": event})
    trace.get_current_span().add_event(f"oauth_store.{event}", {name: str(value) for name, value in attributes.items()})


def emit_after_commit(session: Session, event: str, **fields: str | int | bytes | None) -> None:
    """Tell of an event once the step commits: never of what was rolled back, nor twice of what was tried again."""
    session.info.setdefault(_EVENTS, []).append((event, fields))


def emit_committed(session: Session) -> None:
    """Tell of what a session has committed."""
    for event, fields in session.info.pop(_EVENTS, ()):
        emit(event, **fields)


class Span:
    """Trace a flow step. What it raises is the client's business, or logged already: no span has its text.

    A class, because the SDK's errors are frozen dataclasses: one that is raised through a `@contextmanager`, as
    OpenTelemetry's own is, becomes a FrozenInstanceError.
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
    """A client chooses its client_id: it must not be able to write log lines."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
