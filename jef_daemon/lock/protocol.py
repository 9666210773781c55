"""The lock protocol: (what is stored, request, now) → what changes and what is told. Pure: no I/O, no clock.

Part in the flow: the lock service decodes a message, asks `decide`, applies the changes and sends the replies
in one transaction, and goes on with `Decision.rest` until it is empty. `Expire` it asks of itself, often.

One owner has one request: it holds, or waits, or neither. What has ended has ended, whether or not anybody
has noticed: before an owner's request is looked at, its leases that are over end. The rules by which a waiter
is granted are in `draft`; here is what each request does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jef_daemon.lock.draft import HOLDERS_TOLD, Draft
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Asked,
    Cancel,
    Decision,
    Expire,
    ForceRelease,
    Inspect,
    Keep,
    Limits,
    Place,
    Refused,
    Release,
    Renew,
    Reply,
    Request,
    ResourceState,
    Sweep,
)
from jef_daemon.lock.state import Among, Grant, Locks, LockView, Mode, Waiter

DEFAULT_LIMITS = Limits()

LEASE_ENDED = "the lease ended"
"""Why a grant is dropped that nobody renewed."""

Rest = tuple[Request, ...]


def decide(view: LockView, request: Request, now: float, limits: Limits = DEFAULT_LIMITS) -> Decision:
    """Decide one request.

    Args:
        view: what is stored; it must not change until the decision is made.
        request: what is asked.
        now: UTC seconds. A clock that goes back ends nothing and revives nothing.
        limits: the bounds of this lock service.

    Returns:
        The changes, the replies, and what is to be decided next in the same transaction.
    """
    draft = Draft(view, now, limits)
    rest = _HANDLERS[type(request)](draft, request)
    return Decision(tuple(draft.changes), tuple(draft.replies), rest)


def places(view: LockView, resource: str, most: int) -> list[Reply]:
    """Where the first waiters of a resource stand now: WAITING again, for those whom it blocks."""
    holders = tuple(grant.owner for grant in view.holders(resource, HOLDERS_TOLD))
    found = []
    for position, waiter in enumerate(view.waiters(resource, None, Among.ALL, 0, most), 1):
        mode = waiter.mode_of(resource)
        if waiter.blocked_at == resource and mode is not None:
            place = Place(resource, mode, position, holders)
            where = waiter.reply_to, waiter.correlation_id
            found.append(Reply(Answer.WAITING, waiter.owner, *where, place=place))
    return found


def normalised(locks: Sequence[tuple[str, Mode]]) -> Locks:
    """Sorted by resource, each named once, in the stronger of the modes it was named in."""
    stronger: dict[str, Mode] = {}
    for resource, mode in locks:
        if stronger.get(resource) is not Mode.EXCLUSIVE:
            stronger[resource] = mode
    return tuple(sorted(stronger.items()))


# --- acquire ---------------------------------------------------------------------------------------------


def _acquire(draft: Draft, request: Acquire) -> Rest:
    request = dataclasses.replace(request, locks=normalised(request.locks))
    if reason := _beyond_limits(request, draft.limits):
        return _refuse(draft, request, Refused.LIMIT, reason)
    held = draft.view.grants_of(request.owner)
    waiter = draft.view.waiter_of(request.owner)
    if ended := _end_leases(draft, held, waiter):
        # Others may have waited for what just ended, and come before a request that starts anew.
        return (*ended, request)
    known: list[Grant | Waiter] = [*held, *([waiter] if waiter is not None else [])]
    if other := next((entry for entry in known if not _is_of(entry, request)), None):
        reason = f"the owner asked for locks from another queue, {other.reply_to}, and has them still"
        return _refuse(draft, request, Refused.ELSEWHERE, reason)
    if any(_is_newer(entry, request) for entry in known):
        return ()
    if held:
        return _acquire_while_holding(draft, request, held)
    if waiter is not None:
        return _acquire_while_waiting(draft, request, waiter)
    blocked_at, passed = draft.obstacle(request.locks)
    if blocked_at is not None:
        return _join_queue(draft, request, blocked_at)
    draft.overtake(passed)
    draft.grant(request, request.owner, request.locks, request.lease_s)
    return ()


def _beyond_limits(request: Acquire, limits: Limits) -> str:
    """The limit that a request passes, in a sentence; empty when it is fine."""
    longest = max((len(name) for name in (request.owner, *dict(request.locks))), default=0)
    leases = request.lease_s, _wait_lease_s(request)
    allowed = all(limits.lease_min_s <= lease <= limits.lease_max_s for lease in leases)
    checks = (
        (not request.locks, "it names no resource"),
        (
            len(request.locks) > limits.locks_per_request,
            f"{len(request.locks)} resources in one request; the limit is {limits.locks_per_request}",
        ),
        (longest > limits.name_length, f"a name of {longest} characters; the limit is {limits.name_length}"),
        (not request.owner or not all(dict(request.locks)), "a name is empty"),
        (not allowed, _lease_range(limits)),  # NaN as well: it compares false with all
    )
    return next((sentence for passed, sentence in checks if passed), "")


def _lease_range(limits: Limits) -> str:
    return f"a lease must be from {limits.lease_min_s:g} to {limits.lease_max_s:g} seconds"


def _acquire_while_holding(draft: Draft, request: Acquire, held: Sequence[Grant]) -> Rest:
    """The same answer again, or a refusal: to wait while holding is how deadlocks begin."""
    mine = {grant.resource: grant for grant in held}
    for resource, wanted in request.locks:
        if resource not in mine:
            reason = f"{resource}: not while the owner holds others; release them first"
            return _refuse(draft, request, Refused.HOLDING, reason)
        if not mine[resource].mode.covers(wanted):
            reason = f"{resource}: SHARED is not upgraded while it is held"
            return _refuse(draft, request, Refused.UPGRADE, reason)
    grants = tuple(draft.renew(mine[resource], request, request.lease_s) for resource, _ in request.locks)
    draft.tell(request.owner, request, Answer.GRANTED, grants=grants)
    return ()


def _acquire_while_waiting(draft: Draft, request: Acquire, waiter: Waiter) -> Rest:
    """Its place again, told and kept under the new address."""
    if request.locks != waiter.locks:
        return _refuse(draft, request, Refused.HOLDING, "the owner waits for other locks; cancel that first")
    blocked_at, _ = draft.obstacle(waiter.locks, waiter.ticket)
    # A waiter is blocked somewhere, always; to tell `blocked_at` otherwise is only to be total.
    resource = blocked_at or waiter.blocked_at
    mode = dict(waiter.locks)[resource]
    place = draft.place(resource, mode, draft.view.ahead(resource, waiter.ticket) + 1)
    if not request.wait:
        reason = "not free now; the earlier request goes on waiting"
        return _refuse(draft, request, Refused.NOT_FREE, reason, place)
    draft.change_waiter(
        dataclasses.replace(
            waiter,
            reply_to=request.reply_to,
            correlation_id=request.correlation_id,
            wait_until=max(waiter.wait_until, draft.now + _wait_lease_s(request)),
            lease_s=request.lease_s,
            blocked_at=resource,
        )
    )
    draft.tell(request.owner, request, Answer.WAITING, place=place)
    return ()


def _join_queue(draft: Draft, request: Acquire, blocked_at: str) -> Rest:
    counts = {resource: draft.view.waiting(resource) for resource, _ in request.locks}
    place = draft.place(blocked_at, dict(request.locks)[blocked_at], counts[blocked_at] + 1)
    if not request.wait:
        return _refuse(draft, request, Refused.NOT_FREE, f"{blocked_at}: not free now", place)
    limit = draft.limits.waiters_per_resource
    if full := next((resource for resource, count in counts.items() if count >= limit), None):
        return _refuse(draft, request, Refused.LIMIT, f"{full}: {limit} wait already, which is the limit")
    draft.put_waiter(
        Waiter(
            ticket=draft.view.next_ticket(),
            owner=request.owner,
            locks=request.locks,
            reply_to=request.reply_to,
            correlation_id=request.correlation_id,
            asked_at=draft.now,
            wait_until=draft.now + _wait_lease_s(request),
            lease_s=request.lease_s,
            blocked_at=blocked_at,
        )
    )
    draft.tell(request.owner, request, Answer.WAITING, place=place)
    return ()


def _wait_lease_s(request: Acquire) -> float:
    return request.lease_s if request.wait_lease_s is None else request.wait_lease_s


def _refuse(
    draft: Draft, request: Acquire | Renew | Keep, code: Refused, reason: str, place: Place | None = None
) -> Rest:
    draft.tell(request.owner, request, Answer.REFUSED, reason=reason, place=place, code=code)
    return ()


def _is_of(entry: Grant | Waiter, request: Asked) -> bool:
    """Whether what is stored is the requester's: to a `sole` one only what it asked for from its own queue."""
    return not request.sole or entry.reply_to == request.reply_to


