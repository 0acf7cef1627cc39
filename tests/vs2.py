"""What a VS-2 server leaves behind."""

import json
import os
import secrets
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp.shared.auth import OAuthClientInformationFull
from pydantic import AnyUrl

from oauth_store.database.schema import upgrade
from tests.databases import execute, is_server

ROOT = Path(__file__).parent.parent

SCHEMA = """
CREATE TABLE IF NOT EXISTS oauth_clients (
    client_id TEXT PRIMARY KEY,
    client_json TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS oauth_codes (
    code TEXT PRIMARY KEY,
    client_id TEXT NOT NULL,
    redirect_uri TEXT NOT NULL,
    redirect_uri_provided_explicitly INTEGER NOT NULL DEFAULT 1,
    code_challenge TEXT NOT NULL,
    scopes TEXT NOT NULL,
    expires_at REAL NOT NULL,
    resource TEXT
);
CREATE TABLE IF NOT EXISTS oauth_tokens (
    token TEXT PRIMARY KEY,
    client_id TEXT NOT NULL,
    scopes TEXT NOT NULL,
    expires_at INTEGER,
    token_type TEXT NOT NULL,
    refresh_token TEXT,
    resource TEXT
);
"""
COLUMNS = {
    "oauth_clients": ("client_id", "client_json", "created_at"),
    "oauth_codes": (
        "code",
        "client_id",
        "redirect_uri",
        "redirect_uri_provided_explicitly",
        "code_challenge",
        "scopes",
        "expires_at",
        "resource",
    ),
    "oauth_tokens": ("token", "client_id", "scopes", "expires_at", "token_type", "refresh_token", "resource"),
}

PUBLIC = "public-client"
CONFIDENTIAL = "confidential-client"
GONE = "client-that-is-gone"
REDIRECT_URI = "https://claude.ai/api/mcp/auth_callback"
DELETED_PAIRS = 400
"""So many that whole pages are free, not only parts of them."""

Rows = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Pair:
    """An access and a refresh token that name each other."""

    access: str
    refresh: str


