"""Spans of what was committed and confirmed: one observer of transitions, as `metrics` is one.

A span is made when it has ended, from what the ledger says of it: hours may lie between its ends, and another life
of the daemon. Only what has no place in the ledger is remembered here, within bounds: when a request was read, when
locks were granted, progress. A daemon that dies forgets that, and no more: the spans come all the same.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jef_daemon import traceparent
from jef_daemon.commits import Commit
from jef_daemon.events import (
    CancelRequested,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    LockAwaited,
    Progressed,
    Resumed,
    Retried,
    Started,
)
from jef_daemon.lifecycle import SETTLED, Execution, Place, Status, Transition
from jef_daemon.names import Names
from jef_daemon.ports import Accepted, Arrival, Outgoing, Refusal
from jef_daemon.traceparent import TraceParent, of_job, of_run, parent_of_job
from jef_daemon.tracing.recorded import CONSUMER, PRODUCER, Happening, Recorded

_ATTEMPTS = 50_000
"""Attempts of which something is remembered."""
_HAPPENINGS = 128
"""Of each, as in OpenTelemetry's own limit; the first ones."""
_TEXT = 1024
"""Characters of a message in a span."""
_TAKEN = frozenset({Accepted.NEW, Accepted.TAKEN_AGAIN, Accepted.CANCELLED})
_OVER = frozenset({Place.FAILED, Place.TIMED_OUT_CLOSED})
"""Places that an attempt is in after its spans were made."""

Emit = Callable[[Recorded], None]
Samples = Callable[[str], bool]
"""Whether a trace that begins here, by its id, is recorded."""


@dataclass(slots=True)
class _Seen:
    """What is remembered of an attempt."""

    read_ns: int | None = None
    granted_at: float | None = None
    waits: list[Happening] = field(default_factory=list)
    runs: list[Happening] = field(default_factory=list)