def _is_newer(entry: Grant | Waiter, request: Asked) -> bool:
    """Whether a `sole` request is an old one that came again: correlation ids of one owner rise."""
    return request.sole and (entry.correlation_id or "") > (request.correlation_id or "")


# --- keep, give up ---------------------------------------------------------------------------------------


def _keep(draft: Draft, request: Keep) -> Rest:
    """One message for all that run and wait at a daemon: what is kept costs the queue nothing."""
    limits = draft.limits
    if len(request.owners) > limits.batch:
        reason = f"{len(request.owners)} owners in one request; the limit is {limits.batch}"
        return _refuse(draft, request, Refused.LIMIT, reason)
    if not all(
        limits.lease_min_s <= lease <= limits.lease_max_s for lease in (request.lease_s, request.wait_lease_s)
    ):
        return _refuse(draft, request, Refused.LIMIT, _lease_range(limits))
    held, lost, freed = [], [], set[str]()
    for owner in dict.fromkeys(request.owners):
        grants = [grant for grant in draft.view.grants_of(owner) if _is_of(grant, request)]
        over = [grant for grant in grants if grant.lease_until <= draft.now]
        freed |= _end(draft, over, ())
        live = [draft.renew(grant, grant, request.lease_s) for grant in grants if grant not in over]
        if live and not over:
            held.append(owner)
        elif live or not _keep_place(draft, owner, request):
            lost.append(owner)
    draft.tell(request.owner, request, Answer.KEPT, held=tuple(held), lost=tuple(lost))
    return _sweep(draft, freed)


