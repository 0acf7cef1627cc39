"""What `oauth-store doctor` finds in one examination, also where the examination fails."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, ParamSpec

from oauth_store.database.outages import cause_of

P = ParamSpec("P")

CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 5, 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A problem keeps clients out, or will; a warning may."""

    check: str
    """What was looked at, in a word or two; docs/doctor.md has a section for each."""
    level: Literal["ok", "warning", "problem"]
    found: str
    advice: str | None = None
    """What to do about it: on every warning and problem."""


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
    "a file system that takes writes. Until then clients get 503",
    r"permission denied for|command denied": "GRANT the server's user USAGE on the schema, SELECT on "
    "oauth_store_version, and SELECT, INSERT, UPDATE, DELETE on the three tables",
    r"permission denied|not permitted": "run this as the server's user; if it is, give it the file and the directory",
    r"locked|lock wait|lock timeout|in time": "end the process that holds a lock: a transaction that was left open, a "
    "backup, a migration",
    r"full|no space|quota": "make room now: a full disk answers clients with 503",
    r"no such file": "did another process delete it? Run this again",
}
"""What to do, by what an error says."""


def examined(
    check: str, examination: Callable[P, Iterable[Finding]], *args: P.args, **kwargs: P.kwargs
) -> Iterator[Finding]:
    """Yield what an examination finds. Whatever it raises is a problem, so that the others are still made."""
    try:
        yield from examination(*args, **kwargs)
    except Exception as error:  # a broken system may raise anything
        yield failure(check, error)


def failure(check: str, error: Exception) -> Finding:
    """Return an error as a problem: its cause in one line, and what to do."""
    cause = reason(error)
    for said, advice in _ADVICE.items():
        if re.search(said, cause, re.IGNORECASE):
            return problem(check, cause, advice)
    return problem(check, cause, "mend what it says, and run this again; while it lasts, clients may get 503")


def reason(error: Exception) -> str:
    """Return what an error of a system or a driver says, in one line, without statements and values."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(getattr(error, "orig", None) or error, TimeoutError):
        return "it did not answer in time"
    return re.sub(r"^<class '[\w.]+'>: ", "", cause_of(error))  # SQLAlchemy's asyncpg names the class


def clock(check: str, ahead: float, uncertainty: float) -> Finding:
    """Judge how far another clock is ahead of this machine's, in seconds; negative is behind."""
    differs = max(0.0, abs(ahead) - uncertainty)
    shown = f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "let both machines keep time by NTP: tokens expire too early or too late otherwise"
    if differs > CLOCK_PROBLEM_SECONDS:
        return problem(check, shown, advice)
    if differs > CLOCK_WARNING_SECONDS:
        return warning(check, shown, advice)
    return ok(check, "agrees with this machine's")


def duration(seconds: float) -> str:
    """Return a number of seconds as a person would say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
