"""The messages that the documentation quotes are messages that the code can produce now.

These are quotes: each line of a `text` block, each line that an `oauth-store` command prints in a `console` block, and
each code span or double-quoted phrase of two words or more. Three dots stand for omitted text. A message of another
program follows the program's name and a verb, as in "the client shows `...`" or "FastMCP logs:".
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = [path for folder in ("oauth_store", "migrations") for path in sorted((ROOT / folder).rglob("*.py"))]
HOLE = "\0"
"""Marks the place of a value in a message."""
FIXED_LETTERS = 10
"""A message with fewer letters around its values would match almost any text."""

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
QUOTE = re.compile(r'`([^`]+)`|"([^"`]+)"')
FIRST_CELL = re.compile(r"^\|([^|]*)\|", re.MULTILINE)
ANOTHER_PROGRAM = re.compile(
    r"\b(client|FastMCP|PostgreSQL|SQLite|Alembic|OpenSSL)\s+(shows|logs|reports|writes|responds with)(\s+only)?:?\s+$"
)
COMMAND = re.compile(r"oauth-store |.* --")
LOG_PREFIX = re.compile(r"(INFO|WARNING|ERROR) oauth_store ")
LOG_FIELDS = re.compile(r": \w+=\S+( \w+=\S+)*$")


@functools.cache
def messages() -> list[str]:
    """Every text in the code except docstrings, with a `HOLE` in place of each value."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    constants = {name: value for tree in trees for name, value in constants_of(tree)}
    return sorted({" ".join(text.split()) for tree in trees for text in texts_of(tree, constants)})


def constants_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The text constants of a module."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(str(value))) if name.isupper():
                yield name, value


def texts_of(tree: ast.Module, constants: dict[str, str]) -> Iterator[str]:
    """The texts of a module except docstrings."""
    parts = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Constant() as docstring):
                parts.add(docstring)
            case ast.JoinedStr(values):
                parts.update(part for part in values if isinstance(part, ast.Constant))
                yield "".join(filled(part, constants) for part in values)
            case ast.Constant(str(text)) if node not in parts:
                yield re.sub(r"%[srd]", HOLE, text)


def filled(part: ast.expr, constants: dict[str, str]) -> str:
    """The text of one part of an f-string, or a `HOLE`."""
    match part:
        case ast.Constant(str(text)):
            return text
        case ast.FormattedValue(ast.Name(name)):
            return constants.get(name, HOLE)
    return HOLE


def is_produced(quote: str, message: str) -> bool:
    """Whether a quote is a whole message with values, or consists of parts of its fixed text in their order."""
    return whole(message).fullmatch(quote) is not None or is_in_order(quote.split("..."), message)


@functools.cache
def whole(message: str) -> re.Pattern[str]:
    """Matches a message from beginning to end, with any values; nothing if the message is little else than values."""
    letters = sum(map(str.isalpha, message))
    return re.compile(".*".join(map(re.escape, message.split(HOLE))) if letters >= FIXED_LETTERS else r"(?!)")


def is_in_order(pieces: list[str], message: str) -> bool:
    """Whether the fixed text of a message has the pieces of a quote, in their order and between whole words."""
    words = [rf"(?<!\w){re.escape(piece.strip())}(?!\w)" for piece in pieces if piece.strip()]
    return re.search(".*".join(words), message) is not None


def closest(quote: str) -> str:
    """The message that shares the most words with a quote; of several, the shortest."""
    words = set(quote.split())
    return max(messages(), key=lambda message: (len(words & set(message.split())), -len(message))).replace(HOLE, "...")


def quotes_in(text: str) -> Iterator[str]:
    """The messages of oauth_store that a text quotes inline."""
    end, anothers = 0, False
    for found in QUOTE.finditer(text):
        joined = re.fullmatch(r",? (or|and) (only )?", text[end : found.start()])
        anothers = ANOTHER_PROGRAM.search(text[: found.start()]) is not None or (anothers and joined is not None)
        end = found.end()
        quote = " ".join((found[1] or found[2]).split())
        if " " in quote and not COMMAND.match(quote) and not anothers:
            yield quote


def quotes_in_blocks(page: str) -> Iterator[str]:
    """The messages of oauth_store in the blocks of a page."""
    for found in FENCE.finditer(page):
        language, block = found[2], found[3]
        if language == "text" and not ANOTHER_PROGRAM.search(page[: found.start()]):
            yield from (LOG_FIELDS.sub("", LOG_PREFIX.sub("", line.strip())) for line in block.splitlines())
        elif language == "console":
            for command, output in re.findall(r"^ *\$ (.*)\n((?: *[^ $\n].*\n)*)", block, re.MULTILINE):
                if command.startswith("oauth-store "):
                    yield from (line.strip() for line in output.splitlines() if line.strip() != "...")


def quotes_of(name: str, *, only_symptoms: bool) -> list[str]:
    """The messages of oauth_store that a page quotes: in blocks, and in its text or the first column of its tables."""
    page = (ROOT / "docs" / name).read_text()
    prose = FENCE.sub("", page)
    inline = "\n".join(FIRST_CELL.findall(prose)) if only_symptoms else prose
    return list(dict.fromkeys([*quotes_in_blocks(page), *quotes_in(inline)]))


QUOTES = [
    pytest.param(quote, id=f"{name}: {quote[:60]}")
    for name, only_symptoms in (("troubleshooting.md", False), ("deploying.md", True), ("doctor.md", True))
    for quote in quotes_of(name, only_symptoms=only_symptoms)
]


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_one_of_the_code(quote: str) -> None:
    """The code can produce each message that these pages quote as a message of oauth_store."""
    assert any(is_produced(quote, message) for message in messages()), (
        f"no message in the code reads {quote!r}; the closest is {closest(quote)!r}. Quote that one, or, if another "
        "program writes the message, name the program, as in: the client shows `...`"
    )


def test_a_changed_message_is_noticed() -> None:
    """A quote no longer matches when the wording of its message changes, whatever the values are."""
    message = f"{HOLE} cannot be used: {HOLE}"
    assert is_produced("/srv/oauth.db cannot be used: database is locked (SQLITE_BUSY)", message)
    assert is_produced("... cannot be used", message)
    assert not is_produced("/srv/oauth.db could not be used: database is locked (SQLITE_BUSY)", message)
    assert not is_produced("... could not be used", message)
    assert not is_produced("... can be used", f"{HOLE}: {HOLE}")
    assert len(QUOTES) > 40
