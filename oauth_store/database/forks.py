"""What a process inherits by a fork from the one that used the database before: connections that are not its own."""

import ctypes
import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """What holds connections."""

    def before_fork(self) -> None:
        """Close what a child must not inherit, and open it again when it is needed."""
        ...

    def forget(self) -> None:
        """Begin anew, without connections. Blocks for nothing: it runs in a child, before anything else does."""
        ...


_holders: WeakSet[Forkable] = WeakSet()


def register(holder: Forkable) -> None:
    """Let `holder` forget its connections in each process that is forked from this one."""
    _holders.add(holder)


def _before() -> None:
    for holder in list(_holders):
        holder.before_fork()


def _forget_all() -> None:
    for holder in list(_holders):
        holder.forget()


os.register_at_fork(before=_before, after_in_child=_forget_all)


def keep_forever(*inherited: object) -> None:
    """Never let Python free these, not even when it ends: freed, an SQLite connection of the parent would be closed.

    SQLite says that a connection must not be used across a fork, and to close it is to use it: where the parent was in
    the middle of a transaction, the child would roll it back, in the memory that all processes on the file share.
    """
    for kept in inherited:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