class Spans:
    """Makes spans.

    Args:
        emit: takes each.
        samples: decides about traces that begin here.
        names: of exchanges.
        tracebacks: whether spans carry stack traces.
    """

    def __init__(self, emit: Emit, samples: Samples, names: Names, *, tracebacks: bool = True) -> None:
        self._emit = emit
        self._samples = samples
        self._names = names
        self._tracebacks = tracebacks
        self._reading: dict[str, int] = {}
        """Requests on their way into the ledger, by execution, and when they were read."""
        self._seen: OrderedDict[tuple[str, int], _Seen] = OrderedDict()

    def begin(self, execution: Execution) -> None:
        """A request was read: from now on it has a trace, its producer's or one of its own."""
        name = execution.execution_id
        if traceparent.parse(execution.traceparent) is None:
            trace_id = secrets.token_hex(16)
            own = traceparent.begin(trace_id, name, execution.attempt, sampled=self._samples(trace_id))
            execution.traceparent = str(own)
        if of_job(execution) is not None:
            self._reading.setdefault(name, time.time_ns())

    def committed(self, commit: Commit) -> None:
        """Make the spans that ended with a transaction."""
        now = time.time_ns()
        for message, word in commit.door:
            if isinstance(message, Refusal):
                self._refused(message, now - round(commit.seconds * 1e9), now)
            else:
                self._arrived(message, word, now)
        for execution, at in commit.tally.grants:
            if of_job(execution) is not None:
                self._remember(execution.execution_id, execution.attempt).granted_at = at
        for move in commit.moves:
            if of_job(move.was) is not None:
                self._moved(move)

    def confirmed(self, messages: Sequence[Outgoing]) -> None:
        """Make the spans of notifications that the broker has confirmed."""
        now = time.time_ns()
        for message in messages:
            if message.exchange in {self._names.status, ""} and message.headers:
                job = traceparent.parse(message.headers.get("traceparent"))
                if job is not None and job.is_sampled:
                    self._told(job, message, now)

    # --- the door ----------------------------------------------------------------------------------------

    def _arrived(self, arrival: Arrival, word: Accepted, now: int) -> None:
        execution = arrival.execution
        read = self._reading.pop(execution.execution_id, None)
        job = of_job(execution)
        if job is None or read is None:
            return
        # A duplicate is shown to whoever sent it, below its own request; the job has its spans already.
        below = job if word in _TAKEN else parent_of_job(execution)
        if below is None:
            return
        if word in _TAKEN:
            self._remember(execution.execution_id, execution.attempt).read_ns = read
        attributes = _about(execution) | {"jef.outcome": word.value}
        span = TraceParent(below.trace_id, secrets.token_hex(8), below.flags)
        self._emit(Recorded("intake", span, below, read, now, attributes))

    def _refused(self, refusal: Refusal, begun: int, now: int) -> None:
        sent = refusal.delivery.headers.get("traceparent")
        below = traceparent.parse(sent if isinstance(sent, str) else None)
        if below is None or not below.is_sampled:
            return
        error = refusal.error
        attributes = {"jef.action": refusal.action, "jef.outcome": "refused", "error.type": error.code}
        if error.execution_id:
            attributes["jef.execution.id"] = error.execution_id
        span = TraceParent(below.trace_id, secrets.token_hex(8), below.flags)
        self._emit(Recorded("intake", span, below, begun, now, attributes, error=error.detail[:_TEXT]))

    # --- transitions -------------------------------------------------------------------------------------

    def _moved(self, move: Transition) -> None:
        execution, event = move.execution, move.event
        if isinstance(event, LockAwaited):
            self._note(execution, move.at, "waiting", _place(event.waiting_for), waits=True)
        elif isinstance(event, Started):
            self._waited(execution, move.at)
        elif isinstance(event, GraceEnded):
            self._ended(execution, event)
        elif isinstance(event, Retried | Interrupted):
            if move.before not in _OVER:
                self._ended(move.was, event)
        elif execution.status in SETTLED or execution.status is Status.FAILED:
            if move.before not in _OVER:
                self._ended(execution, event)
        elif (told := _happening(event)) is not None:
            self._note(execution, move.at, *told)

    def _waited(self, execution: Execution, until: float) -> None:
        """The spans of an attempt's waiting, one behind the other."""
        job, begun = of_job(execution), execution.queued_at
        if job is None or begun is None:
            return
        seen = self._seen.get(_key(execution), _Seen())
        waits: list[tuple[str, float, list[Happening]]] = [("slot wait", until, [])]
        if execution.wants_locks:
            waits.insert(0, ("lock wait", seen.granted_at or until, seen.waits))
        if execution.not_before is not None:
            waits.insert(0, ("delay", execution.not_before, []))
        for name, end, happenings in waits:
            ended = max(begun, min(end, until))
            if ended > begun:
                told = tuple(happenings)
                times = _ns(begun), _ns(ended)
                self._emit(Recorded(name, job.child(name), job, *times, _about(execution), happenings=told))
            begun = ended

    def _ended(self, execution: Execution, event: Event) -> None:
        """The spans of an attempt that is over."""
        job, run = of_job(execution), of_run(execution)
        ended = execution.finished_at or execution.updated_at
        if job is None or run is None or ended is None:
            return
        if execution.started_at is None:
            self._waited(execution, ended)
        seen = self._seen.pop(_key(execution), _Seen())
        outcome = _outcome(execution, event)
        if execution.started_at is not None:
            self._emit(self._run(execution, event, job, run, seen, outcome))
        begun = seen.read_ns or _ns(execution.queued_at or ended)
        self._emit(
            Recorded(
                f"job {execution.action}",
                job,
                parent_of_job(execution),
                begun,
                max(begun, _ns(ended)),
                _about(execution) | self._messaging(execution) | outcome.attributes,
                kind=CONSUMER,
                links=_links(execution),
                is_ok=outcome.is_ok,
                error=outcome.error,
            )
        )

    def _run(
        self,
        execution: Execution,
        event: Event,
        job: TraceParent,
        run: TraceParent,
        seen: _Seen,
        outcome: _Outcome,
    ) -> Recorded:
        ended = execution.finished_at or execution.updated_at or 0.0
        happenings = list(seen.runs)
        if isinstance(event, Failed):
            happenings.append(Happening("exception", _ns(ended), self._exception(event)))
        attributes = _about(execution) | outcome.attributes
        if execution.external_id:
            attributes["jef.external.id"] = execution.external_id
        return Recorded(
            "execution",
            run,
            job,
            _ns(execution.started_at or ended),
            _ns(ended),
            attributes,
            happenings=tuple(happenings),
            is_ok=outcome.is_ok,
            error=outcome.error,
        )

    def _exception(self, event: Failed) -> dict[str, Any]:
        told = {"exception.type": event.error_type, "exception.message": event.error_message[:_TEXT]}
        if event.traceback and self._tracebacks:
            told["exception.stacktrace"] = event.traceback
        return told

    def _messaging(self, execution: Execution) -> dict[str, Any]:
        told = {
            "messaging.system": "rabbitmq",
            "messaging.operation.type": "process",
            "messaging.destination.name": self._names.jobs,
            "messaging.rabbitmq.destination.routing_key": execution.action,
        }
        if execution.correlation_id:
            told["messaging.message.conversation_id"] = execution.correlation_id
        if execution.workflow_id:
            told["jef.workflow.id"] = execution.workflow_id
        return told

    # --- notifications -----------------------------------------------------------------------------------

    def _told(self, job: TraceParent, message: Outgoing, now: int) -> None:
        told = json.loads(message.body)
        begun = _ns(datetime.fromisoformat(told["timestamp"]).timestamp())
        to = message.exchange or message.routing_key
        attributes = {
            "jef.execution.id": told["executionId"],
            "jef.action": told["action"],
            "jef.attempt": told["attempt"],
            "jef.status": told["status"],
            "jef.sequence": told["sequence"],
            "messaging.system": "rabbitmq",
            "messaging.operation.type": "send",
            "messaging.destination.name": to,
            "messaging.rabbitmq.destination.routing_key": message.routing_key,
        }
        if message.correlation_id:
            attributes["messaging.message.conversation_id"] = message.correlation_id
        # Told again after a lost connection, it is the same span once more.
        span = job.child("notify", told["sequence"], to)
        name = f"notify {told['status']}"
        self._emit(Recorded(name, span, job, begun, max(begun, now), attributes, kind=PRODUCER))

    # --- what is remembered ------------------------------------------------------------------------------

    def _remember(self, execution_id: str, attempt: int) -> _Seen:
        key = execution_id, attempt
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen()
            if len(self._seen) > _ATTEMPTS:
                self._seen.popitem(last=False)
        return seen

    def _note(
        self, execution: Execution, at: float, name: str, attributes: dict[str, Any], *, waits: bool = False
    ) -> None:
        seen = self._remember(execution.execution_id, execution.attempt)
        happenings = seen.waits if waits else seen.runs
        if len(happenings) < _HAPPENINGS:
            happenings.append(Happening(name, _ns(at), attributes))


