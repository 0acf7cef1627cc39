"""The commands for browsers that stay signed in: `browser list` and `browser remove`."""

import time
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, Group, Parameter

from oauth_store.cli.terminal import (
    DatabaseOption,
    Json,
    Verbose,
    Yes,
    confirm,
    counted,
    flag,
    log_events,
    opened,
    operator,
    print_json,
    print_table,
)
from oauth_store.display import ago, iso, short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.flows import sessions
from oauth_store.flows.sessions import Browser

browser_app = App(name="browser", help="List the browsers that stay signed in for 30 days, and sign them out.")

_ID_DIGITS = 6


def _exactly_one(chosen: ArgumentCollection) -> None:
    if len(chosen.filter_by(value_set=True)) != 1:
        raise ValueError("Give exactly one of BROWSER, --user and --all.")


_choice = Group("Which browsers", sort_key=0, validator=_exactly_one)


@browser_app.command(name="list")
def list_browsers(*, database: DatabaseOption = None, json: Json = False) -> None:
    """List the browsers that stay signed in, of all servers on the database, with their last use."""
    with opened(database) as store:
        listed = store.read(sessions.browsers, int(time.time()))
    if json:
        print_json({"total": len(listed), "browsers": [_as_json(browser) for browser in listed]})
    elif not listed:
        print("No browser stays signed in.")
    else:
        _print_browsers(listed)


@browser_app.command
def remove(
    browser: Annotated[
        str | None, Parameter(group=_choice, help="A browser's id, or its first digits, 6 or more: see `browser list`.")
    ] = None,
    /,
    *,
    user: Annotated[str | None, Parameter(name="--user", group=_choice, help="All browsers of one user.")] = None,
    everything: Annotated[bool, flag("--all", group=_choice, help="All browsers.")] = False,
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sign out browsers that stay signed in: to allow the next app, their users have to sign in again.

    Apps that were allowed keep their access.
    """
    if verbose:
        log_events()
    with opened(database) as store:
        listed = store.read(sessions.browsers, int(time.time()))
        found = [one for one in listed if everything or one.user == user or _is_named(one, browser)]
        if not found and not everything:
            raise OAuthStoreError("no such browser stays signed in; see `oauth-store browser list`")
        if found and not yes:
            if not json:
                _print_browsers(found)
            confirm(f"Sign out {counted(len(found), 'browser')}?", yes=False)
        ended = store.write(sessions.sign_out, found, by=f"{operator()}, with oauth-store")
    if json:
        print_json({"signed_out": ended})
    else:
        print(f"Signed out {counted(ended, 'browser')}." if ended else "No browser stays signed in.")


def _is_named(browser: Browser, prefix: str | None) -> bool:
    return prefix is not None and len(prefix) >= _ID_DIGITS and browser.id.hex().startswith(prefix.lower())


def _as_json(browser: Browser) -> dict[str, Any]:
    return {
        "id": browser.id.hex(),
        "user": browser.user,
        "way": browser.way,
        "resource": browser.resource,
        "created_at": iso(browser.created_at),
        "last_used_at": iso(browser.last_used_at),
        "expires_at": iso(browser.expires_at),
    }


def _print_browsers(listed: list[Browser]) -> None:
    now = int(time.time())
    rows = [
        [
            browser.id.hex()[:12],
            short_line(browser.user),
            browser.way,
            browser.resource or "",
            ago(browser.created_at, now),
            ago(browser.last_used_at, now),
            ago(browser.expires_at, now),
        ]
        for browser in listed
    ]
    headers = ["Id", "User", "With", "Server", "Since", "Last used", "Until"]
    print_table(headers, rows, whole=["Id", "Since", "Last used", "Until"])
