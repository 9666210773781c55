"""A span as facts, and the table of the spans that the daemon makes. No library: it travels between processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jef_daemon.traceparent import TraceParent

Value = str | bool | int | float
Attributes = Mapping[str, Any]
"""Values are `Value`s, or lists of one kind of them."""

INTERNAL, CONSUMER, PRODUCER = "INTERNAL", "CONSUMER", "PRODUCER"
"""OpenTelemetry's words for what a span is to others."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Something at an instant within a span."""

    name: str
    at_ns: int
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One span that has ended. Times are nanoseconds since the epoch."""

    name: str
    span: TraceParent
    parent: TraceParent | None
    """None: it is the root."""
    begun_ns: int
    ended_ns: int
    attributes: Attributes = field(default_factory=dict)
    kind: str = INTERNAL
    happenings: tuple[Happening, ...] = ()
    links: tuple[TraceParent, ...] = ()
    is_ok: bool = False
    """True where it says so; neither this nor an error: it says nothing."""
    error: str | None = None
    """What went wrong; None: nothing."""
    scope: str = "jef_daemon"
    """The library that made it."""
    scope_version: str = ""

    def dump(self) -> str:
        """As JSON."""
        told = {name: getattr(self, name) for name in self.__slots__}
        told |= {"span": str(self.span), "parent": self.parent and str(self.parent)}
        told["happenings"] = [(one.name, one.at_ns, dict(one.attributes)) for one in self.happenings]
        told["links"] = [str(link) for link in self.links]
        return json.dumps(told | {"attributes": dict(self.attributes)})


@dataclass(frozen=True, slots=True)
class Definition:
    """One kind of span that the daemon makes; `docs/tracing.md` is generated from these."""

    name: str
    begins: str
    ends: str
    attributes: Mapping[str, str]
    """By name, what each says, beside those that every span has."""
    happenings: Mapping[str, str] = field(default_factory=dict)
    kind: str = INTERNAL


EVERY: Mapping[str, str] = {
    "jef.execution.id": "The execution.",
    "jef.action": "Its action.",
    "jef.attempt": "The attempt, from 1.",
}
"""Attributes of every span, where they are known."""

_MESSAGING = {
    "messaging.system": "`rabbitmq`.",
    "messaging.operation.type": "`process` or `send`.",
    "messaging.destination.name": "The exchange, or the queue of `reply_to`.",
    "messaging.rabbitmq.destination.routing_key": "The routing key.",
    "messaging.message.conversation_id": "The request's `correlation_id`, where there is one.",
}
_STATUS = {"jef.status": "The status it ended with.", "error.type": "What failed, where something did."}

DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        "job ACTION",
        "the request is read (a retry: QUEUED again)",
        "the attempt is over; TIMED_OUT, once no late update counts",
        {**_STATUS, "jef.workflow.id": "Its workflow, where it has one.", **_MESSAGING},
        kind=CONSUMER,
    ),
    Definition(
        "intake",
        "the request is read",
        "it is on disk",
        {
            "jef.outcome": "As the metric `jef_jobs_received_total` has it, or `refused`.",
            "error.type": "Why refused.",
        },
    ),
    Definition("delay", "QUEUED", "its `notBefore` has come, or the delay of a retry is over", {}),
    Definition(
        "lock wait",
        "the locks are asked for",
        "all are granted",
        {},
        {"waiting": "Told as WAITING_FOR_LOCK: `jef.lock.resource`, `jef.lock.mode`, `jef.lock.position`."},
    ),
    Definition("slot wait", "QUEUED, or the locks are granted", "a slot is free", {}),
    Definition(
        "execution",
        "RUNNING",
        "the attempt is over",
        {**_STATUS, "jef.external.id": "What the work is called elsewhere."},
        {
            "progress": "Each that is told: `jef.progress`, `jef.message`.",
            "launched": "The work runs outside.",
            "cancel requested": "Somebody wants it stopped: `jef.reason`.",
            "silent": "TIMED_OUT.",
            "resumed": "TIMED_OUT no more.",
            "exception": "What it FAILED with: `exception.type`, `exception.message`, `exception.stacktrace`.",
        },
    ),
    Definition(
        "notify STATUS",
        "what it tells happened",
        "the broker has confirmed it",
        {"jef.status": "The status it tells.", "jef.sequence": "Its number.", **_MESSAGING},
        kind=PRODUCER,
    ),
)
"""In the order of a job's life."""


def load(text: str) -> Recorded:
    """What `dump` wrote; only this daemon's own processes say it."""
    told = json.loads(text)
    happenings = tuple(Happening(*one) for one in told.pop("happenings"))
    span, parent = _place(told.pop("span")), told.pop("parent")
    links = tuple(_place(link) for link in told.pop("links"))
    return Recorded(span=span, parent=parent and _place(parent), happenings=happenings, links=links, **told)


def _place(text: str) -> TraceParent:
    _, trace_id, span_id, flags = text.split("-")
    return TraceParent(trace_id, span_id, int(flags, 16))
