"""The commands for personal tokens: `token create`, `token list` and `token revoke`."""

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
    print_by_server,
    print_json,
    print_table,
)
from oauth_store.display import ago, iso, one_line, short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.flows.connected import GrantName, LiveGrant, end_grants
from oauth_store.flows.personal import NO_EXPIRY, create_token, personal_tokens, resources

token_app = App(name="token", help="Create, list and revoke personal tokens, for programs that cannot sign in.")


@token_app.command
def create(
    name: str,
    /,
    *,
    scopes: Annotated[
        str, Parameter("--scopes", help='Its scopes, such as "read write". Default: none.', show_default=False)
    ] = "",
    expires: Annotated[
        str, Parameter("--expires", help="When it expires: a number of days or years, such as 30d or 1y, or never.")
    ] = "30d",
    subject: Annotated[
        str | None, Parameter("--subject", help="The user that the token acts for. Default: none.")
    ] = None,
    resource: Annotated[
        str | None,
        Parameter(
            "--resource",
            help="The MCP URL of the server that takes the token. Default: the only one for which the database has "
            "tokens; you need it if there are none, or several.",
        ),
    ] = None,
    database: DatabaseOption = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Create a personal token called NAME, and print it once: the database stores only a hash.

    Send it in the header "Authorization: Bearer ...". It is a grant like any other: `grants`, `scopes`, `revoke` and
    `explain` work with it, and the server's /apps page lists it. This command cannot check which scopes the server has
    or requires; New token on /apps can.
    """
    if verbose:
        log_events()
    with opened(database) as store:
        resource = _only_resource(store) if resource is None else _checked(resource)
        created = store.write(
            create_token,
            name,
            scopes.split(),
            expires,
            subject=subject,
            resource=resource,
            by=f"{operator()}, with oauth-store",
        )
    if json:
        print_json(
            {
                "token": created.text,
                "name": created.name,
                "grant_id": created.grant_id.hex(),
                "scopes": created.scopes,
                "subject": created.subject,
                "resource": created.resource,
                "expires_at": _expiry(created.expires_at),
            }
        )
        return
    print(created.text, flush=True)  # alone on standard output, for TOKEN=$(...)
    never = created.expires_at == NO_EXPIRY
    expiry = "It never expires: revoke it when you no longer need it." if never else f"It expires {_in_words(created)}."
    print(f"Copy the token now: it cannot be shown again. It works at {created.resource}. {expiry}", file=sys.stderr)


def _in_words(token: Any) -> str:
    return "never" if token.expires_at == NO_EXPIRY else ago(token.expires_at, int(time.time()))


def _expiry(expires_at: int) -> str | None:
    return None if expires_at == NO_EXPIRY else iso(expires_at)


def _checked(resource: str) -> str:
    from oauth_store.urls import canonical  # imports FastMCP, which takes a second

    return canonical(resource)


def _only_resource(store: OpenStore) -> str:
    found = store.read(resources)
    if len(found) == 1:
        return found[0]
    problem = f"several servers use this database ({', '.join(found)})" if found else "no client has connected yet"
    raise OAuthStoreError(f"{problem}; name the server's MCP URL, as in --resource https://wiki.example.com/mcp")


@token_app.command(name="list")
def list_tokens(*, database: DatabaseOption = None, json: Json = False) -> None:
    """List the live personal tokens. Their last use is accurate to five minutes."""
    with opened(database) as store:
        listed = store.read(personal_tokens)
    if json:
        print_json({"total": len(listed), "tokens": [_as_json(token) for token in listed]})
    elif not listed:
        print("No live personal tokens.")
    else:
        _print_tokens(listed)


def _as_json(token: LiveGrant) -> dict[str, Any]:
    return {
        "name": token.client_name,
        "grant_id": token.grant_id.hex(),
        "scopes": token.scopes,
        "subject": token.subject,
        "resource": token.resource,
        "created_at": iso(token.granted_at),
        "last_used_at": iso(token.used_at),
        "expires_at": _expiry(token.expires_at),
    }


def _print_tokens(listed: list[LiveGrant]) -> None:
    print_by_server(listed, _print_table)


def _print_table(listed: list[LiveGrant]) -> None:
    now = int(time.time())
    rows = [
        [
            short_line(token.client_name or ""),
            token.grant_id.hex()[:12],
            " ".join(token.scopes) or "-",
            token.subject or "-",
            ago(token.granted_at, now),
            ago(token.used_at, now),
            _in_words(token),
        ]
        for token in listed
    ]
    columns = ["Name", "Grant", "Scopes", "Subject", "Created", "Last used", "Expires"]
    print_table(columns, rows, whole=["Grant", "Created", "Last used", "Expires"])


@token_app.command
def revoke(
    name: str,
    /,
    *,
    subject: Annotated[
        str | None,
        Parameter("--subject", help="The token's user. You need it if several users have a token of this name."),
    ] = None,
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Revoke the personal token NAME: every server on the database refuses it at the next call."""
    if verbose:
        log_events()
    with opened(database) as store:
        listed = [
            token
            for token in store.read(personal_tokens)
            if token.client_name == one_line(name).strip() and subject in (None, token.subject)
        ]
        if not listed:
            raise OAuthStoreError(f"no live token is called {one_line(name)}; see `oauth-store token list`")
        if len(listed) > 1:
            raise OAuthStoreError(
                f"{len(listed)} live tokens are called {one_line(name)}; name the user with --subject, or run "
                "`oauth-store revoke GRANT` with a grant of `oauth-store token list`"
            )
        if not yes:
            if not json:
                _print_tokens(listed)
            confirm("Revoke this token permanently?", yes=False)
        chosen = [GrantName(token.grant_id, token.client_id) for token in listed]
        by = f"{operator()}, with oauth-store"
        store.write(end_grants, chosen, f"revoked with oauth-store by {operator()}", by, int(time.time()))
    if json:
        print_json({"revoked": [grant.grant_id.hex() for grant in chosen]})
    else:
        print(f"Revoked the token {short_line(name)}.")
