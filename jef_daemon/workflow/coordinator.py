"""ROLE: the workflow coordinator. Requests, ends of stages' jobs and commands → the ledger, where the law decides.

It meets the others only through messages: it asks for jobs as any producer would, hears of their ends on `jef.status`
through a durable queue, bound for the actions of its definitions, and cancels over `jef.control`. What is decided is
on disk, with the next requests in the outbox, before a message is acknowledged: so it may be killed anywhere, and a
message that comes twice changes nothing.

Nothing of a workflow is kept in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import structlog
from pydantic import ValidationError

from jef_daemon.errors import RequestRefused
from jef_daemon.inbox import Inbox
from jef_daemon.messages import Control, WorkflowRequest, decode_control, decode_workflow_request
from jef_daemon.names import Names
from jef_daemon.ports import Delivery, Refusal
from jef_daemon.workflow import events, law
from jef_daemon.workflow.inputs import Became, Begin, Input, JobEnded, RefusedRequest, WorkflowCommand
from jef_daemon.workflow.library import Library
from jef_daemon.workflow.loading import DefinitionError
from jef_daemon.workflow.messages import ended
from jef_daemon.workflow.plan import Plan
from jef_daemon.workflow.state import Bounds

log = structlog.get_logger()

_PAUSE_S = 0.2
"""Before the queue is bound again for actions, where the connection was lost meanwhile."""
_ENDS = ("completed", "failed", "cancelled", "timed_out")
_KIND = "x-jef-kind"
_TRACEPARENT_CHARACTERS = 512


class WorkflowLedger(Protocol):
    """The part of a ledger that the coordinator needs."""

    @property
    def workflow_bounds(self) -> Bounds:
        """How much a workflow may carry."""
        ...

    def coordinating(self, inputs: Sequence[Input]) -> asyncio.Future[list[Became]]:
        """See `SqlLedger.coordinating`."""
        ...

    async def reconcile_workflows(self) -> None:
        """See `SqlLedger.reconcile_workflows`."""
        ...

    async def workflow_actions(self) -> set[str]:
        """See `SqlLedger.workflow_actions`."""
        ...


class WorkflowBus(Protocol):
    """The part of a bus that the coordinator needs."""

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        ...

    async def bind(self, queue: str, exchange: str, routing_keys: Iterable[str]) -> None:
        """Let what is published with these keys come into a queue, from now on and after each reconnection."""
        ...


class Coordinator:
    """Carries workflows out.

    Args:
        ledger: where they are kept.
        bus: where messages come from.
        names: of exchanges and queues.
        library: the definitions.
        max_body_bytes: longest message.
    """

    def __init__(
        self, ledger: WorkflowLedger, bus: WorkflowBus, names: Names, library: Library, max_body_bytes: int
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._names = names
        self._library = library
        self._max_body_bytes = max_body_bytes
        self._bound: set[str] = set()
        """Actions whose ends are heard."""
        self.requests = Inbox(self._take_requests, self._leave_request_out)
        """From `jef.workflows`."""
        self.events = Inbox(self._take_events, self._leave_event_out)
        """From the coordinator's own queue."""

    async def run(self) -> None:
        """Work until cancelled."""
        await self._hear(await self._ledger.workflow_actions())
        await self._ledger.reconcile_workflows()
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self.requests.run(), name="workflows: requests")
            parts.create_task(self.events.run(), name="workflows: events")

    async def finish(self) -> None:
        """Wait until everything delivered is decided and acknowledged."""
        await self.requests.finish()
        await self.events.finish()

    # --- requests ----------------------------------------------------------------------------------------

    async def _take_requests(self, batch: Sequence[Delivery]) -> None:
        actions: set[str] = set()
        # Definitions are files: all of a batch are looked up on one way to another thread.
        inputs = await asyncio.to_thread(lambda: [self._asked(delivery, actions) for delivery in batch])
        await self._hear(actions)
        await self._ledger.coordinating(inputs)
        await self._bus.acknowledge(batch)

    def _asked(self, delivery: Delivery, actions: set[str]) -> Input:
        """What a request asks for, or why it can never be had; whose ends are to be heard goes to `actions`."""
        request: WorkflowRequest | None = None
        try:
            request = decode_workflow_request(delivery.body, self._max_body_bytes)
            begin, plans = self._begin(request, delivery)
        except RequestRefused as error:
            return self._request_refused(delivery, error, request)
        actions |= {stage.action for plan in plans for stage in plan.stages.values() if stage.action}
        return begin

    def _begin(self, request: WorkflowRequest, delivery: Delivery) -> tuple[Begin, list[Plan]]:
        """Look the definition up and hold the request against it."""
        try:
            found = self._library.with_inner(request.workflow)
        except DefinitionError as error:
            raise RequestRefused("workflow-invalid", str(error)) from None
        plan = found[request.workflow].plan
        try:
            law.check(plan, request.variables, self._ledger.workflow_bounds)
        except events.Refused as refused:
            raise RequestRefused("field-invalid", str(refused)) from None
        traceparent = delivery.headers.get("traceparent")
        is_fit = isinstance(traceparent, str) and len(traceparent) <= _TRACEPARENT_CHARACTERS
        begin = Begin(
            request.workflow_id,
            request.workflow,
            {name: source.plan.definition.canonical() for name, source in found.items()},
            request.variables,
            request.priority,
            traceparent if is_fit else None,
        )
        return begin, [source.plan for source in found.values()]

    async def _leave_request_out(self, delivery: Delivery, error: RequestRefused) -> None:
        request: WorkflowRequest | None = None
        with contextlib.suppress(RequestRefused):
            request = decode_workflow_request(delivery.body, self._max_body_bytes)
        await self._ledger.coordinating([self._request_refused(delivery, error, request)])
        await self._bus.acknowledge([delivery])

    def _request_refused(
        self, delivery: Delivery, error: RequestRefused, request: WorkflowRequest | None
    ) -> RefusedRequest:
        # Its exchange asks for no routing key: sent again without one, it would be taken for a request for a job.
        return _refusal(dataclasses.replace(delivery, routing_key=self._names.workflows), error, request)

    async def _hear(self, actions: set[str]) -> None:
        """Hear of the ends of these actions' jobs, before any is asked for."""
        new = sorted(actions - self._bound)
        keys = [f"{action}.{word}" for action in new for word in _ENDS]
        while keys:
            try:
                await self._bus.bind(self._names.coordinator, self._names.status, keys)
            except ConnectionError as error:
                log.debug("binding_again", reason=str(error))
                await asyncio.sleep(_PAUSE_S)
            else:
                self._bound.update(new)
                return

    # --- events ------------------------------------------------------------------------------------------

    async def _take_events(self, batch: Sequence[Delivery]) -> None:
        inputs = [found for delivery in batch if (found := self._event(delivery)) is not None]
        if inputs:
            await self._ledger.coordinating(inputs)
        await self._bus.acknowledge(batch)

    async def _leave_event_out(self, delivery: Delivery, error: RequestRefused) -> None:
        # Sent again, it is to come here, and not to all who hear of jobs.
        sent_here = dataclasses.replace(delivery, routing_key=self._names.coordinator)
        await self._ledger.coordinating([_refusal(sent_here, error, None)])
        await self._bus.acknowledge([delivery])

    def _event(self, delivery: Delivery) -> Input | None:
        kind = delivery.headers.get(_KIND)
        if kind is None:
            found = ended(delivery.body)
            return JobEnded(*found) if found is not None else None
        control = _control(delivery.body, self._max_body_bytes) if kind == "control" else None
        if control is None or control.workflow_id is None or control.command == "resume":
            return None
        return WorkflowCommand(control, delivery.reply_to, delivery.correlation_id)


def _control(body: bytes, limit: int) -> Control | None:
    """A command that a daemon has handed on; it was found right there."""
    try:
        return decode_control(body, limit)
    except (RequestRefused, ValidationError):
        return None


def _refusal(delivery: Delivery, error: RequestRefused, request: WorkflowRequest | None) -> RefusedRequest:
    name = request.workflow if request else ""
    log.warning("workflow_refused", reason=error.code, detail=error.detail, workflow=name)
    workflow_id = request.workflow_id if request else None
    return RefusedRequest(Refusal(error, delivery, "workflows"), workflow_id, name)
