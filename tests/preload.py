"""What `tests.forks` imports before it forks: all that `oauth-store` imports late."""
# ruff: noqa: F401 (they are imported to be there in each fork)

import encodings.idna
import gc

import alembic.command
import sqlalchemy.dialects.sqlite.aiosqlite

import oauth_store.doctor.examine
import oauth_store.flows.explain
import oauth_store.flows.registration
import oauth_store.pages.passwords
import tests.commands

gc.collect()
gc.freeze()  # a full collection in a fork would take 0.15 s, and copy the memory that it shares
