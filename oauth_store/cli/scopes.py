"""The command for what a live grant allows: `scopes`."""

import time
from typing import Annotated, Any

from cyclopts import Parameter

from oauth_store.cli.grants import ID_SHOWN, change_as_json, live_grant
from oauth_store.cli.terminal import (
    DatabaseOption,
    Json,
    Verbose,
    Yes,
    confirm,
    log_events,
    opened,
    operator,
    print_json,
)
from oauth_store.display import app_name, one_line
from oauth_store.errors import OAuthStoreError
from oauth_store.flows.scopes import change_scopes, changes_of, check_scopes, scopes_after

_LIST: dict[str, Any] = {"negative": "", "show_default": False}


def scopes(
    grant: Annotated[str, Parameter(help="A grant's id, or at least its first 6 digits: see `grants`.")],
    /,
    *,
    replacement: Annotated[str | None, Parameter("--set", help='Replace all scopes, as in "read write".')] = None,
    add: Annotated[tuple[str, ...], Parameter("--add", help="A scope to add. Repeatable.", **_LIST)] = (),
    remove: Annotated[tuple[str, ...], Parameter("--remove", help="A scope to remove. Repeatable.", **_LIST)] = (),
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the scopes of a live grant, or change them.

    A change takes effect at the client's next call, and every refresh keeps it. The client does not reconnect. This
    command cannot check which scopes the server has or requires; the server's /apps page can.
    """
    if verbose:
        log_events()
    added, removed = _choice(replacement, add, remove)
    change = None
    with opened(database) as store:
        found = live_grant(store, grant)
        if added or removed is None or removed:
            after = scopes_after(found.scopes, added, removed)
            if not after:
                raise OAuthStoreError("a grant needs at least one scope; to end it, revoke it")
            if set(after) != set(found.scopes):
                confirm(f"{_of(found)}: change {_listed(found.scopes)} to {_listed(after)}?", yes=yes)
            by = f"{operator()}, with oauth-store"
            done = store.write(change_scopes, found.grant_id, add=added, remove=removed, by=by, now=int(time.time()))
            if done is None:
                raise OAuthStoreError("the grant has ended in the meantime; see `oauth-store grants`")
            change = done[1]
            found = live_grant(store, found.grant_id.hex())
        changes = store.read(changes_of, [found.grant_id]).get(found.grant_id, [])
    if json:
        print_json(
            {
                "grant_id": found.grant_id.hex(),
                "client_id": found.client_id,
                "scopes": found.scopes,
                "added": () if change is None else change.added,
                "removed": () if change is None else change.removed,
                "scope_changes": [change_as_json(change) for change in changes],
            }
        )
        return
    print(f"{_of(found)} {'can use' if change is None else 'can now use'} {_listed(found.scopes)}.")
    now = int(time.time())
    for of_before in changes:
        print(f"  {of_before.in_words(now)}")


def _choice(
    replacement: str | None, add: tuple[str, ...], remove: tuple[str, ...]
) -> tuple[list[str], list[str] | None]:
    if replacement is not None and (add or remove):
        raise OAuthStoreError("--set names all scopes; pass it without --add and --remove")
    added = (replacement or "").split() or [scope for text in add for scope in text.split()]
    removed = [scope for text in remove for scope in text.split()]
    if replacement is not None and not added:
        raise OAuthStoreError("--set names no scope; to end the grant, use `oauth-store revoke`")
    check_scopes([*added, *removed])
    if both := set(added) & set(removed):
        raise OAuthStoreError(f"{' '.join(sorted(both))} cannot be added and removed at once")
    return added, None if replacement is not None else removed


def _of(grant: Any) -> str:
    return f"{app_name(grant.client_name)} ({grant.grant_id.hex()[:ID_SHOWN]})"


def _listed(scopes: Any) -> str:
    return one_line(" ".join(scopes)) or "no scope"