@dataclass
class VS2:
    """The rows of a VS-2 server; `resource` is the MCP endpoint that its clients asked tokens for."""

    resource: str
    now: int = field(default_factory=lambda: int(time.time()))
    rows: Rows = field(default_factory=lambda: {table: [] for table in COLUMNS})
    deleted: Rows = field(default_factory=lambda: {table: [] for table in COLUMNS})
    """Rows that the server deleted: an SQLite file still holds them, on free pages."""
    secrets: list[str] = field(default_factory=list)
    """Every token, code and client secret that was ever in the database."""

    def __post_init__(self) -> None:
        self.client_secret = self._secret("", 32)
        self._client(PUBLIC, None)
        self._client(CONFIDENTIAL, self.client_secret)
        self.signed_in = self._pair(PUBLIC, self.resource)
        self.refreshed = self._pair(PUBLIC, None)  # VS-2 forgets the resource when it refreshes
        self.confidential = self._pair(CONFIDENTIAL, self.resource)
        self.access_expired = self._pair(PUBLIC, self.resource, access_expires_at=self.now - 60)
        self.expired = self._pair(
            PUBLIC, self.resource, access_expires_at=self.now - 3600, refresh_expires_at=self.now - 60
        )
        self.orphaned = self._pair(GONE, self.resource)
        self.lone_access, self.lone_refresh = self._secret("access_"), self._secret("refresh_")
        self._token(self.lone_access, "access", self._secret("refresh_"))
        self._token(self.lone_refresh, "refresh", self._secret("access_"))
        self.endless = self._secret("access_")
        self._token(self.endless, "access", None, expires_at=None)
        self.code = self._secret("authcode_", 20)
        self.rows["oauth_codes"].append(self._code(self.code))
        for _ in range(DELETED_PAIRS):
            self._pair(PUBLIC, self.resource, rows=self.deleted)
        self.deleted["oauth_codes"].append(self._code(self._secret("authcode_", 20)))
        self._client(GONE, self._secret("", 32), rows=self.deleted)

    def _secret(self, prefix: str, size: int = 32) -> str:
        self.secrets.append(prefix + secrets.token_hex(size))
        return self.secrets[-1]

    def _client(self, client_id: str, client_secret: str | None, rows: Rows | None = None) -> None:
        client = OAuthClientInformationFull(
            client_id=client_id,
            client_secret=client_secret,
            client_id_issued_at=self.now - 86400,
            redirect_uris=[AnyUrl(REDIRECT_URI)],
            token_endpoint_auth_method="client_secret_post" if client_secret else "none",
            client_name="Claude",
            scope="read write",
        )
        (rows or self.rows)["oauth_clients"].append((client_id, client.model_dump_json(), self.now - 86400 + 0.25))

    def _pair(
        self,
        client_id: str,
        resource: str | None,
        *,
        access_expires_at: int | None = None,
        refresh_expires_at: int | None = None,
        rows: Rows | None = None,
    ) -> Pair:
        pair = Pair(self._secret("access_"), self._secret("refresh_"))
        for token, kind, paired, expires_at in (
            (pair.access, "access", pair.refresh, access_expires_at or self.now + 3600),
            (pair.refresh, "refresh", pair.access, refresh_expires_at or self.now + 30 * 24 * 3600),
        ):
            self._token(token, kind, paired, client_id=client_id, expires_at=expires_at, resource=resource, rows=rows)
        return pair

    def _token(
        self,
        token: str,
        token_type: str,
        paired: str | None,
        *,
        client_id: str = PUBLIC,
        expires_at: int | None = -1,
        resource: str | None = None,
        rows: Rows | None = None,
    ) -> None:
        if expires_at == -1:
            expires_at = self.now + 3600
        row = (token, client_id, json.dumps(["read", "write"]), expires_at, token_type, paired, resource)
        (rows or self.rows)["oauth_tokens"].append(row)

    def _code(self, code: str) -> tuple[Any, ...]:
        challenge = secrets.token_urlsafe(32)
        return (code, PUBLIC, REDIRECT_URI, 1, challenge, json.dumps(["read"]), self.now + 300.5, self.resource)

    def write(self, url: str) -> None:
        """Make the empty database at `url` a VS-2 server's: a file as it left it, or its tables on PostgreSQL."""
        if not is_server(url):
            self.write_file(url)
            return
        upgrade(url, "0001")
        for table, rows in self.rows.items():
            placeholders = ", ".join(f":{column}" for column in COLUMNS[table])
            values = [dict(zip(COLUMNS[table], row, strict=True)) for row in rows]
            execute(url, f"INSERT INTO {table} VALUES ({placeholders})", values=values)

    def write_file(self, path: Path | str, *, killed: bool = False) -> None:
        """Write the SQLite file of the server; of a `killed` one, the last writes stand in its -wal alone."""
        if killed:
            work = json.dumps([str(path), self.rows, self.deleted])
            subprocess.run([sys.executable, "-m", "tests.vs2"], cwd=ROOT, input=work.encode(), check=True)
        else:
            _write(str(path), self.rows, self.deleted).close()


def _write(path: str, rows: Rows, deleted: Rows) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA secure_delete = OFF")  # as SQLite has it, though some builds do not
    connection.executescript(SCHEMA)
    _insert(connection, deleted)
    for table in COLUMNS:
        connection.execute(f"DELETE FROM {table}")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _insert(connection, rows)
    return connection


def _insert(connection: sqlite3.Connection, rows: Rows) -> None:
    connection.execute("BEGIN")
    for table, columns in COLUMNS.items():
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", rows[table])
    connection.execute("COMMIT")


if __name__ == "__main__":
    left_open = _write(*json.load(sys.stdin))
    os._exit(0)  # neither closes the file nor writes its -wal back