def _keep_place(draft: Draft, owner: str, request: Keep) -> bool:
    """Renew an owner's place in the queue; False when it has none."""
    waiter = draft.view.waiter_of(owner)
    # One whose lease of waiting is over but who speaks now is not dead: it keeps its place.
    if waiter is None or not _is_of(waiter, request):
        return False
    until = max(waiter.wait_until, draft.now + request.wait_lease_s)
    draft.change_waiter(dataclasses.replace(waiter, wait_until=until))
    return True


def _renew(draft: Draft, request: Renew) -> Rest:
    if not draft.limits.lease_min_s <= request.lease_s <= draft.limits.lease_max_s:
        return _refuse(draft, request, Refused.LIMIT, _lease_range(draft.limits))
    held = draft.view.grants_of(request.owner)
    waiter = draft.view.waiter_of(request.owner)
    if ended := _end_leases(draft, held, waiter):
        return (*ended, request)
    if waiter is not None and not request.resources:
        until = max(waiter.wait_until, draft.now + request.lease_s)
        draft.change_waiter(dataclasses.replace(waiter, wait_until=until))
        # No place: counting who is ahead of each of 100,000 waiters that renew is not flat. Ask again for it.
        draft.tell(request.owner, request, Answer.WAITING)
        return ()
    named = request.resources or tuple(grant.resource for grant in held)
    grants = tuple(draft.renew(grant, grant, request.lease_s) for grant in held if grant.resource in named)
    lost = tuple(sorted({*named} - {grant.resource for grant in grants}))
    if grants and not lost:
        draft.tell(request.owner, request, Answer.RENEWED, grants=grants)
    else:
        reason = "not held: never granted, released, or the lease ended"
        draft.tell(request.owner, request, Answer.LOST, grants=grants, lost=lost, reason=reason)
    return ()


def _release(draft: Draft, request: Release) -> Rest:
    held = draft.view.grants_of(request.owner)
    given_up = tuple(
        grant
        for grant in held
        if (not request.resources or grant.resource in request.resources) and _may_end(grant, request)
    )
    for grant in given_up:
        draft.drop_grant(grant, "released")
    freed = [grant.resource for grant in given_up]
    waiter = None if request.resources else draft.view.waiter_of(request.owner)
    if waiter is not None and _may_end(waiter, request):
        freed += _leave(draft, waiter, request, "released")
    if not request.sole:
        draft.tell(request.owner, request, Answer.RELEASED, grants=given_up)
    return _sweep(draft, freed)


def _may_end(entry: Grant | Waiter, request: Asked) -> bool:
    return _is_of(entry, request) and not _is_newer(entry, request)


def _cancel(draft: Draft, request: Cancel) -> Rest:
    waiter = draft.view.waiter_of(request.owner)
    if waiter is not None:
        freed = _leave(draft, waiter, request, "cancelled")
        draft.tell(request.owner, request, Answer.CANCELLED)
        return _sweep(draft, freed)
    held = tuple(draft.view.grants_of(request.owner))
    if held:
        # The grant crossed the cancel on its way. Who waited may be using it by now: it says when it ends.
        reason = "granted before it was cancelled; release it"
        draft.tell(request.owner, request, Answer.GRANTED, grants=held, reason=reason)
    else:
        draft.tell(request.owner, request, Answer.CANCELLED)
    return ()


