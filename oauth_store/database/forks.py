"""Forks: a child inherits the connections of its parent, and must not use them."""

import ctypes
import os
from abc import ABC, abstractmethod
from weakref import WeakSet


class Holder(ABC):
    """An object that holds connections."""

    def before_fork(self) -> None:  # noqa: B027 (nothing, unless a child must not inherit a connection)
        """Close the connections that a child must not inherit, and open none until `after_fork` is called."""

    def after_fork(self) -> None:  # noqa: B027 (nothing, unless `before_fork` stopped it)
        """Continue in the process that forked."""

    @abstractmethod
    def forget(self) -> None:
        """Start over in the child, without connections. Never waits: it runs before anything else does."""


_holders: WeakSet[Holder] = WeakSet()


def register(holder: Holder) -> None:
    """Call the methods of `holder` at each fork of this process."""
    _holders.add(holder)


def _before() -> None:
    for holder in list(_holders):
        holder.before_fork()


def _after() -> None:
    for holder in list(_holders):
        holder.after_fork()


def _forget_all() -> None:
    for holder in list(_holders):
        holder.forget()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_forget_all)


def keep_forever(*inherited: object) -> None:
    """Never let Python free these, not even at exit: that would close an SQLite connection of the parent.

    SQLite forbids the use of a connection across a fork, and closing it is a use: if the parent was in the middle of a
    transaction, the child would roll it back, in the memory that all processes on the file share.
    """
    for kept in inherited:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
