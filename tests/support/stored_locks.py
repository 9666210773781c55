"""The lock service's store in a real database, driven as the store in memory is: one request at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sqlalchemy import Connection, select

from jef_daemon.ledger import schema
from jef_daemon.ledger.lock_store import LockStore
from jef_daemon.ledger.opening import migrate, open_engine
from jef_daemon.lock.protocol import DEFAULT_LIMITS
from jef_daemon.lock.requests import Limits, Reply, Request
from jef_daemon.lock.state import Grant, Mode, Waiter


def fresh(path: Path) -> str:
    """The URL of a new ledger with all its tables; migrated once for all, as that takes longer than most tests."""
    path.write_bytes(_empty())
    return f"sqlite:///{path}"


@cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        engine = open_engine(f"sqlite:///{path}")
        migrate(engine)
        engine.dispose()
        return path.read_bytes()


class StoredLocks:
    """A `LockStore` anew for each request, as each batch of the service has, on one connection.

    Args:
        connection: in a transaction that the caller ends.
        limits: of the lock service.
    """

    def __init__(self, connection: Connection, limits: Limits = DEFAULT_LIMITS) -> None:
        self.connection = connection
        self.limits = limits

    def at(self, now: float) -> LockStore:
        """The store, as a transaction sees it."""
        return LockStore(self.connection, now, self.limits)

    def run(self, request: Request, now: float) -> list[Reply]:
        """Decide and apply one request, and all that follows from it."""
        return self.at(now).run([request])

    @property
    def all_grants(self) -> Sequence[Grant]:
        """Everything that is held, column by column: the store's own reading is what is to be proved."""
        rows = self.connection.execute(select(schema.lock_grants)).mappings()
        return [Grant(**{**row, "mode": Mode(row["mode"])}) for row in rows]

    @property
    def all_waiters(self) -> Sequence[Waiter]:
        """Everybody who waits, by ticket."""
        rows = self.connection.execute(select(schema.lock_waiters).order_by(schema.lock_waiters.c.ticket))
        found = []
        for row in rows.mappings():
            locks = tuple((resource, Mode(mode)) for resource, mode in json.loads(row["locks"]))
            found.append(Waiter(**{**row, "locks": locks}))
        return found
