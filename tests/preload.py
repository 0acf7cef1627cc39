"""What `tests.forks` imports before it forks: all that `oauth-store` imports late."""
# ruff: noqa: F401 (they are imported to be there in each fork)

import encodings.idna

import alembic.command
import sqlalchemy.dialects.sqlite.aiosqlite

import oauth_store.doctor
import oauth_store.explanation
import oauth_store.registration
import oauth_store.sign_in
import tests.commands
