"""The doctor's check of the passkeys: each is for one server's URL, which a move changes."""

from urllib.parse import urlsplit

from sqlalchemy import select
from sqlalchemy.orm import Session

from oauth_store.database.models import ACCESS, REFRESH, tokens
from oauth_store.display import one_line
from oauth_store.doctor.finding import Finding, ok, warning
from oauth_store.errors import ConfigurationError
from oauth_store.flows.passkeys import Passkey, passkeys
from oauth_store.webauthn import RelyingParty

SHOWN = 5
"""Passkeys that a finding names."""


def examine_passkeys(session: Session, url: str | None) -> list[Finding]:
    """Compare the URL of each passkey with that of the server: `url`, or else that of the newest token."""
    found, server = passkeys(session), url or _newest_resource(session)
    if not server:
        return [ok("passkeys", f"{len(found)} can sign in")] if found else []
    host = urlsplit(server).hostname or ""
    try:
        RelyingParty.of(server)
    except ConfigurationError as error:
        advice = str(error)
        if not found:
            return [ok("passkeys", f"there can be none: {advice}")]
    else:
        advice = "set base_url to that URL again, or run `oauth-store passkey add` for each device"
    moved = [passkey for passkey in found if not _is_for(passkey, server.rstrip("/"))]
    if not moved:
        return [ok("passkeys", f"{len(found)} can sign in at {host}")] if found else []
    names = ", ".join(f"{passkey.name} of {passkey.user}" for passkey in moved[:SHOWN])
    urls = ", ".join(sorted({passkey.resource or passkey.url for passkey in moved}))
    more = f" and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    return [
        warning(
            "passkeys",
            f"{len(moved)} of {len(found)} cannot sign in at {server}: they are for {urls} ({one_line(names)}{more})",
            f"{advice}. Until then their users sign in with the password",
        )
    ]


def _is_for(passkey: Passkey, server: str) -> bool:
    """Return whether a passkey is for the server with this base_url or MCP endpoint."""
    of_passkey = {passkey.url.rstrip("/")} if passkey.resource is None else {passkey.url, passkey.resource.rstrip("/")}
    return server in of_passkey or (passkey.resource is None and server.startswith(f"{passkey.url.rstrip('/')}/"))


def _newest_resource(session: Session) -> str | None:
    """Return the server that issued the newest token."""
    newest = (
        select(tokens.c.resource)
        .where(tokens.c.kind.in_((ACCESS, REFRESH)), tokens.c.resource.is_not(None))
        .order_by(tokens.c.created_at.desc())
        .limit(1)
    )
    return session.execute(newest).scalar()
