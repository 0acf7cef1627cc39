"""The three tables. Times are integer epoch seconds, scopes are space-separated, secrets are SHA-256 hashes."""

from typing import Any

from sqlalchemy import (
    VARBINARY,
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Connection,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    event,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

ACCESS, REFRESH, SESSION, SCOPES, ASSERTION = "access_token", "refresh_token", "session", "scopes", "assertion"
PASSKEY, ENROLLMENT, CHALLENGE, BROWSER = "passkey", "enrollment", "challenge", "browser"
"""The kinds of rows in `oauth_tokens`: the two tokens, by the hints of RFC 7009, the session on one page, the record of
a change of a grant's scopes, an assertion that was used, a passkey, the link that adds one, what a passkey signs or an
identity provider sends back, and a browser that stays signed in."""

DEVICE = "device"
"""The `redirect_uri` of a device's request (RFC 8628), which has none. It is no URI, so no client can register it."""

CLIENT_ID_LENGTH = 512
"""The longest client_id that is accepted, in characters; that of a client ID metadata document is a URL."""

NEVER = 0
"""The `last_used_at` of a client that was added by hand: no grant is approved yet, and it is never purged."""

# By default, MariaDB ignores the case of text in comparisons, and cannot index a blob.
_ClientId = String(CLIENT_ID_LENGTH).with_variant(String(CLIENT_ID_LENGTH, collation="utf8mb4_bin"), "mysql", "mariadb")
_Hash = LargeBinary(32).with_variant(VARBINARY(32), "mysql", "mariadb")
_GrantId = LargeBinary(16).with_variant(VARBINARY(16), "mysql", "mariadb")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Client(Base):
    """A registered client (RFC 7591). Its secret is stored as a hash, and is not in `client_metadata`."""

    __tablename__ = "oauth_clients"

    client_id: Mapped[str] = mapped_column(_ClientId, primary_key=True)
    client_metadata: Mapped[str] = mapped_column(Text)
    """The registration as JSON, without its secret."""
    client_secret_hash: Mapped[bytes | None] = mapped_column(_Hash)
    created_at: Mapped[int] = mapped_column(BigInteger)
    last_used_at: Mapped[int | None] = mapped_column(BigInteger)
    """Null until the owner has approved a grant: only such a registration may be purged. Or `NEVER`."""

    __table_args__ = (Index(None, "last_used_at", "created_at"),)


class Code(Base):
    """An authorization request, from /authorize to the exchange of its code (RFC 6749, section 4.1).

    The browser carries the handle and the client gets the code: two secrets, since anyone who starts a flow knows the
    handle. Only approved rows are searched for a code. A consumed one stays until it expires, so that its replay is
    detected. A device's request (RFC 8628) is such a row too: see `flows/devices.py`.
    """

    __tablename__ = "oauth_codes"

    handle_hash: Mapped[bytes] = mapped_column(_Hash, primary_key=True)
    code_hash: Mapped[bytes | None] = mapped_column(_Hash, unique=True)
    """Null until the owner has approved the request. Of a device's request, the device code's, from the start."""
    browser_hash: Mapped[bytes | None] = mapped_column(_Hash)
    """The cookie of the browser that started the request, where the approval sets one. Of a device's request, that of
    the browser in which its user code was typed last."""
    # No foreign key: a client that is known by its metadata document gets its row with the first approval.
    client_id: Mapped[str] = mapped_column(_ClientId, index=True)
    grant_id: Mapped[bytes] = mapped_column(_GrantId, index=True)
    subject: Mapped[str | None] = mapped_column(Text)
    redirect_uri: Mapped[str] = mapped_column(Text)
    redirect_uri_provided_explicitly: Mapped[bool] = mapped_column(Boolean)
    code_challenge: Mapped[str] = mapped_column(Text)
    scopes: Mapped[str] = mapped_column(Text)
    resource: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger, index=True)
    """The expiry of the request; after its approval, the expiry of the code."""
    approved_at: Mapped[int | None] = mapped_column(BigInteger)
    consumed_at: Mapped[int | None] = mapped_column(BigInteger)


