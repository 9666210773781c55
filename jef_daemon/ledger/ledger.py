"""The ledger as the daemon's stages see it (`ports.Ledger`): every method returns once it is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import structlog
from sqlalchemy import select

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
from jef_daemon.ledger.owned import OwnedLedger
from jef_daemon.ledger.terms import Policy, Terms
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
    Consequences,
    Heard,
    LockTimes,
    Lost,
    Outgoing,
    Refusal,
    Reported,
    Silence,
    SystemClock,
)
from jef_daemon.workflow.state import Bounds

if TYPE_CHECKING:
    from jef_daemon.workflow.inputs import Became, Input

log = structlog.get_logger()


class SqlLedger(OwnedLedger):
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
        terms = Terms(
            names or Names(),
            tracebacks=tracebacks,
            lost_locks_fail=lost_locks_fail,
            lock_times=lock_times or LockTimes(),
            lock_limits=lock_limits or Limits(),
            is_traced=is_traced,
            workflow_bounds=workflow_bounds or Bounds(),
        )
        super().__init__(ledger_url, terms, clock or SystemClock())
        self._max_variables = max_variables_bytes
        self._remember_s = remember_s

    async def standing(self) -> standing.Standing:
        """How much stands where, without disturbing writes."""
        return await asyncio.to_thread(standing.read, self._open_looking, self._clock.now())

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

    @property
    def workflow_bounds(self) -> Bounds:
        """How much a workflow may carry, as the settings have it now."""
        return self._terms.workflow_bounds

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
            found, after = await self._other(
                lambda transaction: workflows.lost_ends(transaction, page)  # noqa: B023  awaited at once
            )
            try:
                await self.coordinating(found)
            except ValueError:  # one leads to what cannot be read: the others do not
                for each in found:
                    await self._reconcile(each)

    async def _reconcile(self, end: Input) -> None:
        try:
            await self.coordinating([end])
        except ValueError as error:
            log.error(
                "workflow_unreadable", which=str(end), error=str(error), consequence="it is left as it is"
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

    def _read_outbox(self, after: int, limit: int) -> list[Outgoing]:
        wanted = (
            select(schema.outbox).where(schema.outbox.c.id > after).order_by(schema.outbox.c.id).limit(limit)
        )
        with self._open_looking.connect() as connection:
            return [rows.outgoing_of(row) for row in connection.execute(wanted)]
