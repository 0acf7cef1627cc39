"""What `oauth-store doctor` says of one thing that it has looked at."""

from dataclasses import dataclass
from typing import Literal


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


def duration(seconds: float) -> str:
    """Return a number of seconds as a person would say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
