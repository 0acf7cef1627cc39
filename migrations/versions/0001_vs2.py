"""The schema of VS-2. A database that already has its tables is accepted as it is."""

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Key = sa.Text().with_variant(sa.String(512), "mysql", "mariadb")  # MariaDB cannot index TEXT


def upgrade() -> None:
    op.create_table(
        "oauth_clients",
        sa.Column("client_id", _Key, primary_key=True),
        sa.Column("client_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "oauth_codes",
        sa.Column("code", _Key, primary_key=True),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("redirect_uri", sa.Text(), nullable=False),
        sa.Column("redirect_uri_provided_explicitly", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("code_challenge", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("resource", sa.Text()),
        if_not_exists=True,
    )
    op.create_table(
        "oauth_tokens",
        sa.Column("token", _Key, primary_key=True),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("token_type", sa.Text(), nullable=False),
        sa.Column("refresh_token", sa.Text()),
        sa.Column("resource", sa.Text()),
        if_not_exists=True,
    )


def downgrade() -> None:
    if not context.is_offline_mode():
        lost = [
            op.get_bind().execute(sa.select(sa.func.count()).select_from(sa.table(table))).scalar_one()
            for table in ("oauth_clients", "oauth_tokens", "oauth_codes")
        ]
        context.config.print_stdout(
            "The downgrade to base deletes %d registered clients, %d tokens and %d codes.", *lost
        )
    for table in ("oauth_tokens", "oauth_codes", "oauth_clients"):
        op.drop_table(table)
