"""Texts and times, formatted for people and for programs."""

import unicodedata
from datetime import UTC, datetime
from urllib.parse import SplitResult

NAME_LENGTH = 80
"""Characters that are shown of a client's name, which the client chooses."""
USER_LENGTH = 1000
"""Characters of the longest name of a user."""
LENGTH_LOOKED_AT = 10 * NAME_LENGTH
"""Characters that are examined, since some of them may be invisible."""
MARKS_IN_A_ROW = 30
"""Marks on one letter that are normalized together. No language uses as many."""
BLANK = "\u115f\u1160\u2800\u3164\uffa0\U00013441\U00013442\U0001d159"
"""Letters and symbols that look blank, besides Unicode's control characters and separators."""

_JOINER = "\u034f"  # an invisible mark, across which no other mark is sorted
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_LATEST = 253402300799  # the end of year 9999, the latest time that a datetime holds


def in_minutes(seconds: int) -> str:
    """Return a time to wait, rounded up to minutes."""
    minutes = -(-seconds // 60)
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def is_user_name(text: str) -> bool:
    """Return whether a text can name a user, if it is at most `USER_LENGTH` long: printable, no spaces around it."""
    return bool(text) and text == text.strip() and text.isprintable()


def short_line(text: str) -> str:
    """Return a text that a client chose, for people to read: short, on one line, with nothing hidden in it."""
    text = one_line(text[:LENGTH_LOOKED_AT])
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"


def app_name(name: str | None) -> str:
    """Return the name that a client gives itself, to be shown in a box of its own.

    Never put it in quotation marks: many characters look like the closing one, and a name could continue in our words.
    """
    return short_line(name or "") or "an app without a name"


def nfc(text: str) -> str:
    """Return a text in Unicode's form NFC, in time proportional to its length.

    Sorting a row of marks takes the square of their number: 0.2 seconds for 10,000. So a new row begins after
    `MARKS_IN_A_ROW`, as in Unicode's stream-safe text format (UAX #15, section 13).
    """
    if text.isascii():
        return text
    safe, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char)[0] == "M" else 0
        if marks > MARKS_IN_A_ROW:
            safe.append(_JOINER)
            marks = 1
        safe.append(char)
    return unicodedata.normalize("NFC", "".join(safe))


def one_line(text: str) -> str:
    """Return a text of any length on one line, without control characters.

    A letter keeps at most two marks: more would reach into the lines above and below. Marks without a letter are
    dropped: they would attach to the text before this one, or be invisible.
    """
    spaced, marks = [], 2
    for char in nfc(text):
        kind = unicodedata.category(char)[0]
        if kind in "CZ" or char in BLANK:
            spaced.append(" ")
            marks = 2
            continue
        marks = marks + 1 if kind == "M" else 0
        if marks <= 2:
            spaced.append(char)
    return " ".join("".join(spaced).split())


def link_start(link: SplitResult) -> str:
    """Return the start of an app's own link: its scheme, and its authority if it has one."""
    return f"{link.scheme}://{link.netloc}" if link.netloc else f"{link.scheme}:"


def iso(seconds: int | None) -> str | None:
    """Return a time as ISO 8601 in UTC, such as 2026-07-28T09:15:00Z."""
    return None if seconds is None else f"{utc(seconds):%Y-%m-%dT%H:%M:%SZ}"


def with_age(seconds: int, now: int) -> str:
    """Return a time to compare with a log, and its distance from `now`."""
    return f"{utc(seconds):%Y-%m-%d %H:%M:%S} UTC ({ago(seconds, now)})"


def ago(seconds: int | None, now: int) -> str:
    """Return the distance of a time from `now`, in the largest unit with at least two: "3 h ago", "in 29 d"."""
    if seconds is None:
        return "never"
    away = abs(seconds - now)
    unit, length = next(((unit, length) for unit, length in _UNITS if away >= 2 * length), _UNITS[-1])
    return f"in {away // length} {unit}" if seconds > now else f"{away // length} {unit} ago"


def utc(seconds: int) -> datetime:
    """Return a stored time, or the nearest one that a datetime holds."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LATEST), UTC)
