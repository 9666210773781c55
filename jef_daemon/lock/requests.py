"""What can be asked of the lock service and what it answers. Pure.

Part in the flow: the service decodes a message of `jef.locks` into one of these requests, `protocol.decide`
turns it into a `Decision`, the service stores its changes and sends its replies.

What it does not do: decode JSON. Types are right here; values (lengths, leases) are checked by `decide`,
because a value out of range is answered, not dead-lettered.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jef_daemon.lock.state import Change, Grant, Locks, Mode, Waiter


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one lock service. A refusal names the one that was passed."""

    locks_per_request: int = 64
    name_length: int = 255
    """Characters of a resource's or an owner's name."""
    waiters_per_resource: int = 1_000_000
    lease_min_s: float = 1.0
    lease_max_s: float = 7 * 86400.0
    overtakes: int = 16
    """So often the first waiter of a queue is overtaken while it waits for another resource; then no more."""
    patience_s: float = 60.0
    """Who waited so long is not overtaken any more."""
    batch: int = 256
    """Grants, expiries and waiters looked at in one decision; `Decision.rest` goes on. Bounds memory."""
    page: int = 100
    """Resources, holders and waiters that one `Inspect` answers."""


# --- requests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every request from outside carries: who wants the answer, and where."""

    owner: str
    reply_to: str | None = None
    correlation_id: str | None = None
    sole: bool = False
    """True from a daemon, whose messages the broker may repeat hours later, and whose execution another daemon
    may have received too. The owner then counts only together with its address: locks that were asked for from
    another queue are somebody else's, and a request whose correlation id is lower than the one it meets is an
    old one that came again; it changes nothing and has no answer."""

    def owns(self, entry: Grant | Waiter) -> bool:
        """Whether what is stored is the requester's: to a `sole` one only what it asked for from its own queue."""
        return not self.sole or entry.reply_to == self.reply_to

    def is_older_than(self, entry: Grant | Waiter) -> bool:
        """Whether a `sole` request is an old one that came again: correlation ids of one owner rise."""
        return self.sole and (entry.correlation_id or "") > (self.correlation_id or "")

    def may_end(self, entry: Grant | Waiter) -> bool:
        """Whether it may give up what is stored."""
        return self.owns(entry) and not self.is_older_than(entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquire(Asked):
    """Have all these locks, together or not at all. Asking again tells the present answer again."""

    locks: tuple[tuple[str, Mode], ...]
    """In any order; a name given twice is taken once, in the stronger mode."""
    lease_s: float = 60.0
    """How long the grants live without being renewed."""
    wait: bool = True
    """False: be refused rather than wait."""
    wait_lease_s: float | None = None
    """How long the place in the queue lives without being renewed; None: as `lease_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep(Asked):
    """Renew all that many owners of one address hold, and their places in the queue. From daemons, always `sole`."""

    owners: tuple[str, ...]
    """At most `Limits.batch`; none: only to hear that the service is there."""
    lease_s: float
    wait_lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew(Asked):
    """Keep what is held, or the place in the queue. What is lost stays lost, and is said."""

    resources: tuple[str, ...] = ()
    """Empty: all that the owner holds."""
    lease_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Asked):
    """Give up grants. Idempotent. A `sole` one has no answer: its sender keeps no account of it."""

    resources: tuple[str, ...] = ()
    """Empty: everything, the place in the queue as well: the owner is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Asked):
    """Leave the queue. Who was granted meanwhile is told so, and holds it until it releases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect(Asked):
    """Say who holds and who waits. Changes nothing."""

    resources: tuple[str, ...] = ()
    """Empty: all, by name, those later than `after`."""
    after: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForceRelease:
    """An operator takes a resource away from its holder, or from all of them."""

    resource: str
    owner: str | None = None
    """Whose grant; None: everybody's."""
    reason: str
    """Told to the holder and kept in the history; must not be empty."""
    by: str
    """The operator."""
    reply_to: str | None = None
    correlation_id: str | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """Time has passed: end the leases that are over. The service asks this of itself."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Grant what these resources allow. Only from `Decision.rest`."""

    resources: tuple[str, ...]


Request = Acquire | Keep | Renew | Release | Cancel | Inspect | ForceRelease | Expire | Sweep


# --- answers ---------------------------------------------------------------------------------------------


