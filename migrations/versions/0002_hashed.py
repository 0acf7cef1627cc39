"""Secrets as hashes, grants, and the authorization request: the schema of oauth_store.

Keeps the clients of VS-2 (with the secret moved from the JSON to a hash) and its live tokens, so that its clients stay
authorized. Drops codes, which live for ten minutes, and tokens whose client is gone.
"""

import hashlib
import json
import secrets
import time
from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

from oauth_store.errors import SchemaError

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = ("oauth_tokens", "oauth_codes", "oauth_clients")
KINDS = {"access": "access_token", "refresh": "refresh_token"}
LIFETIME_SECONDS = {"access_token": 3600, "refresh_token": 30 * 24 * 3600}
"""The lifetime, from now on, of a token without an expiry: nothing lives forever."""

ClientId = sa.String(512).with_variant(
    mysql.VARCHAR(512, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
Hash = sa.LargeBinary(32).with_variant(mysql.VARBINARY(32), "mysql", "mariadb")
GrantId = sa.LargeBinary(16).with_variant(mysql.VARBINARY(16), "mysql", "mariadb")

OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def upgrade() -> None:
    if context.is_offline_mode():
        refuse_clients_offline()
        clients, tokens = [], []
    else:
        now = int(time.time())
        clients = [converted_client(row) for row in rows("oauth_clients")]
        tokens = converted_tokens({client["client_id"] for client in clients}, now)
    # Renaming instead would keep the old constraints' names on PostgreSQL.
    drop_tables()
    create_tables()
    if context.is_offline_mode():
        end_refusal_offline()
    insert("oauth_clients", clients)
    insert("oauth_tokens", tokens)


def downgrade() -> None:
    clients: list[dict[str, Any]] = []
    if context.is_offline_mode():
        if op.get_context().dialect.name == "sqlite":
            raise SchemaError("an SQL script cannot take SQLite down to 0001 without losing its clients; run it online")
        refuse_clients_offline()
        op.drop_table(REFUSAL)
    else:
        clients = [
            {
                "client_id": row.client_id,
                "client_json": row.client_metadata,
                "created_at": float(row.created_at),
            }
            for row in rows("oauth_clients")
        ]
        lost = {name: len(rows(name)) for name in ("oauth_tokens", "oauth_codes")}
        context.config.print_stdout(
            "The downgrade to 0001 keeps %d registered clients, and deletes %d tokens, %d codes and every client "
            "secret: only their hashes are known. You must authorize all clients again.",
            len(clients),
            lost["oauth_tokens"],
            lost["oauth_codes"],
        )
    drop_tables()
    context.script.get_revision("0001").module.upgrade()
    insert("oauth_clients", clients)


def create_tables() -> None:
    op.create_table(
        "oauth_clients",
        sa.Column("client_id", ClientId, nullable=False),
        sa.Column("client_metadata", sa.Text(), nullable=False),
        sa.Column("client_secret_hash", Hash),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("client_id", name="pk_oauth_clients"),
        **OPTIONS,
    )
    op.create_index("ix_oauth_clients_last_used_at_created_at", "oauth_clients", ["last_used_at", "created_at"])
    op.create_table(
        "oauth_codes",
        sa.Column("handle_hash", Hash, nullable=False),
        sa.Column("code_hash", Hash),
        sa.Column("browser_hash", Hash),
        sa.Column("client_id", ClientId, nullable=False),
        sa.Column("grant_id", GrantId, nullable=False),
        sa.Column("subject", sa.Text()),
        sa.Column("redirect_uri", sa.Text(), nullable=False),
        sa.Column("redirect_uri_provided_explicitly", sa.Boolean(), nullable=False),
        sa.Column("code_challenge", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text()),
        sa.Column("state", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("approved_at", sa.BigInteger()),
        sa.Column("consumed_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("handle_hash", name="pk_oauth_codes"),
        sa.UniqueConstraint("code_hash", name="uq_oauth_codes_code_hash"),
        **OPTIONS,
    )
    for column in ("client_id", "grant_id", "expires_at"):
        op.create_index(f"ix_oauth_codes_{column}", "oauth_codes", [column])
    op.create_table(
        "oauth_tokens",
        sa.Column("token_hash", Hash, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("paired_hash", Hash),
        sa.Column("grant_id", GrantId, nullable=False),
        sa.Column("client_id", ClientId, nullable=False),
        sa.Column("subject", sa.Text()),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("first_used_at", sa.BigInteger()),
        sa.Column("consumed_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("revoked_reason", sa.String(64)),
        sa.Column("replay", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("token_hash", name="pk_oauth_tokens"),
        sa.ForeignKeyConstraint(
            ["client_id"], ["oauth_clients.client_id"], name="fk_oauth_tokens_client_id", ondelete="CASCADE"
        ),
        **OPTIONS,
    )
    for column in ("grant_id", "client_id", "expires_at"):
        op.create_index(f"ix_oauth_tokens_{column}", "oauth_tokens", [column])


def converted_client(row: Any) -> dict[str, Any]:
    metadata = parsed(row.client_json, dict, f"client {row.client_id}")
    secret = metadata.pop("client_secret", None)
    return {
        "client_id": row.client_id,
        "client_metadata": json.dumps({key: value for key, value in metadata.items() if value is not None}),
        "client_secret_hash": sha256(secret) if secret else None,
        "created_at": int(row.created_at),
        "last_used_at": int(row.created_at),  # it may have been used, and this way it is never purged
    }


def converted_tokens(clients: set[str], now: int) -> list[dict[str, Any]]:
    live = {
        row.token: row
        for row in rows("oauth_tokens")
        if row.client_id in clients and (row.expires_at is None or row.expires_at > now)
    }
    grants: dict[str, bytes] = {}
    converted = []
    for token, row in live.items():
        which = f"the token of client {row.client_id} that expires at {row.expires_at}"  # never the token itself
        if row.token_type not in KINDS:
            raise SchemaError(f"{which} has the unknown type {row.token_type!r}; fix or delete that row; {UNCHANGED}")
        kind = KINDS[row.token_type]
        scopes = parsed(row.scopes, list, which)
        if not all(isinstance(scope, str) for scope in scopes):
            raise unreadable(which)
        paired = row.refresh_token if row.refresh_token in live else None
        grant_id = grants.get(token) or grants.get(paired or token) or secrets.token_bytes(16)
        grants[token] = grants[paired or token] = grant_id
        converted.append(
            {
                "token_hash": sha256(token),
                "kind": kind,
                "paired_hash": None if paired is None else sha256(paired),
                "grant_id": grant_id,
                "client_id": row.client_id,
                "scopes": " ".join(scopes),
                "resource": row.resource,
                "created_at": now,
                "expires_at": int(row.expires_at or now + LIFETIME_SECONDS[kind]),
            }
        )
    return converted


UNCHANGED = "the database is unchanged"


def parsed(value: str, kind: type, which: str) -> Any:
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise unreadable(which)
    return found


def unreadable(which: str) -> SchemaError:
    return SchemaError(f"{which} cannot be read: its JSON is broken; fix or delete that row; {UNCHANGED}")


REFUSAL = "oauth_store_offline_sql_is_for_empty_databases_only"


def refuse_clients_offline() -> None:
    # SQL alone cannot hash, so it cannot keep rows, and must not drop them either.
    op.execute(f"CREATE TABLE {REFUSAL} (held BIGINT CHECK (held = 0))")
    op.execute(f"INSERT INTO {REFUSAL} SELECT count(*) FROM oauth_clients")  # noqa: S608 (a constant)


def end_refusal_offline() -> None:
    if op.get_context().dialect.name == "sqlite":
        # After an error the sqlite3 shell continues up to the COMMIT. A token without a client makes that fail too.
        op.execute("PRAGMA defer_foreign_keys = ON")
        op.execute(
            "INSERT INTO oauth_tokens (token_hash, kind, grant_id, client_id, scopes, created_at, expires_at) "  # noqa: S608 (constants)
            f"SELECT '', '', '', '', '', 0, 0 WHERE NOT EXISTS (SELECT * FROM {REFUSAL})"
        )
    op.drop_table(REFUSAL)


def rows(table: str) -> list[Any]:
    return list(op.get_bind().execute(sa.text(f"SELECT * FROM {table}")))  # noqa: S608 (a constant of this file)


def insert(table: str, values: list[dict[str, Any]]) -> None:
    if values:
        reflected = sa.Table(table, sa.MetaData(), autoload_with=op.get_bind())
        op.get_bind().execute(reflected.insert(), values)


def drop_tables() -> None:
    for table in TABLES:
        op.drop_table(table)


def sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
