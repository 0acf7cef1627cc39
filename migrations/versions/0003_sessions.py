"""Sessions of the connected-apps page, which belong to no client; and when a grant was approved."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ClientId = sa.String(512).with_variant(
    mysql.VARCHAR(512, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)


def upgrade() -> None:
    with op.batch_alter_table("oauth_tokens", copy_from=tokens(client_id_is_nullable=False)) as table:
        table.alter_column("client_id", existing_type=ClientId, nullable=True)
        table.add_column(sa.Column("granted_at", sa.BigInteger()))


def downgrade() -> None:
    op.execute("DELETE FROM oauth_tokens WHERE client_id IS NULL")
    table_of_0003 = tokens(sa.Column("granted_at", sa.BigInteger()), client_id_is_nullable=True)
    with op.batch_alter_table("oauth_tokens", copy_from=table_of_0003) as table:
        table.drop_column("granted_at")
        table.alter_column("client_id", existing_type=ClientId, nullable=False)


def tokens(*more: sa.Column[int], client_id_is_nullable: bool) -> sa.Table:
    """Return the current table. SQLite has to copy it to change a column, and an SQL script cannot inspect it first."""
    table = sa.Table(
        "oauth_tokens",
        sa.MetaData(),
        sa.Column("token_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("paired_hash", sa.LargeBinary(32)),
        sa.Column("grant_id", sa.LargeBinary(16), nullable=False),
        sa.Column("client_id", ClientId, nullable=client_id_is_nullable),
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
        *more,
        sa.PrimaryKeyConstraint("token_hash", name="pk_oauth_tokens"),
        sa.ForeignKeyConstraint(
            ["client_id"], ["oauth_clients.client_id"], name="fk_oauth_tokens_client_id", ondelete="CASCADE"
        ),
    )
    for column in ("grant_id", "client_id", "expires_at"):
        sa.Index(f"ix_oauth_tokens_{column}", table.c[column])
    return table
