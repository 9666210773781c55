"""Group commit: one thread, one transaction for all that is ready, one fsync.

Callers in the event loop put operations into the writer and await their results. The thread takes whatever
is there, never waits for more, and runs it in one transaction, kinds in this order: accept, save (a checkpoint:
an attempt that saves and then fails has saved), apply, decide (the lock service's), hear (its answers), claim,
confirm, anything else. So a request that meets a free slot is QUEUED and RUNNING with a single fsync.

Confirmations are in no hurry: what is forgotten late is told twice at worst, after a crash. They ride with the
next transaction, and get one of their own only when nothing else comes: otherwise each status would cost two
fsyncs, and the next one would wait for the second.

If an operation is at fault, the batch is rolled back and each operation runs alone, so that only the
culprit fails. If the ledger is at fault (disk full, locked, read-only), the batch is tried again until it
goes through: callers wait, nothing is lost, the log says so once. Where it is damaged, whoever meets that hears so:
no operation is at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError

from jef_daemon.commits import Commit, OnCommit, Tally
from jef_daemon.errors import LedgerError, LedgerUnavailable
from jef_daemon.ledger import calling, claiming, door, locking, schema
from jef_daemon.ledger.opening import explain
from jef_daemon.ledger.terms import Terms
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.ports import Clock, OnOutbox, Outgoing

log = structlog.get_logger()

_RETRY_FIRST_S = 0.2
_RETRY_MOST_S = 5.0
_CONFIRM_WITHIN_S = 0.05
"""How long a confirmation waits for a transaction to ride with."""
_KINDS = ("accept", "save", "apply", "decide", "hear", "claim", "confirm", "other")
"""Order within a transaction."""


_DAMAGED = frozenset({DatabaseError, InternalError})
"""What a database says of itself; the kinds of a `DatabaseError` are of a statement and its values."""


@dataclass(slots=True)
class Operation:
    """One caller's wish. `argument` is merged with others of its kind where the kind allows."""

    kind: str
    argument: Any
    done: asyncio.Future[Any] | None


