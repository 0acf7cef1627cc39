"""The names of our tables, for the Alembic of an application that shares the database."""

from typing import Any

from oauth_store.database.models import Base

VERSION_TABLE = "oauth_store_version"
"""The table that holds the revision of our schema."""

_OURS = {VERSION_TABLE, *(table.name for table in Base.metadata.tables.values())}


def include_name(name: str | None, type_: str, _parent_names: Any = None, /) -> bool:
    """Hide the tables of this package from an application's Alembic: the `include_name` of its `context.configure`.

    Returns False for these tables, in any schema of the database, and True for every other name.
    """
    return type_ != "table" or name not in _OURS
