"""The ledger as the daemon's stages see it (`ports.Ledger`): every method returns once it is on disk."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from sqlalchemy import Engine, select

from jef_daemon.errors import LedgerUnavailable
from jef_daemon.events import Event
from jef_daemon.ledger import (
    calling,
    claiming,
    control,
    lifetime,
    locking,
    rows,
    schema,
    standing,
    updating,
    watching,
)
from jef_daemon.ledger.lifetime import MayRunAgain
from jef_daemon.ledger.opening import Ownership, migrate, open_engine, parse
from jef_daemon.ledger.transaction import Policy, Terms, Transaction
from jef_daemon.ledger.writer import Writer
from jef_daemon.lock.requests import Limits, Request
from jef_daemon.names import Names
from jef_daemon.ports import (
    Accepted,
    Applied,
    Arrival,
    Call,
    Capacity,
    Claimed,
    Clock,
    Command,
    Commit,
    Consequences,
    Heard,
    LockTimes,
    Lost,
    OnCommit,
    OnOutbox,
    Outgoing,
    Refusal,
    Reported,
    Silence,
    SystemClock,
)
from jef_daemon.workflow.state import Bounds

if TYPE_CHECKING:
    from jef_daemon.workflow.inputs import Became, Input

_TRIES_WITHIN_S = 60.0
"""A stalled ledger is tried every few seconds; each try may take a while."""


class SqlLedger:
    """A ledger in an SQL database, owned by this daemon.

    Use as an async context manager, or `open` and `close`.

    Args:
        ledger_url: `sqlite:////absolute/path`.
        names: exchanges to tell things to.
        clock: for records.
        tracebacks: whether FAILED notifications carry the stack trace.
        lock_times: leases of this daemon's own jobs.
        lock_limits: of the lock service, where it is served from this ledger.
        max_variables_bytes: longest JSON of both variable maps of an update.
        remember_s: how long a cancel waits for what it is about.
        lost_locks_fail: whether work outside that lost its locks is FAILED for it.
        is_traced: whether notifications name our span of their execution.
        workflow_bounds: how much a workflow may carry.

    Raises:
        LedgerInUse, LedgerTooNew, LedgerUnavailable: from `open`.
    """

    def __init__(
        self,
        ledger_url: str,
        names: Names | None = None,
        clock: Clock | None = None,
        *,
        tracebacks: bool = True,
        lock_times: LockTimes | None = None,
        lock_limits: Limits | None = None,
        max_variables_bytes: int = 256 * 1024,
        remember_s: float = 86400.0,
        lost_locks_fail: bool = True,
        is_traced: bool = False,
        workflow_bounds: Bounds | None = None,
    ) -> None:
        self._url = parse(ledger_url)
        self._terms = Terms(
            names or Names(),
            tracebacks=tracebacks,
            lost_locks_fail=lost_locks_fail,
            lock_times=lock_times or LockTimes(),
            lock_limits=lock_limits or Limits(),
            is_traced=is_traced,
            workflow_bounds=workflow_bounds or Bounds(),
        )
        self._max_variables = max_variables_bytes
        self._remember_s = remember_s
        self._clock = clock or SystemClock()
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

    async def standing(self) -> standing.Standing:
        """How much stands where, without disturbing writes."""
        return await asyncio.to_thread(standing.read, self._open_looking, self._clock.now())

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

    # --- the port ----------------------------------------------------------------------------------------

    async def accept(self, messages: Sequence[Arrival | Refusal]) -> list[Accepted]:
        """See `ports.Ledger`."""
        return await self.accepting(messages)

    def accepting(self, messages: Sequence[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        """`accept`, put in at once."""
        return self._running.submit("accept", messages)

    async def claim(self, capacity: Capacity) -> list[Claimed]:
        """See `ports.Ledger`."""
        return await self.claiming(capacity)

    def claiming(self, capacity: Capacity) -> asyncio.Future[list[Claimed]]:
        """`claim`, put in at once: what was put in just before shares its transaction."""
        return self._running.submit("claim", capacity)

    async def apply(self, execution_id: str, attempt: int | None, events: Sequence[Event]) -> list[Applied]:
        """See `ports.Ledger`."""
        return await self.applying(execution_id, attempt, events)

    def applying(
        self, execution_id: str, attempt: int | None, events: Sequence[Event]
    ) -> asyncio.Future[list[Applied]]:
        """`apply`, put in at once: calls take effect in the order in which they were made."""
        return self._running.submit("apply", (execution_id, attempt, events))

    async def confirm(self, ids: Sequence[int]) -> None:
        """See `ports.Ledger`."""
        await self._running.submit("confirm", ids)

    async def queued(self) -> dict[str, int]:
        """See `ports.Ledger`."""
        return cast("dict[str, int]", await self._other(claiming.queued))

    async def outbox(self, after: int, limit: int) -> list[Outgoing]:
        """See `ports.Ledger`."""
        return await asyncio.to_thread(self._read_outbox, after, limit)

    # --- locks -------------------------------------------------------------------------------------------

    def deciding(self, requests: Sequence[Request], now: float | None = None) -> asyncio.Future[set[str]]:
        """The lock service's part: decide requests and post the answers; returns resources whose queue moved.

        Args:
            requests: in their order.
            now: UTC seconds, where leases count by another clock than the ledger's.
        """
        return self._running.submit("decide", (requests, now))

    def hearing(self, heard: Sequence[Heard]) -> asyncio.Future[list[Lost]]:
        """A daemon's part: take the service's answers in; returns running attempts that lost their locks."""
        return self._running.submit("hear", heard)

    async def take_over_locks(self, grace_s: float) -> None:
        """Let no lease end within a time: while the service was away nobody could renew."""
        until = self._clock.now() + grace_s
        await self._other(lambda transaction: locking.store_of(transaction).take_over(until))

    async def shift_locks(self, by_s: float) -> None:
        """Let leases last as long as before: the wall clock was set."""
        await self._other(lambda transaction: locking.store_of(transaction).shift(by_s))

    async def tell_places(self, resources: Sequence[str], listeners: str, most: int) -> None:
        """Tell the first waiters of resources where they stand; those whose `reply_to` begins with `listeners`."""
        await self._other(lambda transaction: locking.tell_places(transaction, resources, listeners, most))

    async def go_on_locking(self, answered_up_to: float) -> int:
        """See `Transaction.go_on_locking`."""
        return cast(
            "int", await self._other(lambda transaction: locking.go_on_locking(transaction, answered_up_to))
        )

    async def lock_states(self, state: str, after: str = "") -> list[str]:
        """A page of executions whose locks are in a state (`job_locks`), by id, those later than `after`."""
        return cast("list[str]", await self._other(lambda transaction: transaction.locks.names(state, after)))

    async def waiting_for_locks(self) -> int:
        """How many executions wait for a lock; the answer comes from the writer, so it shows that it works."""
        return cast("int", await self._other(claiming.waiting_for_locks))

    # --- updates and commands ----------------------------------------------------------------------------

    def updating(
        self, reported: Sequence[Reported]
    ) -> asyncio.Future[tuple[list[dict[str, object]], Consequences]]:
        """Apply updates of async jobs and answer them; returns the answers and what follows."""
        return self._other(lambda transaction: updating.update(transaction, reported, self._max_variables))

    def commanding(self, commands: Sequence[Command]) -> asyncio.Future[Consequences]:
        """Carry out commands and answer them; returns what follows."""
        return self._other(lambda transaction: control.command(transaction, commands, self._remember_s))

    async def knows(self, ids: Sequence[str]) -> set[str]:
        """Which executions are in the ledger and were not handed back."""
        found = await self._other(lambda transaction: transaction.known(ids))
        return {name for name, execution in found.items() if not execution.handed_back}

    def govern(self, policies: Mapping[str, Policy]) -> None:
        """Say what each action's operator and author allow; before anything is accepted."""
        self._change(policies=policies)

    def limit(
        self,
        *,
        tracebacks: bool,
        lost_locks_fail: bool,
        lock_limits: Limits,
        max_variables_bytes: int,
        remember_s: float,
    ) -> None:
        """Have other limits and manners from the next transaction on; see the constructor."""
        self._max_variables, self._remember_s = max_variables_bytes, remember_s
        self._change(tracebacks=tracebacks, lost_locks_fail=lost_locks_fail, lock_limits=lock_limits)

    # --- async executors ---------------------------------------------------------------------------------

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> asyncio.Future[bool]:
        """Keep a checkpoint; False where the attempt does not run any more."""
        return self._running.submit("save", (execution_id, attempt, checkpoint))

    async def saved(self, execution_id: str) -> str | None:
        """The last checkpoint of an execution, as JSON."""
        return cast(
            "str | None", await self._other(lambda transaction: calling.saved(transaction, execution_id))
        )

    async def due_calls(self, limit: int) -> list[Call]:
        """Calls of async executors that are due now; each is taken, and put off in case its answer never comes."""
        return cast("list[Call]", await self._other(lambda transaction: calling.due(transaction, limit)))

    def answering(self, call: Call, event: Event | None) -> asyncio.Future[Consequences]:
        """Record what came of a call: an event of the execution, or nothing yet."""
        return self._other(lambda transaction: calling.answer(transaction, call, event))

    # --- clocks ------------------------------------------------------------------------------------------

    async def watched(self, after: tuple[float, str], most: int) -> list[tuple[str, float]]:
        """A page of executions that may fall silent, and their deadlines, by deadline, then id, behind `after`."""
        return cast(
            "list[tuple[str, float]]",
            await self._other(lambda transaction: watching.watched(transaction, after, most)),
        )

    async def overdue(self, until: float, most: int) -> list[str]:
        """Executions whose deadline for an update has passed."""
        return cast(
            "list[str]", await self._other(lambda transaction: watching.overdue(transaction, until, most))
        )

    async def fall_silent(self, ids: Sequence[str], now: float) -> Silence:
        """Flag those that are RUNNING and past their deadline at an instant."""
        return cast(
            "Silence", await self._other(lambda transaction: watching.fall_silent(transaction, ids, now))
        )

    async def run_out(self, now: float, most: int) -> Consequences:
        """End what waited or ran too long, and times of grace that are over; returns what follows."""
        return cast(
            "Consequences", await self._other(lambda transaction: watching.run_out(transaction, now, most))
        )

    async def shift_clocks(self, by_s: float) -> int:
        """The wall clock was set by so much: let what is to come be as far away as before."""
        return cast("int", await self._other(lambda transaction: watching.shift(transaction, by_s)))

    # --- workflows ---------------------------------------------------------------------------------------

    def coordinating(self, inputs: Sequence[Input]) -> asyncio.Future[list[Became]]:
        """Take requests, ends of stages' jobs and commands, with all that follows; returns what became of each."""
        from jef_daemon.ledger import workflows  # its libraries are for those only who carry workflows out

        return self._other(lambda transaction: workflows.take(transaction, inputs))

    async def reconcile_workflows(self) -> None:
        """Take ends of stages' jobs that are in this ledger and whose notifications never came."""
        from jef_daemon.ledger import workflows

        after: int | None = 0
        while after is not None:
            page = after
            after = await self._other(
                lambda transaction: workflows.reconcile(transaction, page)  # noqa: B023  awaited at once
            )

    async def workflow_actions(self) -> set[str]:
        """Actions of all definitions that workflows are pinned to."""
        from jef_daemon.ledger import workflows

        return cast("set[str]", await self._other(workflows.actions))

    # --- start and end of a daemon, keeping house --------------------------------------------------------

    async def interrupt(self, may_run_again: MayRunAgain, why: str) -> int:
        """Settle executions that were RUNNING when their daemon went; returns how many."""
        return await self._repeat(lambda transaction: lifetime.interrupt(transaction, may_run_again, why))

    async def hand_back(self, actions: Collection[str] | None = None) -> int:
        """Give every unstarted job (of some actions; None: of all) back to RabbitMQ; returns how many."""
        return await self._repeat(lambda transaction: lifetime.hand_back(transaction, actions))

    async def purge(self, before: float, step: int) -> int:
        """Delete what finished before an instant, in small steps; returns how many executions."""
        await self._repeat(lambda transaction: lifetime.purge_locks(transaction, before, step))
        await self._repeat(lambda transaction: lifetime.purge_workflows(transaction, before, step))
        return await self._repeat(lambda transaction: lifetime.purge(transaction, before, step))

    # --- inside ------------------------------------------------------------------------------------------

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

    def _read_outbox(self, after: int, limit: int) -> list[Outgoing]:
        wanted = (
            select(schema.outbox).where(schema.outbox.c.id > after).order_by(schema.outbox.c.id).limit(limit)
        )
        with self._open_looking.connect() as connection:
            return [rows.outgoing_of(row) for row in connection.execute(wanted)]

    def _read_identity(self) -> str:
        with self._open_engine.connect() as connection:
            found: str = connection.scalars(select(schema.identity.c.id)).one()
            return found

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
