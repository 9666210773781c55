"""A ledger in our hands: its database opened, owned, brought to the newest version, written by one writer, let go.

Part in the flow: `daemon` opens it before anything else and closes it last; what the stages do with it in between is
`ledger.SqlLedger`'s. Here is the way in for that: what is put in, in order, shares the writer's transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Self

from sqlalchemy import Engine, select

from jef_daemon.commits import Commit, OnCommit
from jef_daemon.errors import LedgerUnavailable
from jef_daemon.ledger import schema
from jef_daemon.ledger.opening import Ownership, migrate, open_engine, parse
from jef_daemon.ledger.terms import Terms
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.ledger.writer import Writer
from jef_daemon.ports import Clock, OnOutbox

_TRIES_WITHIN_S = 60.0
"""A stalled ledger is tried every few seconds; each try may take a while."""


class OwnedLedger:
    """A ledger of one owner. Use as an async context manager, or `open` and `close`.

    Args:
        ledger_url: `sqlite:////absolute/path`.
        terms: the same for all transactions, but for the identity, which is in the ledger.
        clock: for records.

    Raises:
        LedgerInUse, LedgerTooNew, LedgerUnavailable: from `open`.
    """

    def __init__(self, ledger_url: str, terms: Terms, clock: Clock) -> None:
        self._url = parse(ledger_url)
        self._terms = terms
        self._clock = clock
        self._engine: Engine | None = None
        self._looking: Engine | None = None
        self._ownership: Ownership | None = None
        self._writer: Writer | None = None

    async def open(self) -> None:
        """Take the ledger into our hands and bring it to the newest version."""
        await asyncio.to_thread(self._open)
        self._terms = dataclasses.replace(self._terms, identity=await asyncio.to_thread(self._read_identity))
        self._writer = Writer(self._open_engine, self._terms, self._clock)
        await asyncio.to_thread(self._writer.start)

    async def close(self) -> None:
        """Write what is waiting, then let go of the ledger."""
        if self._writer is not None:
            await self._writer.close()
        self._dispose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def on_outbox(self, told: OnOutbox) -> None:
        """Have the messages of each commit handed over, in order."""
        self._running.on_outbox = told

    def on_commit(self, told: OnCommit) -> None:
        """Have each commit told to who counts, after those who asked before."""
        first = self._running.on_commit

        def both(commit: Commit) -> None:
            if first is not None:
                first(commit)
            told(commit)

        self._running.on_commit = told if first is None else both

    async def answers(self) -> None:
        """Return once the ledger has committed something: it truly takes writes."""
        await self._other(lambda _: None)

    @property
    def identity(self) -> str:
        """The ledger's own name, 12 hexadecimal digits, for its life."""
        return self._terms.identity

    async def is_alive(self, patience_s: float) -> bool:
        """Whether the writer commits, or tries again and again to; False: it hangs."""
        if self.stalled is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self.answers()
                    return True
        return self.stalled is not None and self._clock.monotonic() - self._running.tried_at < _TRIES_WITHIN_S

    @property
    def stalled(self) -> LedgerUnavailable | None:
        """Why the ledger takes no writes now; None while it does."""
        return self._running.stalled

    # --- for what is done with it ------------------------------------------------------------------------

    def _change(self, **terms: Any) -> None:
        # Replaced as a whole: the writer's thread reads them once for each transaction.
        self._terms = dataclasses.replace(self._terms, **terms)
        self._running.terms = self._terms

    async def _repeat(self, step: Callable[[Transaction], int]) -> int:
        total = 0
        while settled := await self._other(step):
            total += settled
        return total

    def _other(self, call: Callable[[Transaction], Any]) -> asyncio.Future[Any]:
        return self._running.submit("other", call)

    @property
    def _running(self) -> Writer:
        if self._writer is None:
            raise RuntimeError("the ledger is not open")
        return self._writer

    @property
    def _open_looking(self) -> Engine:
        if self._looking is None:
            raise RuntimeError("the ledger is not open")
        return self._looking

    @property
    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the ledger is not open")
        return self._engine

    # --- opening, letting go -----------------------------------------------------------------------------

    def _open(self) -> None:
        self._engine = open_engine(self._url.render_as_string(hide_password=False))
        try:
            self._ownership = Ownership(self._url)
            migrate(self._engine)
            # Looking never takes SQLite's write lock, so it does not make the writer wait.
            self._looking = open_engine(self._url.render_as_string(hide_password=False), read_only=True)
        except BaseException:
            self._dispose()
            raise

    def _dispose(self) -> None:
        for engine in (self._engine, self._looking):
            if engine is not None:
                engine.dispose()
        if self._ownership is not None:
            self._ownership.release()

    def _read_identity(self) -> str:
        with self._open_engine.connect() as connection:
            found: str = connection.scalars(select(schema.identity.c.id)).one()
            return found