class Writer:
    """The only writer of a ledger in this process.

    Args:
        engine: SQLAlchemy engine; its connection is used by the writer's thread only.
        terms: what is the same for all transactions.
        clock: for records.
    """

    def __init__(self, engine: Engine, terms: Terms, clock: Clock) -> None:
        self._engine = engine
        self._kept: Connection | None = None
        """The connection, from one transaction to the next; after a fault a new one."""
        self.terms = terms
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Operation] = deque()
        self._wake = threading.Event()
        self._waking: asyncio.TimerHandle | None = None
        self._closing = threading.Event()
        self._given_up = False
        self._next_id = 1
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self.on_outbox: OnOutbox | None = None
        self.on_commit: OnCommit | None = None
        """Told of each transaction; None: nobody counts, and nothing is gathered."""
        self.stalled: LedgerUnavailable | None = None
        """Set while the ledger takes no writes."""
        self.tried_at = clock.monotonic()
        """When a ledger that takes no writes was tried last."""
        self.transactions = 0
        self.operations = 0

    def start(self) -> None:
        """Begin to write."""
        with self._engine.connect() as connection:
            last = connection.scalar(select(func.max(schema.outbox.c.id)))
        self._next_id = (last or 0) + 1
        self._thread.start()

    def submit(self, kind: str, argument: Any) -> asyncio.Future[Any]:
        """Put an operation in; the result comes when it is on disk."""
        done = self._loop.create_future()
        if self._closing.is_set():  # nobody would answer, and whoever asks would wait for ever
            done.set_exception(LedgerUnavailable("the ledger is closed"))
            return done
        self._waiting.append(Operation(kind, argument, done))
        if kind != "confirm":
            self._wake.set()
        elif self._waking is None:
            self._waking = self._loop.call_later(_CONFIRM_WITHIN_S, self._wake_late)
        return done

    def _wake_late(self) -> None:
        self._waking = None
        self._wake.set()

    async def close(self) -> None:
        """Write what is waiting, then end the thread. A stalled ledger is not waited for."""
        self._closing.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # --- on the writer's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            batch = []
            while self._waiting:
                batch.append(self._waiting.popleft())
            if batch:
                self._commit(batch)
            elif self._closing.is_set():
                return self._disconnect()
            if self._closing.is_set():
                self._wake.set()

    def _commit(self, batch: list[Operation]) -> None:
        pause = _RETRY_FIRST_S
        if self._given_up and self.stalled is not None:
            return self._report(batch, [self.stalled] * len(batch), [])
        while True:
            try:
                results, outbox = self._attempt(batch)
            except OperationalError as error:
                self._stall(error)
                if self._closing.wait(pause):
                    self._given_up = True  # each try may take as long as the database waits for its lock
                    return self._report(batch, [self.stalled] * len(batch), [])
                pause = min(pause * 2, _RETRY_MOST_S)
            except Exception as error:  # noqa: BLE001  one operation is at fault: find it, spare the others
                if len(batch) == 1:
                    return self._report(batch, [self._fault(error)], [])
                for operation in batch:
                    self._commit([operation])
                return None
            else:
                self._recover()
                return self._report(batch, results, outbox)

    def _attempt(self, batch: Sequence[Operation]) -> tuple[list[Any], list[Outgoing]]:
        began = time.perf_counter()
        on_commit = self.on_commit
        tally = None if on_commit is None else Tally()
        with self._connected() as connection, connection.begin():
            transaction = Transaction(connection, self.terms, self._clock.now(), self._next_id, tally)
            by_id: dict[int, Any] = {}
            for kind in _KINDS:
                chosen = [operation for operation in batch if operation.kind == kind]
                if chosen:
                    answers = _RUN[kind](transaction, [operation.argument for operation in chosen])
                    by_id |= {
                        id(operation): answer for operation, answer in zip(chosen, answers, strict=True)
                    }
            transaction.finish()
        # Only a committed transaction uses up its numbers.
        self._next_id = transaction.next_id
        self.transactions += 1
        self.operations += len(batch)
        results = [by_id[id(operation)] for operation in batch]
        if on_commit is not None and tally is not None:
            took_s = time.perf_counter() - began
            commit = Commit(took_s, len(batch), _door(batch, results), transaction.moves, tally)
            self._loop.call_soon_threadsafe(on_commit, commit)
        return results, transaction.outbox

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        if self._kept is None:
            self._kept = self._engine.connect()
        try:
            yield self._kept
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _report(self, batch: Sequence[Operation], results: Sequence[Any], outbox: list[Outgoing]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, batch, results, outbox)

    def _fault(self, error: Exception) -> Exception:
        """What a caller hears. Some parts of a damaged ledger may still work: others would blame the messages."""
        if type(error) in _DAMAGED and isinstance(error, DBAPIError):
            return LedgerError(explain(error, self._engine.url))
        return error

    def _stall(self, error: DBAPIError) -> None:
        self.tried_at = self._clock.monotonic()
        if self.stalled is None:
            self.stalled = LedgerUnavailable(explain(error, self._engine.url))
            log.error("ledger_unavailable", detail=str(self.stalled), consequence="waiting; nothing is lost")

    def _recover(self) -> None:
        if self.stalled is not None:
            self.stalled = None
            log.info("ledger_available")

    # --- in the event loop -------------------------------------------------------------------------------

    def _deliver(self, batch: Sequence[Operation], results: Sequence[Any], outbox: list[Outgoing]) -> None:
        if outbox and self.on_outbox:
            self.on_outbox(outbox)
        for operation, result in zip(batch, results, strict=True):
            if operation.done is None or operation.done.done():
                continue
            if isinstance(result, BaseException):
                operation.done.set_exception(result)
                if isinstance(result, LedgerUnavailable):
                    operation.done.exception()  # told already; who has given up waiting need not hear it
            else:
                operation.done.set_result(result)


def _door(batch: Sequence[Operation], results: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Messages that were let in or refused, each with what became of it."""
    return [
        pair
        for operation, words in zip(batch, results, strict=True)
        if operation.kind == "accept"
        for pair in zip(operation.argument, words, strict=True)
    ]


def _accept(transaction: Transaction, arguments: list[Any]) -> list[Any]:
    words = door.accept(transaction, [arrival for arrivals in arguments for arrival in arrivals])
    answers, start = [], 0
    for arrivals in arguments:
        answers.append(words[start : start + len(arrivals)])
        start += len(arrivals)
    return answers


def _confirm(transaction: Transaction, arguments: list[Any]) -> list[Any]:
    transaction.confirm(number for ids in arguments for number in ids)
    return [None] * len(arguments)


_RUN: dict[str, Callable[[Transaction, list[Any]], list[Any]]] = {
    "accept": _accept,
    "save": lambda transaction, arguments: [calling.save(transaction, *saved) for saved in arguments],
    "apply": lambda transaction, arguments: transaction.apply(arguments),
    "decide": lambda transaction, arguments: [
        locking.decide(transaction, requests, now) for requests, now in arguments
    ],
    "hear": lambda transaction, arguments: [locking.hear(transaction, heard) for heard in arguments],
    "claim": lambda transaction, arguments: [claiming.claim(transaction, capacity) for capacity in arguments],
    "confirm": _confirm,
    "other": lambda transaction, arguments: [call(transaction) for call in arguments],
}