class Answer(StrEnum):
    """The status of a reply."""

    GRANTED = "GRANTED"
    """All is held, with `grants`. Also the second answer to who waited."""
    WAITING = "WAITING"
    """In the queue, at `place`; GRANTED follows to the same address."""
    REFUSED = "REFUSED"
    """Not done, for `reason`; nothing changed."""
    RENEWED = "RENEWED"
    """All that was asked for lives on, with `grants`."""
    LOST = "LOST"
    """A renewal came too late for `lost`; `grants` lives on."""
    KEPT = "KEPT"
    """The answer to `Keep`: `held` are owners that hold all they were granted, `lost` those that hold nothing or
    less and do not wait either. Who is in neither waits."""
    RELEASED = "RELEASED"
    """`grants` are no longer held; empty when nothing was."""
    CANCELLED = "CANCELLED"
    """Not in the queue any more, or never was."""
    EXPIRED = "EXPIRED"
    """Unasked: the lease of `grants`, or of the place in the queue, ended."""
    REVOKED = "REVOKED"
    """Unasked: an operator took `grants` away, for `reason`."""
    STATE = "STATE"
    """What `Inspect` saw."""


class Refused(StrEnum):
    """Why a request was not done, for machines; the reason says it to people."""

    LIMIT = "limit"
    """It passes one of the service's limits; it always will."""
    NOT_FREE = "not-free"
    """It would have had to wait, and did not want to."""
    HOLDING = "holding"
    """Not while the owner holds or waits for something else."""
    UPGRADE = "upgrade"
    """SHARED does not become EXCLUSIVE while it is held."""
    ELSEWHERE = "elsewhere"
    """The same owner asked from another queue: the execution is at another daemon as well. Ask again later."""
    REASON_MISSING = "reason-missing"
    """A forced release must say why."""
    MALFORMED = "malformed"
    """It is no request; it was kept as a dead letter."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a waiter waits for: the first of its resources, by name, that cannot be had."""

    resource: str
    mode: Mode
    position: int
    """Among all that wait for the resource; 1 is next."""
    holders: tuple[str, ...]
    """Owners, at most ten; empty while the resource is kept for an earlier waiter."""


@dataclass(frozen=True, slots=True)
class ResourceState:
    """One resource as `Inspect` tells it."""

    resource: str
    fence: int
    """Its last fencing number."""
    holders: tuple[Grant, ...]
    waiters: tuple[Waiter, ...]
    """The first ones."""
    waiting: int
    """How many there are."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One message to send, once the changes are stored."""

    status: Answer
    owner: str
    reply_to: str | None
    correlation_id: str | None
    grants: tuple[Grant, ...] = ()
    place: Place | None = None
    lost: tuple[str, ...] = ()
    """Resources, with LOST; owners, with KEPT."""
    reason: str = ""
    states: tuple[ResourceState, ...] = ()
    held: tuple[str, ...] = ()
    """Owners, with KEPT."""
    code: Refused | None = None
    """With REFUSED."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a request."""

    changes: tuple[Change, ...] = ()
    """To be applied together, in order."""
    replies: tuple[Reply, ...] = ()
    rest: tuple[Request, ...] = ()
    """To be decided next, in order, on the changed state, in the same transaction and before anything else.
    Empty but for long cascades: one decision stays small, whatever it sets free."""


def outcome(request: Request, decision: Decision) -> str | None:
    """What became of a request, in a word: the status of its own answer, in lower case.

    Those that have none are told apart: `released`, and `stale`, which the requester's own successor had overtaken.
    None: it was not asked from outside, or it is decided with the rest.
    """
    if isinstance(request, Expire | Sweep) or any(isinstance(each, type(request)) for each in decision.rest):
        return None
    where = request.reply_to, request.correlation_id
    for reply in decision.replies:
        if (reply.reply_to, reply.correlation_id) == where and reply.status not in _UNASKED:
            return reply.status.value.lower()
    return "released" if isinstance(request, Release) else "stale"


_UNASKED = frozenset({Answer.EXPIRED, Answer.REVOKED})


__all__ = [
    "Acquire",
    "Answer",
    "Asked",
    "Cancel",
    "Decision",
    "Expire",
    "ForceRelease",
    "Inspect",
    "Keep",
    "Limits",
    "Locks",
    "Place",
    "Refused",
    "Release",
    "Renew",
    "Reply",
    "Request",
    "ResourceState",
    "Sweep",
    "outcome",
]
