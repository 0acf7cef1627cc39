"""The lower bound: plain sqlite3 with WAL and synchronous=FULL, sending the provider's statements.

It blocks the event loop, mints and seals nothing, and builds no responses.
"""

import secrets
import sqlite3
import time
from typing import Any

from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.expression import ClauseElement

from benchmarks.contenders import Contender
from oauth_store.credentials import hash_secret
from oauth_store.database.models import ACCESS, REFRESH, tokens
from oauth_store.flows import access, authorization, clients, code, refresh, revocation
from tests.steps import REDIRECT_URI, RESOURCE

REPLAY_BYTES = 12 + 101 + 16  # a nonce, two tokens with a space between them, and a tag


class Statement:
    """A statement as the provider sends it to SQLite, with its built-in values."""

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
        self.sql = str(compiled)
        self._built_in: dict[str, Any] = {}
        for name, value in compiled.params.items():
            if isinstance(value, list | tuple):  # of an IN
                named = {f"{name}_{place}": one for place, one in enumerate(value)}
                self.sql = self.sql.replace(f"__[POSTCOMPILE_{name}]", ", ".join(f":{one}" for one in named))
                self._built_in |= named
            elif value is not None:
                self._built_in[name] = value

    def __call__(self, connection: sqlite3.Connection, **values: Any) -> sqlite3.Cursor:
        return connection.execute(self.sql, {**self._built_in, **values})


_select_client = Statement(clients._client_by_id)
_select_code = Statement(code._code_by_hash)
_select_access_token = Statement(access._live_token_by_hash)
_select_refresh_token = Statement(refresh._token_by_hash)
_select_token = Statement(revocation._token_by_hash)
_select_pending = Statement(authorization._request_by_handle)
_approve = Statement(authorization._give_code)
_stamp_client = Statement(authorization._stamp_client)
_select_client_and_code = Statement(code._client_and_code)
_select_client_and_refresh_token = Statement(refresh._client_and_token)
_consume_code = Statement(code._consume)
_consume_refresh_token = Statement(refresh._consume)
_consume_access_token = Statement(refresh._consume_access_token)
_COLUMNS = [column.name for column in tokens.columns]
_INSERT_TOKEN = (
    "INSERT INTO oauth_tokens (token_hash, kind, paired_hash, grant_id, client_id, subject, scopes, resource,"
    " created_at, expires_at, granted_at) VALUES (?, ?, ?, ?, ?, NULL, 'read write', ?, ?, ?, ?)"
)


class PlainSQLite(Contender):
    """The provider's work on an SQLite file, without SQLAlchemy, threads or the provider."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._run = self._connection.execute

    async def close(self) -> None:
        self._connection.close()

    async def register(self, client: OAuthClientInformationFull) -> None:
        self._run("BEGIN IMMEDIATE")
        metadata, now = client.model_dump_json(exclude={"client_secret"}, exclude_none=True), int(time.time())
        self._run(
            "INSERT INTO oauth_clients (client_id, client_metadata, created_at) VALUES (?, ?, ?)",
            (client.client_id, metadata, now),
        )
        self._run("COMMIT")

    async def sign_in(self, client: OAuthClientInformationFull) -> OAuthToken:
        handle, code, grant_id, now = secrets.token_bytes(32), secrets.token_bytes(32), secrets.token_bytes(16), _now()
        self._run("BEGIN IMMEDIATE")
        self._run(
            "INSERT INTO oauth_codes (handle_hash, browser_hash, client_id, grant_id, redirect_uri,"
            " redirect_uri_provided_explicitly, code_challenge, scopes, resource, state, created_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?, 1, ?, 'read write', ?, 'the-state', ?, ?)",
            (handle, handle, client.client_id, grant_id, REDIRECT_URI, "c" * 43, RESOURCE, now, now + 600),
        )
        self._run("COMMIT")
        _select_pending(self._connection, b_hash=handle, b_now=now).fetchone()
        self._run("BEGIN IMMEDIATE")
        _approve(
            self._connection,
            b_hash=handle,
            b_now=now,
            b_code_hash=code,
            b_subject=None,
            b_scopes="read write",
            b_expires_at=now + 600,
        )
        _stamp_client(self._connection, b_client_id=client.client_id, b_now=now)
        self._run("COMMIT")
        _select_code(self._connection, b_hash=code, b_now=now).fetchone()
        _select_client_and_code(self._connection, b_hash=code, b_client_id=client.client_id, b_now=now).fetchone()
        self._run("BEGIN IMMEDIATE")
        _consume_code(self._connection, b_hash=code, b_now=now)
        issued = self._issue(grant_id, client.client_id, None)
        self._run("COMMIT")
        return issued

    def _issue(self, grant_id: bytes, client_id: str, granted_at: int | None) -> OAuthToken:
        pair = OAuthToken.model_construct(access_token=secrets.token_urlsafe(), refresh_token=secrets.token_urlsafe())
        access, refresh, now = hash_secret(pair.access_token), hash_secret(str(pair.refresh_token)), _now()
        self._connection.executemany(
            _INSERT_TOKEN,
            [
                (access, ACCESS, refresh, grant_id, client_id, RESOURCE, now, now + 3600, granted_at),
                (refresh, REFRESH, access, grant_id, client_id, RESOURCE, now, now + 30 * 24 * 3600, granted_at),
            ],
        )
        return pair

    async def verify(self, token: OAuthToken) -> Any:
        token_hash = hash_secret(token.access_token)
        return _select_access_token(self._connection, b_hash=token_hash, b_now=_now()).fetchone()

    async def get_client(self, client: OAuthClientInformationFull) -> Any:
        return _select_client(self._connection, b_client_id=client.client_id).fetchone()

    async def refresh(self, token: OAuthToken) -> OAuthToken:
        presented, now = hash_secret(str(token.refresh_token)), _now()
        row = dict(
            zip(_COLUMNS, _select_refresh_token(self._connection, b_hash=presented, b_now=now).fetchone(), strict=True)
        )
        _select_client_and_refresh_token(
            self._connection, b_hash=presented, b_client_id=row["client_id"], b_now=now
        ).fetchone()
        self._run("BEGIN IMMEDIATE")
        _consume_refresh_token(
            self._connection,
            b_hash=presented,
            b_now=now,
            b_replay=secrets.token_bytes(REPLAY_BYTES),
            b_granted=row["scopes"],
        )
        _consume_access_token(self._connection, b_hash=row["paired_hash"], b_now=now)
        issued = self._issue(row["grant_id"], row["client_id"], row["granted_at"] or row["created_at"])
        self._run("COMMIT")
        return issued

    async def revoke(self, token: OAuthToken) -> None:
        presented, now = hash_secret(str(token.refresh_token)), _now()
        _select_refresh_token(self._connection, b_hash=presented, b_now=now).fetchone()
        grant_id = _select_token(self._connection, b_hash=presented).fetchone()[_COLUMNS.index("grant_id")]
        self._run("BEGIN IMMEDIATE")
        self._run(
            "UPDATE oauth_codes SET consumed_at = coalesce(consumed_at, ?) WHERE grant_id IN (?)", (now, grant_id)
        )
        for kind in (REFRESH, ACCESS):
            self._run(
                "UPDATE oauth_tokens SET revoked_at = ?, revoked_reason = 'revoked by the client', replay = NULL"
                " WHERE grant_id IN (?) AND kind = ? AND revoked_at IS NULL",
                (now, grant_id, kind),
            )
        self._run("COMMIT")


def _now() -> int:
    return int(time.time())