def _leave(draft: Draft, waiter: Waiter, request: Release | Cancel, reason: str) -> list[str]:
    """Take a waiter out of the queue; who asked for the locks learns it, if it is not who asks now."""
    draft.drop_waiter(waiter, reason)
    asked = waiter.reply_to, waiter.correlation_id
    if not request.sole and asked != (request.reply_to, request.correlation_id):
        draft.tell(waiter.owner, waiter, Answer.CANCELLED, reason=reason)
    return [resource for resource, _ in waiter.locks]


def _force_release(draft: Draft, request: ForceRelease) -> Rest:
    if not request.reason.strip():
        reason = "a forced release needs a reason"
        draft.tell(request.by, request, Answer.REFUSED, reason=reason, code=Refused.REASON_MISSING)
        return ()
    if request.owner is None:
        found: Sequence[Grant] = draft.view.holders(request.resource, draft.limits.batch)
    else:
        found = [grant for grant in draft.view.grants_of(request.owner) if grant.resource == request.resource]
    reason = f"released by force by {request.by}: {request.reason}"
    for grant in found:
        draft.drop_grant(grant, reason)
        lost = (grant.resource,)
        draft.tell(grant.owner, grant, Answer.REVOKED, grants=(grant,), lost=lost, reason=reason)
    if len(found) == draft.limits.batch:
        return (request,)  # Nothing is handed on before the last holder is gone.
    draft.tell(request.by, request, Answer.RELEASED, grants=tuple(found), reason=request.reason)
    return _sweep(draft, [request.resource])


# --- time ------------------------------------------------------------------------------------------------


def _expire(draft: Draft, request: Expire) -> Rest:
    batch = draft.limits.batch
    grants = draft.view.expired_grants(draft.now, batch)
    waiters = draft.view.expired_waiters(draft.now, batch)
    again = (request,) if batch in (len(grants), len(waiters)) else ()
    return _sweep(draft, _end(draft, grants, waiters)) + again


def _end_leases(draft: Draft, held: Sequence[Grant], waiter: Waiter | None) -> Rest:
    """End what of one owner is over, leaving what follows from it as the rest; empty when nothing is."""
    grants = [grant for grant in held if grant.lease_until <= draft.now]
    waiters = [waiter] if waiter is not None and waiter.wait_until <= draft.now else []
    freed = _end(draft, grants, waiters)
    return (Sweep(tuple(sorted(freed))),) if freed else ()


def _end(draft: Draft, grants: Sequence[Grant], waiters: Sequence[Waiter]) -> set[str]:
    """End leases, tell each owner once, and return the resources to be swept."""
    lost: dict[tuple[str, str | None, str | None], list[Grant]] = {}
    for grant in grants:
        draft.drop_grant(grant, LEASE_ENDED)
        lost.setdefault((grant.owner, grant.reply_to, grant.correlation_id), []).append(grant)
    for (owner, *_), ended in lost.items():
        names = tuple(grant.resource for grant in ended)
        draft.tell(owner, ended[0], Answer.EXPIRED, grants=tuple(ended), lost=names, reason=LEASE_ENDED)
    for waiter in waiters:
        draft.drop_waiter(waiter, "the lease of waiting ended")
        draft.tell(waiter.owner, waiter, Answer.EXPIRED, reason="the lease of waiting ended")
    freed = {grant.resource for grant in grants}
    return freed.union(resource for waiter in waiters for resource, _ in waiter.locks)


# --- hand on, look ---------------------------------------------------------------------------------------


def _go_on(draft: Draft, request: Sweep) -> Rest:
    return _sweep(draft, request.resources)


def _sweep(draft: Draft, resources: Sequence[str] | set[str]) -> Rest:
    left = draft.sweep(sorted(resources))
    return (Sweep(left),) if left else ()


def _inspect(draft: Draft, request: Inspect) -> Rest:
    page = draft.limits.page
    names = request.resources[:page] or draft.view.resources(request.after, page)
    states = tuple(
        ResourceState(
            resource=name,
            fence=draft.view.fence(name),
            holders=tuple(draft.view.holders(name, page)),
            waiters=tuple(draft.view.waiters(name, None, Among.ALL, 0, page)),
            waiting=draft.view.waiting(name),
        )
        for name in names
    )
    draft.tell(request.owner, request, Answer.STATE, states=states)
    return ()


# `Any`: each handler takes the one request it stands beside.
_HANDLERS: dict[type[Request], Callable[[Draft, Any], Rest]] = {
    Acquire: _acquire,
    Keep: _keep,
    Renew: _renew,
    Release: _release,
    Cancel: _cancel,
    ForceRelease: _force_release,
    Expire: _expire,
    Sweep: _go_on,
    Inspect: _inspect,
}
