"""`oauth-store hash-password`: the hash that the sign-in page checks passwords against."""

import getpass
import sys
import unicodedata
import warnings
from typing import Annotated

from cyclopts import Parameter

SHORTEST_PASSWORD = 8
"""Minimum characters of a password."""


def hash_password(*arguments: Annotated[str, Parameter(show=False)]) -> None:
    """Ask for a password, and print its hash for MCP_OAUTH_PASSWORD_HASH.

    If standard input is not a terminal, the password is its first line.
    """
    from oauth_store.pages import passwords  # slow to import, and no other command needs it

    if arguments:
        raise SystemExit(
            "oauth-store: a password in an argument stays in your shell history, and every process can read it; "
            "run `oauth-store hash-password` without arguments, and type the password at the prompt"
        )
    try:
        password = _typed_password() if sys.stdin.isatty() else _piped_password()
        password.encode()  # a terminal with another encoding may send invalid text
    except UnicodeError:
        raise SystemExit("oauth-store: the password is not valid UTF-8") from None
    length = len(password)
    if not length:
        raise SystemExit("oauth-store: the password is empty; type one, or pipe one line to standard input")
    if not SHORTEST_PASSWORD <= length <= passwords.PASSWORD_LENGTH:
        raise SystemExit(
            f"oauth-store: the password has {length} characters; expected {SHORTEST_PASSWORD} to "
            f"{passwords.PASSWORD_LENGTH}. Anyone who finds the server can guess at it: use four random words"
        )
    if any(unicodedata.category(char) == "Cc" for char in password):
        raise SystemExit(
            "oauth-store: the password has a control character, such as from an arrow key, which the sign-in page "
            "does not accept; type it again"
        )
    print("Set MCP_OAUTH_PASSWORD_HASH to this hash (in single quotes if a shell reads it):", file=sys.stderr)
    print(passwords.hash_password(password))


def _typed_password() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # getpass would continue, and show the password
        try:
            password = getpass.getpass("Password: ")
            if getpass.getpass("Repeat the password: ") != password:
                raise SystemExit("oauth-store: the passwords do not match; run the command again")
        except getpass.GetPassWarning:
            raise SystemExit("oauth-store: this terminal cannot hide the password; use another one") from None
    return password


def _piped_password() -> str:
    return sys.stdin.buffer.readline().decode().rstrip("\r\n")
