"""The commands for grants and tokens: `grants`, `revoke` and `explain`."""

import getpass
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import ArgumentCollection, Group, Parameter

from oauth_store.cli.terminal import (
    LIMIT,
    DatabaseOption,
    Json,
    Limit,
    OpenStore,
    Verbose,
    Yes,
    confirm,
    counted,
    flag,
    log_events,
    opened,
    operator,
    print_by_server,
    print_json,
    print_more,
    print_table,
    print_text,
)
from oauth_store.display import ago, iso, one_line, short_line, with_age
from oauth_store.errors import OAuthStoreError
from oauth_store.flows.connected import BATCH, LiveGrant, end_grants, grants_named, grants_to_end, live_grants
from oauth_store.flows.scopes import ScopeChange, changes_of

if TYPE_CHECKING:
    from oauth_store.flows.explain import Explanation

ID_SHOWN = 12
PREVIEW = 20
"""Maximum grants to show before they are revoked."""
LINE_LENGTH = 16 * 1024
"""Maximum characters to read of a token."""


def _exactly_one(chosen: ArgumentCollection) -> None:
    if len(chosen.filter_by(value_set=True)) != 1:
        raise ValueError("Give exactly one of GRANT, --client, --subject and --all.")


_choice = Group("Which grants", sort_key=0, validator=_exactly_one)

ClientOption = Annotated[str | None, Parameter(name="--client", help="Only grants of the client with this client_id.")]
SubjectOption = Annotated[str | None, Parameter(name="--subject", help="Only grants that this user approved.")]


def grants(
    *,
    client: ClientOption = None,
    subject: SubjectOption = None,
    limit: Limit = LIMIT,
    database: DatabaseOption = None,
    json: Json = False,
) -> None:
    """List the live grants: each is one device or app with access, most recently used first.

    If several servers use the database, each has a table. The last use is accurate to five minutes.
    """

    with opened(database) as store:
        listed, total = store.read(live_grants, subject=subject, client_id=client, limit=limit or None)
        changes = store.read(changes_of, [grant.grant_id for grant in listed])
    if json:
        print_json({"total": total, "grants": [_as_json(grant, changes) for grant in listed]})
    elif not listed:
        print("No live grants." if client is subject is None else "No live grant matches.")
    else:
        _print_grants(listed)
        _print_changes(changes)
        print_more(total - len(listed), "grant", "use --limit to show more, or --limit 0 to show all")


def _print_grants(listed: list[LiveGrant]) -> None:
    print_by_server(listed, _print_table)


def _print_table(listed: list[LiveGrant]) -> None:
    now = int(time.time())
    columns = ["Grant", "Client", "Host", "Scopes", "Subject", "Created", "Last used", "Expires"]
    rows = [
        [
            grant.grant_id.hex()[:ID_SHOWN],
            short_line(grant.client_name or "") or short_line(grant.client_id),
            ", ".join(map(short_line, grant.hosts)) or "-",
            " ".join(grant.scopes),
            grant.subject or "-",
            ago(grant.granted_at, now),
            ago(grant.last_used_at, now),
            ago(grant.expires_at, now),
        ]
        for grant in listed
    ]
    print_table(columns, rows, whole=["Grant", "Created", "Last used", "Expires"])


def _print_changes(changes: Mapping[bytes, Sequence[ScopeChange]]) -> None:
    now = int(time.time())
    if changes:
        print("\nLast change of scopes:")
    for grant_id, of_grant in changes.items():
        print(f"  {grant_id.hex()[:ID_SHOWN]}  {of_grant[-1].in_words(now)}")


def change_as_json(change: ScopeChange) -> dict[str, Any]:
    """Return a change of scopes as `--json` prints it."""
    return {"added": change.added, "removed": change.removed, "at": iso(change.at), "by": change.by}


def _as_json(grant: LiveGrant, changes: Mapping[bytes, Sequence[ScopeChange]]) -> dict[str, Any]:
    return {
        "grant_id": grant.grant_id.hex(),
        "client_id": grant.client_id,
        "client_name": grant.client_name,
        "hosts": grant.hosts,
        "scopes": grant.scopes,
        "scope_changes": [change_as_json(change) for change in changes.get(grant.grant_id, ())],
        "subject": grant.subject,
        "resource": grant.resource,
        "created_at": iso(grant.granted_at),
        "last_used_at": iso(grant.last_used_at),
        "expires_at": iso(grant.expires_at),
    }


