"""Texts and times for people and for programs to read."""

import unicodedata
from datetime import UTC, datetime
from urllib.parse import SplitResult

NAME_LENGTH = 80
"""Characters of a client's name that are shown: it is the client that chose them."""
LENGTH_LOOKED_AT = 10 * NAME_LENGTH
"""Characters that are looked at, since some of them may be invisible."""
MARKS_IN_A_ROW = 30
"""Marks on one letter that are normalized together. No language has as many."""
BLANK = "\u115f\u1160\u2800\u3164\uffa0\U00013441\U00013442\U0001d159"
"""Letters and symbols that look like nothing, beside what Unicode calls control characters and separators."""

_JOINER = "\u034f"  # a mark that looks like nothing, and that no other is sorted across
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_LATEST = 253402300799  # of year 9999, the last that a datetime knows


def short_line(text: str) -> str:
    """Return a text that a client chose, for people to read: short, on one line, and nothing that hides in it."""
    text = one_line(text[:LENGTH_LOOKED_AT])
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"


def app_name(name: str | None) -> str:
    """Return what a client calls itself, to stand in a box of its own.

    Never put it between quotation marks: too many characters look as if they ended them, to go on in our words.
    """
    return short_line(name or "") or "an app without a name"


def nfc(text: str) -> str:
    """Return a text in Unicode's form NFC, at a cost that grows with its length alone.

    Marks in a row are sorted, which takes the square of their number: 0.2 seconds for 10,000. So a new row begins after
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
    """Return a text on one line, without control characters, whatever its length.

    At most two marks on a letter: more of them would reach into the lines above and below. None without a letter: they
    would sit on what stands before the text, or look like nothing.
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
    """Return how a link of an application's own begins: with its scheme, and with what stands in a host's place."""
    return f"{link.scheme}://{link.netloc}" if link.netloc else f"{link.scheme}:"


def iso(seconds: int | None) -> str | None:
    """Return a time as ISO 8601 in UTC, such as 2026-07-28T09:15:00Z."""
    return None if seconds is None else f"{utc(seconds):%Y-%m-%dT%H:%M:%SZ}"


def with_age(seconds: int, now: int) -> str:
    """Return a time for people to compare with a log, and how far it is."""
    return f"{utc(seconds):%Y-%m-%d %H:%M:%S} UTC ({ago(seconds, now)})"


def ago(seconds: int | None, now: int) -> str:
    """Return how far a time is from `now`, in the largest unit that it is at least two of: "3 h ago", "in 29 d"."""
    if seconds is None:
        return "never"
    away = abs(seconds - now)
    unit, length = next(((unit, length) for unit, length in _UNITS if away >= 2 * length), _UNITS[-1])
    return f"in {away // length} {unit}" if seconds > now else f"{away // length} {unit} ago"


def utc(seconds: int) -> datetime:
    """Return a stored time, or the nearest that a datetime knows."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LATEST), UTC)
