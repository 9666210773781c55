"""What keeps a lease alive, and what its end does: who held hears of it, who waited is granted. Pure.

Part in the flow: `protocol.decide` hands each `Keep`, `Renew` and `Expire` to its function here; `acquiring` ends first
what of its owner is over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jef_daemon.lock.draft import Draft, Rest
from jef_daemon.lock.requests import Answer, Expire, Keep, Limits, Refused, Renew, Sweep
from jef_daemon.lock.state import Grant, Waiter

LEASE_ENDED = "the lease ended"
"""Why a grant is dropped that nobody renewed."""


def keep(draft: Draft, request: Keep) -> Rest:
    """One message for all that run and wait at a daemon: what is kept costs the queue nothing."""
    limits = draft.limits
    if len(request.owners) > limits.batch:
        reason = f"{len(request.owners)} owners in one request; the limit is {limits.batch}"
        return draft.refuse(request, Refused.LIMIT, reason)
    if not all(
        limits.lease_min_s <= lease <= limits.lease_max_s for lease in (request.lease_s, request.wait_lease_s)
    ):
        return draft.refuse(request, Refused.LIMIT, lease_range(limits))
    held, lost, freed = [], [], set[str]()
    for owner in dict.fromkeys(request.owners):
        grants = [grant for grant in draft.view.grants_of(owner) if request.owns(grant)]
        over = [grant for grant in grants if grant.lease_until <= draft.now]
        freed |= _end(draft, over, ())
        live = [draft.renew(grant, grant, request.lease_s) for grant in grants if grant not in over]
        if live and not over:
            held.append(owner)
        elif live or not _keep_place(draft, owner, request):
            lost.append(owner)
    draft.tell(request.owner, request, Answer.KEPT, held=tuple(held), lost=tuple(lost))
    return hand_on(draft, freed)


def renew(draft: Draft, request: Renew) -> Rest:
    """Let what an owner holds live longer, or its place in the queue."""
    if not draft.limits.lease_min_s <= request.lease_s <= draft.limits.lease_max_s:
        return draft.refuse(request, Refused.LIMIT, lease_range(draft.limits))
    held = draft.view.grants_of(request.owner)
    waiter = draft.view.waiter_of(request.owner)
    if ended := end_leases(draft, held, waiter):
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


def expire(draft: Draft, request: Expire) -> Rest:
    """End what is over, as much as goes into one decision."""
    batch = draft.limits.batch
    grants = draft.view.expired_grants(draft.now, batch)
    waiters = draft.view.expired_waiters(draft.now, batch)
    again = (request,) if batch in (len(grants), len(waiters)) else ()
    return hand_on(draft, _end(draft, grants, waiters)) + again


def end_leases(draft: Draft, held: Sequence[Grant], waiter: Waiter | None) -> Rest:
    """End what of one owner is over, leaving what follows from it as the rest; empty when nothing is."""
    grants = [grant for grant in held if grant.lease_until <= draft.now]
    waiters = [waiter] if waiter is not None and waiter.wait_until <= draft.now else []
    freed = _end(draft, grants, waiters)
    return (Sweep(tuple(sorted(freed))),) if freed else ()


def hand_on(draft: Draft, resources: Sequence[str] | set[str]) -> Rest:
    """Grant those who waited for what has become free; what is left when the decision is full is the rest."""
    left = draft.sweep(sorted(resources))
    return (Sweep(left),) if left else ()


def lease_range(limits: Limits) -> str:
    """How long a lease may be, in a sentence."""
    return f"a lease must be from {limits.lease_min_s:g} to {limits.lease_max_s:g} seconds"


def _keep_place(draft: Draft, owner: str, request: Keep) -> bool:
    """Renew an owner's place in the queue; False when it has none."""
    waiter = draft.view.waiter_of(owner)
    # One whose lease of waiting is over but who speaks now is not dead: it keeps its place.
    if waiter is None or not request.owns(waiter):
        return False
    until = max(waiter.wait_until, draft.now + request.wait_lease_s)
    draft.change_waiter(dataclasses.replace(waiter, wait_until=until))
    return True


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