def revoke(
    grant: Annotated[
        str | None, Parameter(group=_choice, help="A grant's id, or at least its first 6 digits: see `grants`.")
    ] = None,
    /,
    *,
    client: Annotated[str | None, Parameter(name="--client", group=_choice, help="All grants of a client_id.")] = None,
    subject: Annotated[str | None, Parameter(name="--subject", group=_choice, help="All grants of one user.")] = None,
    everything: Annotated[bool, flag("--all", group=_choice, help="All grants.")] = False,
    database: DatabaseOption = None,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Revoke grants: every server on the database refuses their tokens at once.

    Shows the grants, and asks before it revokes them. Approved codes that are not exchanged yet are revoked too.
    """
    if verbose:
        log_events()
    with opened(database) as store:
        grant_id = None if grant is None else _named(store, grant)
        selection: dict[str, Any] = {"subject": subject, "client_id": client, "grant_id": grant_id}
        ended = store.read(grants_to_end, int(time.time()), **selection)
        if ended and not yes:
            if not json:
                listed, total = store.read(live_grants, limit=PREVIEW, **selection)
                _print_grants(listed)
                print_more(total - len(listed), "grant", "list them with `oauth-store grants`")
            confirm(f"Revoke {counted(len(ended), 'grant')} permanently?", yes=False)
        by = f"{operator()}, with oauth-store"
        for start in range(0, len(ended), BATCH):
            batch = ended[start : start + BATCH]
            store.write(end_grants, batch, f"revoked with oauth-store by {operator()}", by, int(time.time()))
    if not ended and not everything:
        raise OAuthStoreError("no live grant matches; see `oauth-store grants`")
    if json:
        print_json({"total": len(ended), "revoked": [name.grant_id.hex() for name in ended]})
    else:
        print(f"Revoked {counted(len(ended), 'grant')}." if ended else "No live grants.")


def live_grant(store: OpenStore, prefix: str) -> LiveGrant:
    """Return the live grant that an id or its first digits name. Raises `OAuthStoreError`."""
    listed, _ = store.read(live_grants, grant_id=_named(store, prefix))
    if not listed:
        raise OAuthStoreError(f"the grant {prefix} is not live; see `oauth-store grants`")
    return listed[0]


def _named(store: OpenStore, prefix: str) -> bytes:
    if not re.fullmatch("[0-9a-f]{6,32}", prefix.lower()):
        raise OAuthStoreError(f"{one_line(prefix)!r} is not the id of a grant; expected 6 to 32 hex digits")
    grant_ids = store.read(grants_named, prefix.lower())
    if len(grant_ids) == 1:
        return grant_ids[0]
    if grant_ids:
        examples = " and ".join(grant_id.hex() for grant_id in grant_ids[:2])
        raise OAuthStoreError(f"several grants begin with {prefix}, such as {examples}; give more digits")
    raise OAuthStoreError(f"no grant begins with {prefix}; see `oauth-store grants`")


def explain(*, database: DatabaseOption = None, json: Json = False) -> int:
    """Explain what a token is, and why the server accepts or refuses it.

    Paste the token at the prompt, which does not show it, or pipe it to standard input. It is never an argument: others
    on the machine could read that. Codes, sessions and client secrets work too. Exits with 1 if the token is refused.
    """
    secret = _read_secret()

    from oauth_store.flows.explain import explain as explain_secret  # brings cryptography

    with opened(database) as store:
        explanation = store.read(explain_secret, secret, int(time.time()))
    if json:
        print_json(_explanation_as_json(explanation))
    else:
        _print_explanation(explanation)
    return 0 if explanation.live else 1


def _read_secret() -> str:
    if sys.stdin.isatty():
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # fail rather than show the token
            try:
                line = getpass.getpass("Token (not shown): ", sys.stderr)
            except (getpass.GetPassWarning, EOFError):
                line = ""
    else:
        line = sys.stdin.readline(LINE_LENGTH)
    secret = re.sub(r"^(authorization:)?\s*bearer(\s+|$)", "", line.strip(), flags=re.IGNORECASE)
    if not secret:
        raise OAuthStoreError("no token was given; paste it at the prompt, or pipe it to standard input")
    return secret


def _print_explanation(explanation: "Explanation") -> None:
    now = int(time.time())
    client = None if explanation.client_id is None else one_line(explanation.client_id)
    if name := short_line(explanation.client_name or ""):
        client = f"{name} ({client})"
    times = {
        "Issued": explanation.created_at,
        "First used": explanation.first_used_at,
        "Last used": explanation.last_used_at,
        "Used up": explanation.consumed_at,
        "Revoked": explanation.revoked_at,
        "Expires": explanation.expires_at,
    }
    facts = {
        "Client": client,
        "Host": client and (", ".join(map(short_line, explanation.hosts)) or "-"),
        "Grant": None if explanation.grant_id is None else explanation.grant_id.hex(),
        "Subject": explanation.subject,
        "Scopes": " ".join(explanation.scopes),
        "Resource": explanation.resource,
        **{name: None if at is None else with_age(at, now) for name, at in times.items()},
    }
    state = explanation.state.replace("_", " ")
    print(f"{explanation.kind[0].upper()}{explanation.kind[1:]}: {state}")
    for name, value in facts.items():
        if value:
            print(f"  {name + ':':11} {one_line(value)}")
    for change in explanation.scope_changes:
        print(f"  {'Changed:':11} {change.in_words(now)}")
    print_text(explanation.text)
    print_text(f"What to do: {explanation.advice}")


def _explanation_as_json(explanation: "Explanation") -> dict[str, Any]:
    fields = {name: value for name, value in asdict(explanation).items() if name not in ("text", "advice")}
    times = {name: iso(value) for name, value in fields.items() if name.endswith("_at")}
    grant_id = None if explanation.grant_id is None else explanation.grant_id.hex()
    return {
        "live": explanation.live,
        **fields,
        **times,
        "scope_changes": [change_as_json(change) for change in explanation.scope_changes],
        "grant_id": grant_id,
        "explanation": explanation.text,
        "advice": explanation.advice,
    }
