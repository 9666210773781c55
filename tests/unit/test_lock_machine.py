"""The lock protocol over the store in memory, under random histories (`tests.support.lock_machine`)."""

from __future__ import annotations

import pytest

from jef_daemon.lock.requests import Limits
from jef_daemon.testing.locks import MemoryLocks
from tests.support.lock_machine import LockMachine, Store, depth


class MemoryMachine(LockMachine):
    """Over the store in memory."""

    def new_store(self, limits: Limits) -> Store:
        return MemoryLocks(limits)


MemoryMachine.TestCase.settings = depth(60, 1500)
# A failure is made small before it is told, which takes longer than a test may elsewhere.
TestLocks = pytest.mark.timeout(600)(MemoryMachine.TestCase)
