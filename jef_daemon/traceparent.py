"""W3C trace context: reading and writing `traceparent`, and which span of a trace is which. Pure.

Part in the flow: a request's `traceparent` is kept with its execution for life; what stands here follows from it
alone, so that any process, in any life of the daemon, names the same spans without having spoken to another.
The spans themselves are made in `tracing`; whoever passes a trace on needs no more than this.

The span of an attempt is a child of the span that `traceparent` names. Where the daemon began the trace itself, it
names the first attempt's own span, which has no parent then.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

from jef_daemon.lifecycle import Execution

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_SAMPLED, _RANDOM = 1, 2
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A place in a trace; `str` writes it as the header."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits: the span that is the parent of what comes."""
    flags: int = _SAMPLED

    @property
    def is_sampled(self) -> bool:
        """Whether whoever began the trace wants it recorded."""
        return bool(self.flags & _SAMPLED)

    def child(self, *names: object) -> TraceParent:
        """The span with these names below this one: the same one each time."""
        return TraceParent(self.trace_id, _named(self.trace_id, self.span_id, *names), self.flags)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


@lru_cache(maxsize=4096)  # each notification of a job asks
def parse(header: str | None) -> TraceParent | None:
    """Read a header; None: there is none, or it is malformed, and begins no trace."""
    found = _FORM.match((header or "").strip(" \t"))
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # A later version may have more behind; version 00 has not, and ff is none.
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceParent(trace_id, span_id, int(flags, 16) & (_SAMPLED | _RANDOM))


def begin(trace_id: str, execution_id: str, attempt: int, *, sampled: bool) -> TraceParent:
    """What is kept with an execution whose producer named no trace: its first span, the root.

    Args:
        trace_id: a new one, random.
        execution_id: the job's.
        attempt: that is the root.
        sampled: whether it is recorded.
    """
    flags = _RANDOM | (_SAMPLED if sampled else 0)
    return TraceParent(trace_id, _attempt_id(trace_id, execution_id, attempt), flags)


def of_job(execution: Execution) -> TraceParent | None:
    """The span of an attempt, from QUEUED to its end; None: its trace is not recorded, or there is none."""
    parent = parse(execution.traceparent)
    if parent is None or not parent.is_sampled:
        return None
    own = _attempt_id(parent.trace_id, execution.execution_id, execution.attempt)
    return TraceParent(parent.trace_id, own, parent.flags)


def of_run(execution: Execution) -> TraceParent | None:
    """The span of an attempt's run: the parent of what its executor does."""
    job = of_job(execution)
    return None if job is None else job.child("execution")


def parent_of_job(execution: Execution) -> TraceParent | None:
    """The parent of an attempt's span; None: it is the root."""
    parent = parse(execution.traceparent)
    job = of_job(execution)
    return None if parent is None or job is None or parent.span_id == job.span_id else parent


def before(execution: Execution) -> TraceParent | None:
    """The span of the attempt before; None: this is the first, or they are not recorded."""
    job = of_job(execution)
    if job is None or execution.attempt == 1:
        return None
    earlier = _attempt_id(job.trace_id, execution.execution_id, execution.attempt - 1)
    return TraceParent(job.trace_id, earlier, job.flags)


def _attempt_id(trace_id: str, execution_id: str, attempt: int) -> str:
    return _named(trace_id, _NO_SPAN, execution_id, attempt)


def _named(*names: object) -> str:
    """An id that follows from names alone."""
    return hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=8).hexdigest()


def carried(execution: Execution) -> str | None:
    """What notifications name where tracing is on: the attempt's span, or the producer's where none is recorded."""
    own = of_job(execution)
    return execution.traceparent if own is None else str(own)


def given(execution: Execution, *, is_traced: bool) -> str | None:
    """What an attempt's executor is given: well-formed, since it goes into environments and headers."""
    own = (of_run(execution) if is_traced else None) or parse(execution.traceparent)
    return None if own is None else str(own)


def exemplar(execution: Execution) -> dict[str, str] | None:
    """The labels by which a measurement names its trace; None: it is not recorded."""
    job = of_job(execution)
    return None if job is None else {"trace_id": job.trace_id, "span_id": job.span_id}
