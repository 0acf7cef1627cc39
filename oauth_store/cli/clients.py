"""The commands for registered clients: `clients`, `clients add` and `clients remove`."""

import re
import secrets
import time
import uuid
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import App, ArgumentCollection, Group, Parameter

from oauth_store.cli.terminal import (
    LIMIT,
    DatabaseOption,
    Json,
    Limit,
    Verbose,
    Yes,
    confirm,
    counted,
    flag,
    log_events,
    opened,
    operator,
    print_json,
    print_more,
    print_table,
)
from oauth_store.display import ago, iso, one_line, short_line
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit
from oauth_store.flows.registered import RegisteredClient, registered_clients, remove_client

clients_app = App(name="clients", help="List, add and remove registered clients.")


def _app_or_machine(chosen: ArgumentCollection) -> None:
    given = {argument.name: argument.value for argument in chosen.filter_by(value_set=True)}
    machine, identity = given.get("--machine"), given.get("--identity-assertion")
    introspects = given.get("--introspects")
    if introspects and len(given) > 1:
        raise ValueError("Give --introspects alone: a server that asks about tokens gets none.")
    if introspects:
        return
    if machine and given.get("--redirect-uri"):
        raise ValueError("A machine has no redirect URI: give either --machine or --redirect-uri.")
    if identity and (machine or given.get("--redirect-uri")):
        raise ValueError("Give --identity-assertion alone: its users come from the identity provider.")
    if not machine and not identity and not given.get("--redirect-uri"):
        raise ValueError("Give --redirect-uri for an app, or --machine for a program without a user.")
    if (machine or identity) and given.get("--auth-method") == "none":
        raise ValueError("A machine needs a secret: --auth-method none is for apps.")
    if given.get("--client-id") and not identity:
        raise ValueError("--client-id is for --identity-assertion: all other ids are random.")


_kind = Group("Which client", sort_key=0, validator=_app_or_machine)


@clients_app.default
def clients(*, limit: Limit = LIMIT, database: DatabaseOption = None, json: Json = False) -> None:
    """List the registered clients, most recently approved or registered first.

    A registration that is not approved within 30 days is deleted. All others are kept, since the client may come back.
    """
    with opened(database) as store:
        listed, total = store.read(registered_clients, limit or None)
    if json:
        print_json({"total": total, "clients": [_as_json(client) for client in listed]})
    elif not listed:
        print("No registered clients.")
    else:
        _print_clients(listed)
        print_more(total - len(listed), "client", "use --limit to show more, or --limit 0 to show all")


def _print_clients(listed: list[RegisteredClient]) -> None:
    now = int(time.time())
    rows = [
        [
            client.client_id,
            short_line(client.client_name or "") or "-",
            ", ".join(map(short_line, client.hosts)) or "-",
            "yes" if client.confidential else "no",
            ago(client.created_at, now),
            ago(client.last_approved_at, now),
            f"{client.live_grants:,}",
        ]
        for client in listed
    ]
    columns = ["Client id", "Name", "Host", "Secret", "Registered", "Approved", "Grants"]
    print_table(columns, rows, whole=["Registered", "Approved"], numbers=["Grants"])


def _as_json(client: RegisteredClient) -> dict[str, Any]:
    times = {"created_at": iso(client.created_at), "last_approved_at": iso(client.last_approved_at)}
    return {**asdict(client), **times}


