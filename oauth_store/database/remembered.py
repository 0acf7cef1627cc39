"""Verified tokens of an SQLite file, remembered until the next commit of any process."""

import os
import sqlite3
import threading
import time
from typing import Any

LIMIT = 10_000
"""The most tokens remembered; beyond that, the oldest is dropped."""
LOOK_SECONDS = 0.05
"""How often to check whether the file is still the one at its path. Each check lets other threads have the
interpreter: at 16 connections, a check per verification costs 2 percent of the calls. No process can start on another
file any faster."""


class Remembered:
    """The fields of tokens, by the hash of the token, each until something is committed to the file.

    Once any process has revoked or rotated a token and its commit is acknowledged, the next verification that starts
    refuses it: `PRAGMA data_version`, on a connection that never writes, changes with every commit of any other
    connection, of this process too. Where it is unavailable, nothing is remembered.
    """

    def __init__(self, path: str, inode: int) -> None:
        """Open a separate connection to the file with this inode. Blocks, as `close` does: not for an event loop."""
        self._path = path
        # No timeout: instead of waiting for the counter, the token is looked up.
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self._inode = inode if os.stat(path).st_ino == inode else None  # None: another file was opened, of no use
        self._looked_at = -LOOK_SECONDS
        self._in_use = threading.Lock()  # a fork closes it in a thread of its own: SQLite's are not for two at once
        self._cursor = self._connection.cursor()  # kept: a new one for each call takes a microsecond of its 4
        self._verified: dict[bytes, tuple[int, dict[str, Any]]] = {}

    def version(self) -> int | None:
        """Return the number that the latest commit gave the file, or None if it is unknown.

        The only call of ours that blocks the event loop: it takes 5 microseconds, where a thread would take 80, and 50
        while another process holds an exclusive lock. It never waits.
        """
        try:
            now = time.monotonic()
            if now - self._looked_at >= LOOK_SECONDS:
                if os.stat(self._path).st_ino != self._inode:
                    return None  # others may commit to the file that is there now
                self._looked_at = now
            with self._in_use:
                [(version,)] = self._cursor.execute("PRAGMA data_version").fetchall()
        except Exception:  # SQLite's, stat's, or of a tool that forbids blocking: the token is looked up
            return None
        return int(version)

    def recall(self, token_hash: bytes) -> dict[str, Any] | None:
        """Return the current fields of a token in the file, or None if they are not known.

        The caller checks its expiry and its resource. Fields rather than a row: that saves 1 microsecond of 10.
        """
        version, fields = self._verified.get(token_hash, (None, None))
        return fields if version is not None and version == self.version() else None

    def remember(self, token_hash: bytes, fields: dict[str, Any], version: int | None) -> None:
        """Remember the fields of a token. `version` must have been read before the token was."""
        if version is None:
            return
        if len(self._verified) >= LIMIT:
            self._verified.pop(next(iter(self._verified)))
        self._verified[token_hash] = (version, fields)

    def close(self) -> None:
        with self._in_use:
            self._connection.close()
