"""What an acquire does: all the locks at once, a place in the queue, the present answer again, or a refusal. Pure.

Part in the flow: `protocol.decide` hands each `Acquire` to `acquire`. Whether a request is blocked, and where, is the
draft's; here is what follows from that for its owner, who holds, or waits, or neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jef_daemon.lock.draft import Draft, Rest
from jef_daemon.lock.leases import end_leases, lease_range
from jef_daemon.lock.requests import Acquire, Answer, Limits, Refused
from jef_daemon.lock.state import Grant, Locks, Mode, Waiter


def acquire(draft: Draft, request: Acquire) -> Rest:
    """Decide what an owner asks for, after what of its own is over has ended."""
    request = dataclasses.replace(request, locks=normalised(request.locks))
    if reason := _beyond_limits(request, draft.limits):
        return draft.refuse(request, Refused.LIMIT, reason)
    held = draft.view.grants_of(request.owner)
    waiter = draft.view.waiter_of(request.owner)
    if ended := end_leases(draft, held, waiter):
        # Others may have waited for what just ended, and come before a request that starts anew.
        return (*ended, request)
    known: list[Grant | Waiter] = [*held, *([waiter] if waiter is not None else [])]
    if other := next((entry for entry in known if not request.owns(entry)), None):
        reason = f"the owner asked for locks from another queue, {other.reply_to}, and has them still"
        return draft.refuse(request, Refused.ELSEWHERE, reason)
    if any(request.is_older_than(entry) for entry in known):
        return ()
    if held:
        return _ask_while_holding(draft, request, held)
    if waiter is not None:
        return _ask_while_waiting(draft, request, waiter)
    blocked_at, passed = draft.obstacle(request.locks)
    if blocked_at is not None:
        return _join_queue(draft, request, blocked_at)
    draft.overtake(passed)
    draft.grant(request, request.owner, request.locks, request.lease_s)
    return ()


def normalised(locks: Sequence[tuple[str, Mode]]) -> Locks:
    """Sorted by resource, each named once, in the stronger of the modes it was named in."""
    stronger: dict[str, Mode] = {}
    for resource, mode in locks:
        if stronger.get(resource) is not Mode.EXCLUSIVE:
            stronger[resource] = mode
    return tuple(sorted(stronger.items()))


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
        (not allowed, lease_range(limits)),  # NaN as well: it compares false with all
    )
    return next((sentence for passed, sentence in checks if passed), "")


def _ask_while_holding(draft: Draft, request: Acquire, held: Sequence[Grant]) -> Rest:
    """The same answer again, or a refusal: to wait while holding is how deadlocks begin."""
    mine = {grant.resource: grant for grant in held}
    for resource, wanted in request.locks:
        if resource not in mine:
            reason = f"{resource}: not while the owner holds others; release them first"
            return draft.refuse(request, Refused.HOLDING, reason)
        if not mine[resource].mode.covers(wanted):
            reason = f"{resource}: SHARED is not upgraded while it is held"
            return draft.refuse(request, Refused.UPGRADE, reason)
    grants = tuple(draft.renew(mine[resource], request, request.lease_s) for resource, _ in request.locks)
    draft.tell(request.owner, request, Answer.GRANTED, grants=grants)
    return ()


def _ask_while_waiting(draft: Draft, request: Acquire, waiter: Waiter) -> Rest:
    """Its place again, told and kept under the new address."""
    if request.locks != waiter.locks:
        return draft.refuse(request, Refused.HOLDING, "the owner waits for other locks; cancel that first")
    blocked_at, _ = draft.obstacle(waiter.locks, waiter.ticket)
    # A waiter is blocked somewhere, always; to tell `blocked_at` otherwise is only to be total.
    resource = blocked_at or waiter.blocked_at
    mode = dict(waiter.locks)[resource]
    place = draft.place(resource, mode, draft.view.ahead(resource, waiter.ticket) + 1)
    if not request.wait:
        reason = "not free now; the earlier request goes on waiting"
        return draft.refuse(request, Refused.NOT_FREE, reason, place)
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
        return draft.refuse(request, Refused.NOT_FREE, f"{blocked_at}: not free now", place)
    limit = draft.limits.waiters_per_resource
    if full := next((resource for resource, count in counts.items() if count >= limit), None):
        return draft.refuse(request, Refused.LIMIT, f"{full}: {limit} wait already, which is the limit")
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
