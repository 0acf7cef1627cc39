"""The commands for registered clients: `clients`, `clients add` and `clients remove`."""

import secrets
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from oauth_store.cli.terminal import (
    LIMIT,
    DatabaseOption,
    Json,
    Limit,
    Verbose,
    Yes,
    confirm,
    counted,
    on_database,
    operator,
    print_json,
    print_more,
    print_table,
    tell_events,
)
from oauth_store.database.models import NEVER, Client, Code, Token
from oauth_store.database.store import Database
from oauth_store.display import ago, iso, shown, visible
from oauth_store.errors import OAuthStoreError
from oauth_store.events import emit
from oauth_store.flows.connected import BATCH, GrantName, described, grants_to_end, is_live, revoke_grants

clients_app = App(name="clients", help="List the registered clients; add one, or remove one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredClient:
    client_id: str
    client_name: str | None
    hosts: tuple[str, ...]
    confidential: bool
    created_at: int
    last_approved_at: int | None
    live_grants: int


@clients_app.default
def clients(*, limit: Limit = LIMIT, database: DatabaseOption = None, json: Json = False) -> None:
    """List the registered clients, those that were approved or registered last first.

    A registration that nobody approves is deleted after 30 days; any other stays, since its client may come back.
    """
    listed, total = on_database(database, lambda found: _clients(found, limit or None))
    if json:
        print_json({"total": total, "clients": [_as_json(client) for client in listed]})
    elif not listed:
        print("No client is registered.")
    else:
        _print_clients(listed)
        print_more(total - len(listed), "client", "--limit shows more of them; --limit 0 shows all")


async def _clients(
    database: Database, limit: int | None, client_id: str | None = None
) -> tuple[list[RegisteredClient], int]:
    newest = func.coalesce(func.nullif(Client.last_used_at, NEVER), Client.created_at)
    query = select(Client.__table__, func.count().over().label("total")).order_by(newest.desc(), Client.client_id)
    if client_id is not None:
        query = query.where(Client.client_id == client_id)
    async with database.read() as session:
        rows = (await session.execute(query.limit(limit))).all()
        grants = await _live_grants(session, [row.client_id for row in rows])
    listed = []
    for row in rows:
        name, hosts = described(row.client_metadata)
        listed.append(
            RegisteredClient(
                client_id=row.client_id,
                client_name=name,
                hosts=hosts,
                confidential=row.client_secret_hash is not None,
                created_at=row.created_at,
                last_approved_at=row.last_used_at or None,
                live_grants=grants.get(row.client_id, 0),
            )
        )
    return listed, rows[0].total if rows else 0


async def _live_grants(session: AsyncSession, client_ids: list[str]) -> dict[str, int]:
    """Return how many live grants some clients have."""
    counts: dict[str, int] = {}
    for start in range(0, len(client_ids), BATCH):
        of_these = Token.client_id.in_(client_ids[start : start + BATCH]) & is_live(int(time.time()))
        query = select(Token.client_id, func.count(Token.grant_id.distinct())).where(of_these).group_by(Token.client_id)
        counts |= {str(client_id): number for client_id, number in await session.execute(query)}
    return counts


def _print_clients(listed: list[RegisteredClient]) -> None:
    now = int(time.time())
    rows = [
        [
            client.client_id,
            shown(client.client_name or "") or "-",
            ", ".join(map(shown, client.hosts)),
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
        list[str], Parameter(name="--redirect-uri", negative="", help="Where its codes are sent. May be given again.")
    ],
    scopes: Annotated[
        str | None,
        Parameter(name="--scopes", help="All that it may have, with spaces in between. Default: the server's."),
    ] = None,
    auth_method: Annotated[
        Literal["client_secret_post", "client_secret_basic", "none"],
        Parameter(name="--auth-method", help="How it proves itself at /token. With `none` it has no secret."),
    ] = "client_secret_post",
    database: DatabaseOption = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Register a client called NAME by hand, for an app that cannot register itself.

    Its secret is shown this once: the database has a hash of it. The client is never purged. What is checked is what
    the server checks of a registration, but for the scopes, which only the server knows. The client gets no other
    scopes than these, and of these only those that the server has.
    """
    from mcp.server.auth.provider import RegistrationError
    from pydantic import ValidationError

    from oauth_store.flows.clients import OwnersClient
    from oauth_store.flows.registration import check_registration, store_registration

    if verbose:
        tell_events()
    if not visible(name):
        raise OAuthStoreError("the client needs a name that people can read")
    secret = None if auth_method == "none" else secrets.token_urlsafe(32)
    now = int(time.time())
    try:
        client = OwnersClient.model_validate(
            {
                "client_id": str(uuid.uuid4()),
                "client_id_issued_at": now,
                "client_secret": secret,
                "client_secret_expires_at": None if secret is None else 0,
                "client_name": name,
                "redirect_uris": redirect_uri,
                "scope": " ".join(scopes.split()) or None if scopes else None,
                "token_endpoint_auth_method": auth_method,
                "grant_types": ["authorization_code", "refresh_token"],
                "response_types": ["code"],
            }
        )
        check_registration(client)
    except ValidationError as error:
        problem = error.errors()[0]
        raise OAuthStoreError(f"{problem['input']!r} cannot be registered: {problem['msg']}") from None
    except RegistrationError as error:
        raise OAuthStoreError(f"the client cannot be registered: {error.error_description}") from None
    on_database(database, lambda found: store_registration(found, client, last_used_at=NEVER))
    emit("client_registered", client_id=client.client_id, by=f"{operator()}, with oauth-store")
    told = {"client_id": client.client_id, "client_secret": secret, "client_name": name, "redirect_uris": redirect_uri}
    told |= {"scopes": (client.scope or "").split(), "auth_method": auth_method, "created_at": iso(now)}
    if json:
        print_json(told)
        return
    print(f"Added {shown(name)}.")
    print(f"  Client id:      {client.client_id}")
    if secret is not None:
        print(f"  Client secret:  {secret}\n\nNobody can show the secret again: copy it now.")


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
    """Remove the client CLIENT_ID, and end its grants: its tokens and codes are deleted with it.

    The client has to register again, which most apps do only where they are set up anew. To end what is connected and
    let it connect again, `revoke --client` is enough.
    """
    if verbose:
        tell_events()
    listed, _ = on_database(database, lambda found: _clients(found, None, client_id))
    listed = [client for client in listed if client.client_id == client_id]  # MariaDB pads: 'abc ' equals 'abc'
    if not listed:
        raise OAuthStoreError(f"no client has the id {visible(client_id)!r}; see `oauth-store clients`")
    if not yes:
        if not json:
            _print_clients(listed)
        confirm(f"Remove it, and end {counted(listed[0].live_grants, 'grant')}, for good?", yes=False)
    ended = on_database(database, lambda found: _remove(found, client_id))
    for name in ended:
        emit("revoked", grant_id=name.grant_id, client_id=client_id, by=f"{operator()}, with oauth-store")
    if json:
        print_json({"client_id": client_id, "revoked": [name.grant_id.hex() for name in ended]})
    else:
        called = shown(listed[0].client_name or "") or shown(client_id)
        print(f"Removed {called}, and ended {counted(len(ended), 'grant')}.")


async def _remove(database: Database, client_id: str) -> list[GrantName]:
    now = int(time.time())
    async with database.write() as session:
        ending = await grants_to_end(session, now, client_id=client_id)
        # in the order of the flow steps, refresh tokens first, which the cascade does not know
        await session.run_sync(revoke_grants, [name.grant_id for name in ending], "its client is removed", now)
        await session.execute(delete(Code).where(Code.client_id == client_id))
        await session.execute(delete(Client).where(Client.client_id == client_id))
    return ending