@dataclass(frozen=True, slots=True)
class _Outcome:
    attributes: dict[str, Any]
    is_ok: bool = False
    error: str | None = None


def _outcome(execution: Execution, event: Event) -> _Outcome:
    """What an attempt came to, as spans say it."""
    told = {"jef.status": execution.status.value}
    if execution.status is Status.COMPLETED:
        return _Outcome(told, is_ok=True)
    if execution.status is Status.CANCELLED:
        return _Outcome(told)
    error = event.error_type if isinstance(event, Failed) else type(event).__name__
    if execution.status is Status.TIMED_OUT:
        error = Status.TIMED_OUT.value
    reason = event.reason if isinstance(event, Interrupted) else execution.message
    return _Outcome(told | {"error.type": error}, error=(reason or error)[:_TEXT])


def _happening(event: Event) -> tuple[str, dict[str, Any]] | None:
    if isinstance(event, Progressed):
        told: dict[str, Any] = {} if event.progress is None else {"jef.progress": event.progress}
        return "progress", told | ({} if event.message is None else {"jef.message": event.message[:_TEXT]})
    if isinstance(event, CancelRequested):
        return "cancel requested", {"jef.reason": event.reason[:_TEXT]}
    name = {Launched: "launched", FellSilent: "silent", Resumed: "resumed"}.get(type(event))
    return None if name is None else (name, {})


def _place(waiting_for: Mapping[str, Any]) -> dict[str, Any]:
    named = ((key, waiting_for.get(key)) for key in ("resource", "mode", "position"))
    return {f"jef.lock.{key}": value for key, value in named if value is not None}


def _links(execution: Execution) -> tuple[TraceParent, ...]:
    """A later attempt names the one before."""
    before = traceparent.before(execution)
    return () if before is None else (before,)


def _about(execution: Execution) -> dict[str, Any]:
    return {
        "jef.execution.id": execution.execution_id,
        "jef.action": execution.action,
        "jef.attempt": execution.attempt,
    }


def _key(execution: Execution) -> tuple[str, int]:
    return execution.execution_id, execution.attempt


def _ns(at: float) -> int:
    return round(at * 1e9)
