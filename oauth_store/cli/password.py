"""`oauth-store hash-password`: what the sign-in page compares with."""

import getpass
import sys
import unicodedata
import warnings
from typing import Annotated

from cyclopts import Parameter

SHORTEST_PASSWORD = 8
"""Characters of a password that `hash-password` takes."""


def hash_password(*arguments: Annotated[str, Parameter(show=False)]) -> None:
    """Ask for a password, and print its hash: what MCP_OAUTH_PASSWORD_HASH is set to.

    Where standard input is no terminal, the password is its first line.
    """
    from oauth_store.pages import sign_in  # what it needs, no other command does

    if arguments:
        raise SystemExit(
            "oauth-store: a password as an argument stays in the shell's history, and every process can read it; "
            "run `oauth-store hash-password` alone, and type it when asked"
        )
    try:
        password = _typed_password() if sys.stdin.isatty() else _piped_password()
        password.encode()  # a terminal of another encoding gives what is no text
    except UnicodeError:
        raise SystemExit("oauth-store: the password is not text in UTF-8") from None
    length = len(password)
    if not length:
        raise SystemExit("oauth-store: the password is empty; type one, or send one line to standard input")
    if not SHORTEST_PASSWORD <= length <= sign_in.PASSWORD_LENGTH:
        raise SystemExit(
            f"oauth-store: the password has {length} characters; expected {SHORTEST_PASSWORD} to "
            f"{sign_in.PASSWORD_LENGTH}. Anyone who finds the server may guess: take four random words, say"
        )
    if any(unicodedata.category(char) == "Cc" for char in password):
        raise SystemExit(
            "oauth-store: the password has a control character, such as of an arrow key, which the sign-in page "
            "cannot take; type it again"
        )
    print("Set MCP_OAUTH_PASSWORD_HASH to this (in single quotes, where a shell reads it):", file=sys.stderr)
    print(sign_in.hash_password(password))


def _typed_password() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # it would go on, and show what is typed
        try:
            password = getpass.getpass("Password: ")
            if getpass.getpass("Once more: ") != password:
                raise SystemExit("oauth-store: that is not the same password twice; run it again")
        except getpass.GetPassWarning:
            raise SystemExit("oauth-store: this terminal would show the password; use another one") from None
    return password


def _piped_password() -> str:
    return sys.stdin.buffer.readline().decode().rstrip("\r\n")
