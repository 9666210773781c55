"""The lock protocol over the store in memory, under random histories (`tests.support.lock_machine`)."""

from __future__ import annotations

from jef_daemon.lock.requests import Limits
from jef_daemon.testing.locks import MemoryLocks
from tests.support.lock_machine import LockMachine, Store, depth, marked


class MemoryMachine(LockMachine):
    """Over the store in memory."""

    def new_store(self, limits: Limits) -> Store:
        return MemoryLocks(limits)


MemoryMachine.TestCase.settings = depth(60, 600)
TestLocks = marked(MemoryMachine.TestCase)