class Token(Base):
    """An access token, a refresh token, or a row of another kind: see `kind`.

    A pair's two name each other; all of a grant share its `grant_id`. A token is live while it is neither expired,
    consumed nor revoked. Rotation consumes both of a pair; a consumed refresh token stays until it expires, so that its
    replay gets a response and its reuse is detected.
    """

    __tablename__ = "oauth_tokens"

    token_hash: Mapped[bytes] = mapped_column(_Hash, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    """One of the nine above. Every lookup names it."""
    paired_hash: Mapped[bytes | None] = mapped_column(_Hash)
    grant_id: Mapped[bytes] = mapped_column(_GrantId, index=True)
    client_id: Mapped[str | None] = mapped_column(
        _ClientId, ForeignKey("oauth_clients.client_id", ondelete="CASCADE"), index=True
    )
    """Null for a session, a browser, a passkey, and what adds or asks one."""
    subject: Mapped[str | None] = mapped_column(Text)
    scopes: Mapped[str] = mapped_column(Text)
    resource: Mapped[str | None] = mapped_column(Text)
    """The server that the token is for (RFC 8707). Null, in rows that came from VS-2, means this one."""
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger, index=True)
    first_used_at: Mapped[int | None] = mapped_column(BigInteger)
    """On a refresh token's row, when either token of the pair was first presented. On an access token's, when it was
    last presented, accurate to five minutes."""
    consumed_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_reason: Mapped[str | None] = mapped_column(String(64))
    replay: Mapped[bytes | None] = mapped_column(LargeBinary)
    """On a consumed refresh token: the pair that followed, sealed under the token itself."""
    granted_at: Mapped[int | None] = mapped_column(BigInteger)
    """When the grant was made. Null on its first pair, which is as old: that saves 8 bytes a pair."""


@event.listens_for(Base.metadata, "before_create")
def _set_options(metadata: MetaData, connection: Connection, **_: Any) -> None:
    """Set the options of MariaDB's tables. On the classes, they would import its dialect on each database: 8 ms."""
    if connection.dialect.name in ("mysql", "mariadb"):
        for table in metadata.tables.values():
            table.dialect_kwargs.update(_OPTIONS)


# The hot paths' statements name these tables: with the mapped classes, the ORM would process each statement and row, a
# fifth of a lookup and a third of a refresh.
clients = Base.metadata.tables[Client.__tablename__]
codes = Base.metadata.tables[Code.__tablename__]
tokens = Base.metadata.tables[Token.__tablename__]


UNUSED_CLIENT_SECONDS = 30 * 24 * 3600
"""How long a registration without an approved grant is kept. One with a grant is never deleted automatically."""

KEEP_EXPIRED_SECONDS = 7 * 24 * 3600
"""How long an unused refresh token is kept after its expiry: a clock may be ahead by this much."""

Now = int | BindParameter[int]


def is_live(now: Now) -> ColumnElement[bool]:
    """Match tokens that are neither expired, consumed nor revoked."""
    return (Token.expires_at > now) & Token.consumed_at.is_(None) & Token.revoked_at.is_(None)


def is_expired(model: type["Token"] | type["Code"], now: Now) -> ColumnElement[bool]:
    """Match rows that nothing needs any more: the purge deletes them.

    A refresh token that was neither used nor revoked can sign a client in: it stays for `KEEP_EXPIRED_SECONDS` more,
    and is live again if the clock that expired it was ahead.
    """
    if model is Code:
        return model.expires_at <= now
    dead = (Token.kind != REFRESH) | Token.consumed_at.is_not(None) | Token.revoked_at.is_not(None)
    return (Token.expires_at <= now) & (dead | (Token.expires_at <= now - KEEP_EXPIRED_SECONDS))


def is_unused(now: Now) -> ColumnElement[bool]:
    """Match clients whose registration was not approved in time."""
    return Client.last_used_at.is_(None) & (Client.created_at <= now - UNUSED_CLIENT_SECONDS)
