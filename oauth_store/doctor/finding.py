"""A finding of `oauth-store doctor`, also when a check itself fails."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, ParamSpec

from oauth_store.database.outages import cause_of

P = ParamSpec("P")

CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 5, 60


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. A problem keeps clients out, or will; a warning may."""

    check: str
    """The name of the check; docs/doctor.md has a section for each."""
    level: Literal["ok", "warning", "problem"]
    found: str
    advice: str | None = None
    """How to fix it: set on every warning and problem."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def problem(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "problem", found, advice)


RESTORE = "stop the server, and restore a backup (see docs/moving.md). Without one: `sqlite3 FILE .recover`"
_ADVICE = {
    r"malformed|not a database|corrupt": RESTORE,
    r"row-level security": "let the server's user own the tables, or ALTER ROLE ... BYPASSRLS",
    r"read-?only|1290": "use the primary, not a standby; let the server's user write to the file and its directory, on "
    "a writable file system. Until then clients get 503",
    r"permission denied for|command denied": "GRANT the server's user USAGE on the schema, SELECT on "
    "oauth_store_version, and SELECT, INSERT, UPDATE, DELETE on the three tables",
    r"permission denied|not permitted": "run this as the server's user; if you did, make it the owner of the file "
    "and the directory",
    r"locked|lock wait|lock timeout|in time": "end the process that holds the lock: an open transaction, a backup, a "
    "migration",
    r"full|no space|quota": "make room now: on a full disk, clients get 503",
    r"no such file": "did another process delete it? Run this again",
}
"""Advice, by a pattern in the text of an error."""


def examined(
    check: str, examination: Callable[P, Iterable[Finding]], *args: P.args, **kwargs: P.kwargs
) -> Iterator[Finding]:
    """Yield the findings of one check. Any exception becomes a problem, so that the other checks still run."""
    try:
        yield from examination(*args, **kwargs)
    except Exception as error:  # a broken system may raise anything
        yield failure(check, error)


def failure(check: str, error: Exception) -> Finding:
    """Return an error as a problem: its cause in one line, and how to fix it."""
    cause = reason(error)
    for pattern, advice in _ADVICE.items():
        if re.search(pattern, cause, re.IGNORECASE):
            return problem(check, cause, advice)
    return problem(check, cause, "fix this; until then clients may get 503")


def reason(error: Exception) -> str:
    """Return the cause of an error from the system or a driver, in one line, without statements and values."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(getattr(error, "orig", None) or error, TimeoutError):
        return "no response in time"
    return re.sub(r"^<class '[\w.]+'>: ", "", cause_of(error))  # SQLAlchemy's asyncpg names the class


def clock(check: str, ahead: float, uncertainty: float) -> Finding:
    """Check how many seconds another clock is ahead of this machine's; negative is behind."""
    differs = max(0.0, abs(ahead) - uncertainty)
    shown = f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "sync both machines with NTP: otherwise tokens expire too early or too late"
    if differs > CLOCK_PROBLEM_SECONDS:
        return problem(check, shown, advice)
    if differs > CLOCK_WARNING_SECONDS:
        return warning(check, shown, advice)
    return ok(check, "agrees with this machine's")


def duration(seconds: float) -> str:
    """Return a number of seconds in a readable unit."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
