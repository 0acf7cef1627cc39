"""Verified tokens of an SQLite file, remembered exactly: until the next commit of anyone."""

import os
import sqlite3
from typing import Any

from sqlalchemy import Row

LIMIT = 10_000
"""Tokens that are remembered at most; then the oldest makes room."""


class Memory:
    """The rows of tokens, by their hashes, each for as long as nothing is committed to the file.

    A token that any process revoked or rotated is refused by the very next verification that starts after that commit
    was acknowledged: `PRAGMA data_version`, on a connection that never writes, changes with every commit of any other
    connection, of this process too. Where it cannot be had, nothing is remembered.
    """

    def __init__(self, path: str, inode: int) -> None:
        """Open a connection of its own to the file that has this inode. Blocks, as `close` does: not for a loop."""
        self._path = path
        # No timeout: where the counter would have to be waited for, the token is looked up instead.
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self._inode = inode if os.stat(path).st_ino == inode else None  # None: another file was opened, of no use
        self._rows: dict[bytes, tuple[int, Row[Any]]] = {}

    def version(self) -> int | None:
        """Return the number that the latest commit gave the file, or None if it cannot be told.

        The one call of ours that blocks the event loop: it takes 4 microseconds where a thread would take 80 to
        answer, and 50 while another process holds an exclusive lock. It never waits.
        """
        try:
            if os.stat(self._path).st_ino != self._inode:
                return None  # others may commit to the file that is there now
            version: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        except Exception:  # SQLite's, stat's, or of a tool that lets nothing block: the token is looked up
            return None
        return version

    def recall(self, token_hash: bytes) -> Row[Any] | None:
        """Return the row as it stands in the file now, or None if it is not known. Its expiry is the caller's."""
        version, row = self._rows.get(token_hash, (None, None))
        return row if version is not None and version == self.version() else None

    def remember(self, row: Row[Any], version: int | None) -> None:
        """Remember a row. `version` must have been asked for before the row was."""
        if version is None:
            return
        if len(self._rows) >= LIMIT:
            self._rows.pop(next(iter(self._rows)))
        self._rows[row.token_hash] = (version, row)

    def close(self) -> None:
        self._connection.close()
