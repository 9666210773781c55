"""The lock protocol: (what is stored, request, now) → what changes and what is told. Pure: no I/O, no clock.

Part in the flow: the lock service decodes a message, asks `decide`, applies the changes and sends the replies
in one transaction, and goes on with `Decision.rest` until it is empty. `Expire` it asks of itself, often.

One owner has one request: it holds, or waits, or neither. What has ended has ended, whether or not anybody
has noticed: before an owner's request is looked at, its leases that are over end. The rules by which a waiter
is granted are in `draft`; what an acquire does is in `acquiring`, what time does in `leases`, the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jef_daemon.lock.acquiring import acquire
from jef_daemon.lock.draft import HOLDERS_TOLD, Draft, Rest
from jef_daemon.lock.leases import expire, hand_on, keep, renew
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
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
from jef_daemon.lock.state import Among, Grant, LockView, Waiter

DEFAULT_LIMITS = Limits()


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


# --- give up ---------------------------------------------------------------------------------------------


def _release(draft: Draft, request: Release) -> Rest:
    held = draft.view.grants_of(request.owner)
    given_up = tuple(
        grant
        for grant in held
        if (not request.resources or grant.resource in request.resources) and request.may_end(grant)
    )
    for grant in given_up:
        draft.drop_grant(grant, "released")
    freed = [grant.resource for grant in given_up]
    waiter = None if request.resources else draft.view.waiter_of(request.owner)
    if waiter is not None and request.may_end(waiter):
        freed += _leave(draft, waiter, request, "released")
    if not request.sole:
        draft.tell(request.owner, request, Answer.RELEASED, grants=given_up)
    return hand_on(draft, freed)


def _cancel(draft: Draft, request: Cancel) -> Rest:
    waiter = draft.view.waiter_of(request.owner)
    if waiter is not None:
        freed = _leave(draft, waiter, request, "cancelled")
        draft.tell(request.owner, request, Answer.CANCELLED)
        return hand_on(draft, freed)
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
    return hand_on(draft, [request.resource])


# --- hand on, look ---------------------------------------------------------------------------------------


def _go_on(draft: Draft, request: Sweep) -> Rest:
    return hand_on(draft, request.resources)


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


# `Any`: each function takes the one request it stands beside.
_HANDLERS: dict[type[Request], Callable[[Draft, Any], Rest]] = {
    Acquire: acquire,
    Keep: keep,
    Renew: renew,
    Release: _release,
    Cancel: _cancel,
    ForceRelease: _force_release,
    Expire: expire,
    Sweep: _go_on,
    Inspect: _inspect,
}