@clients_app.command
def add(
    name: str,
    /,
    *,
    redirect_uri: Annotated[
        tuple[str, ...],
        Parameter(
            name="--redirect-uri",
            group=_kind,
            negative="",
            show_default=False,
            help="The address that gets its codes. Repeat it for more.",
        ),
    ] = (),
    machine: Annotated[
        bool, flag("--machine", group=_kind, help="For a program without a user: it gets tokens with its secret alone.")
    ] = False,
    identity_assertion: Annotated[
        bool,
        flag("--identity-assertion", group=_kind, help="For a program whose users an identity provider signs in."),
    ] = False,
    introspects: Annotated[
        str | None,
        Parameter(
            name="--introspects",
            group=_kind,
            help="For another MCP server, which asks this one about tokens: the URL of its MCP endpoint.",
        ),
    ] = None,
    client_id: Annotated[
        str | None,
        Parameter(name="--client-id", group=_kind, help="The id that the identity provider knows. Default: random."),
    ] = None,
    scopes: Annotated[
        str | None,
        Parameter(name="--scopes", help='The scopes that it may have, as in "read write". Default: the server\'s.'),
    ] = None,
    auth_method: Annotated[
        Literal["client_secret_post", "client_secret_basic", "none"],
        Parameter(
            name="--auth-method",
            group=_kind,
            help="How it authenticates at /token. With `none` it has no secret.",
        ),
    ] = "client_secret_post",
    database: DatabaseOption = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Register a client called NAME by hand, for an app that cannot register itself or a program without a user.

    Copy its secret at once: the database stores only a hash. The client is never purged. It is checked like any
    registration, except for the scopes, which only the server knows: the client gets only the scopes that you list
    here and the server has.
    """
    from mcp.server.auth.provider import RegistrationError
    from pydantic import ValidationError
    from sqlalchemy.exc import IntegrityError

    from oauth_store.flows.clients import OwnersClient
    from oauth_store.flows.connected import OF_OWNERS
    from oauth_store.flows.registration import add_client, check_registration
    from oauth_store.urls import check_public_urls

    if verbose:
        log_events()
    if not one_line(name):
        raise OAuthStoreError("the name has no visible characters; give the client a name that people can read")
    secret = None if auth_method == "none" else secrets.token_urlsafe(32)
    if client_id is not None and (
        not re.fullmatch(r"[!-~]+", client_id) or client_id.lower().startswith(("https://", "token-"))
    ):
        raise OAuthStoreError(
            f"{one_line(client_id)!r} cannot be a client id here; use printable ASCII without spaces, and no URL"
        )
    machines, of_users, of_servers = OF_OWNERS
    without_code = machines if machine else of_users if identity_assertion else of_servers if introspects else None
    if introspects is not None:
        check_public_urls(introspects=introspects)
    now = int(time.time())
    try:
        client = OwnersClient.model_validate(
            {
                "client_id": client_id or str(uuid.uuid4()),
                "client_id_issued_at": now,
                "client_secret": secret,
                "client_secret_expires_at": None if secret is None else 0,
                "client_name": name,
                "redirect_uris": redirect_uri or None,
                "scope": " ".join(scopes.split()) or None if scopes else None,
                "token_endpoint_auth_method": auth_method,
                "grant_types": without_code or ["authorization_code", "refresh_token"],
                "response_types": [] if without_code else ["code"],
                "introspects": introspects,
            }
        )
        check_registration(client)
    except ValidationError as error:
        problem = error.errors()[0]
        raise OAuthStoreError(f"{problem['input']!r} cannot be registered: {problem['msg']}") from None
    except RegistrationError as error:
        raise OAuthStoreError(f"the client cannot be registered: {error.error_description}") from None
    with opened(database) as store:
        try:
            store.write(add_client, client)
        except IntegrityError:
            raise OAuthStoreError(
                f"a client with the id {client.client_id!r} exists; remove it, or choose another"
            ) from None
    emit("client_registered", client_id=client.client_id, by=f"{operator()}, with oauth-store")
    reply: dict[str, Any] = {
        "client_id": client.client_id,
        "client_secret": secret,
        "client_name": name,
        "redirect_uris": redirect_uri,
    }
    reply |= {"scopes": (client.scope or "").split(), "auth_method": auth_method, "created_at": iso(now)}
    if json:
        print_json(reply)
        return
    print(f"Added {short_line(name)}.")
    print(f"  Client id:      {client.client_id}")
    if secret is not None:
        print(f"  Client secret:  {secret}\n\nCopy the secret now: it cannot be shown again.")


@clients_app.command
def remove(
    client_id: str,
    /,
    *,
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove the client CLIENT_ID and revoke its grants: its tokens and codes are deleted with it.

    The client then has to register again, which most apps do only when you set them up again. If you want it to be able
    to connect again, use `revoke --client` instead.
    """
    if verbose:
        log_events()
    with opened(database) as store:
        listed, _ = store.read(registered_clients, None, client_id)
        listed = [client for client in listed if client.client_id == client_id]  # MariaDB pads: 'abc ' equals 'abc'
        if not listed:
            raise OAuthStoreError(f"no client has the id {one_line(client_id)!r}; see `oauth-store clients`")
        if not yes:
            if not json:
                _print_clients(listed)
            confirm(f"Remove this client and revoke {counted(listed[0].live_grants, 'grant')} permanently?", yes=False)
        ended = store.write(remove_client, client_id, f"{operator()}, with oauth-store", int(time.time()))
    if json:
        print_json({"client_id": client_id, "revoked": [name.grant_id.hex() for name in ended]})
    else:
        name = short_line(listed[0].client_name or "") or short_line(client_id)
        print(f"Removed {name} and revoked {counted(len(ended), 'grant')}.")
