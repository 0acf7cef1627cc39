"""The commands for passkeys: `passkey add`, `passkey list` and `passkey remove`."""

import sys
import time
from typing import Annotated, Any

from cyclopts import App, Parameter

from oauth_store.cli.terminal import (
    DatabaseOption,
    Json,
    OpenStore,
    Verbose,
    Yes,
    confirm,
    log_events,
    opened,
    operator,
    print_json,
    print_table,
)
from oauth_store.display import ago, iso, one_line, short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.flows import passkeys
from oauth_store.flows.passkeys import Passkey
from oauth_store.flows.personal import resources
from oauth_store.webauthn import RelyingParty

passkey_app = App(name="passkey", help="Add, list and remove passkeys, with which users sign in on the server's pages.")

MCP_PATH = "/mcp"


@passkey_app.command
def add(
    *,
    user: Annotated[str, Parameter("--user", help="The user who gets it. Set it if the server has `users`.")] = "owner",
    name: Annotated[
        str | None,
        Parameter("--name", help='What to call it, such as "My phone". Default: the date.', show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        Parameter(
            "--url",
            help="The server's base_url. You need it if no client has connected yet, if the MCP endpoint is not at "
            "/mcp, or if several servers use the database.",
        ),
    ] = None,
    database: DatabaseOption = None,
    json: Json = False,
) -> None:
    """Print a link that adds a passkey to a device, once, within 10 minutes. The database stores only its hash.

    Open it in a browser on the device, or send it to the user. If a device is lost, remove its passkey and add another:
    there is no other recovery. The server needs the extra `passkeys`, and a base_url with a host name.
    """
    with opened(database) as store:
        party = RelyingParty.of(_checked(url) if url is not None else _only_url(store))
        link = store.write(passkeys.create_link, user, time.strftime("%d %B %Y") if name is None else name, party.url)
    text = f"{party.url}/passkey#{link.secret}"
    if json:
        print_json(
            {
                "link": text,
                "user": link.user,
                "name": link.name,
                "url": link.url,
                "expires_at": iso(link.expires_at),
            }
        )
        return
    print(text, flush=True)  # alone on standard output, for a script that sends it
    print(
        f"Open this link once, within 10 minutes, on the device that gets the passkey of {short_line(link.user)}.",
        file=sys.stderr,
    )


def _checked(url: str) -> str:
    if not url.startswith(("https://", "http://")) or any(mark in url for mark in "?#@ "):
        raise OAuthStoreError(
            f"--url is {one_line(url)!r}; expected the server's base_url, as https://wiki.example.com"
        )
    return url.rstrip("/")


def _only_url(store: OpenStore) -> str:
    """Return the base_url of the one server on the database. Raises `OAuthStoreError` if it is unknown."""
    known = {passkey.resource: passkey.url for passkey in store.read(passkeys.passkeys)}
    used = store.read(resources)
    found = sorted({known.get(resource) or resource.removesuffix(MCP_PATH) for resource in used} | set(known.values()))
    if len(found) > 1:
        problem = f"several servers use this database ({', '.join(found)})"
    elif not found:
        problem = "no client has connected yet"
    elif used and used[0] not in known and not used[0].endswith(MCP_PATH):
        problem = f"the MCP endpoint is at {used[0]}, and base_url is unknown"
    else:
        return found[0]
    raise OAuthStoreError(f"{problem}; name the server's base_url, as in --url https://wiki.example.com")


@passkey_app.command(name="list")
def list_passkeys(*, database: DatabaseOption = None, json: Json = False) -> None:
    """List the passkeys of all servers on the database, with their last use."""
    with opened(database) as store:
        listed = store.read(passkeys.passkeys)
    if json:
        print_json({"total": len(listed), "passkeys": [_as_json(passkey) for passkey in listed]})
    elif not listed:
        print("No passkeys.")
    else:
        _print_passkeys(listed)


def _as_json(passkey: Passkey) -> dict[str, Any]:
    return {
        "id": passkey.id.hex(),
        "name": passkey.name,
        "user": passkey.user,
        "url": passkey.url,
        "transports": passkey.transports,
        "created_at": iso(passkey.created_at),
        "last_used_at": iso(passkey.last_used_at),
    }


def _print_passkeys(listed: list[Passkey]) -> None:
    now = int(time.time())
    rows = [
        [
            short_line(passkey.name),
            passkey.id.hex()[:12],
            short_line(passkey.user),
            passkey.url,
            ago(passkey.created_at, now),
            ago(passkey.last_used_at, now),
        ]
        for passkey in listed
    ]
    print_table(["Name", "Id", "User", "Server", "Added", "Last used"], rows, whole=["Id", "Added", "Last used"])


@passkey_app.command
def remove(
    name_or_id: str,
    /,
    *,
    user: Annotated[
        str | None, Parameter("--user", help="Its user. You need it if several users have a passkey of this name.")
    ] = None,
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove the passkey NAME-OR-ID: the server refuses it at once, and ends the sessions that it began."""
    if verbose:
        log_events()
    with opened(database) as store:
        found = passkeys.named(store.read(passkeys.passkeys), name_or_id, user)
        if not found:
            raise OAuthStoreError(f"no passkey is called {one_line(name_or_id)}; see `oauth-store passkey list`")
        if len(found) > 1:
            raise OAuthStoreError(
                f"{len(found)} passkeys are called {one_line(name_or_id)}; use an id of `oauth-store passkey list`"
            )
        if not yes:
            if not json:
                _print_passkeys(found)
            confirm("Remove this passkey permanently?", yes=False)
        store.write(passkeys.remove, found[0], by=f"{operator()}, with oauth-store")
    if json:
        print_json({"removed": found[0].id.hex()})
    else:
        print(f"Removed the passkey {short_line(found[0].name)}.")
