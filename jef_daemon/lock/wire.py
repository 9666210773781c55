"""Between the wire's lock messages and the protocol's requests and replies. Pure.

Types are checked here and make a dead letter of what is wrong; values are the protocol's to refuse, in an
answer that names the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from jef_daemon.errors import RequestRefused
from jef_daemon.lock.messages import LockReply, LockRequest
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Cancel,
    ForceRelease,
    Inspect,
    Keep,
    Release,
    Renew,
    Reply,
    Request,
    ResourceState,
)
from jef_daemon.lock.state import Grant
from jef_daemon.messages import decode_object, explain, timestamp


def decode(body: bytes, limit: int, reply_to: str | None, correlation_id: str | None) -> Request:
    """The request that a message asks for.

    Raises:
        RequestRefused: it is none; with the codes of job requests.
    """
    decode_object(body, limit)
    try:
        message = LockRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused("field-invalid", explain(error)) from None
    if not (message.owner or message.owners) and message.operation not in _WITHOUT_OWNER:
        raise RequestRefused("field-invalid", "owner: required")
    where = {"reply_to": reply_to, "correlation_id": correlation_id}
    return _REQUESTS[message.operation](message, where)


def encode(reply: Reply) -> bytes:
    """A reply as it is sent."""
    told: dict[str, Any] = {"status": reply.status, "owner": reply.owner}
    if reply.grants:
        told["grants"] = [_grant(grant) for grant in reply.grants]
    if reply.place is not None:
        place = reply.place
        told |= {"resource": place.resource, "mode": place.mode, "position": place.position}
        told["holders"] = list(place.holders)
    if reply.lost:
        told["lost"] = list(reply.lost)
    if reply.status is Answer.KEPT:
        told |= {"held": list(reply.held), "lost": list(reply.lost)}
    if reply.code:
        told["code"] = reply.code
    if reply.reason:
        told["reason"] = reply.reason
    if reply.status is Answer.STATE:
        told["resources"] = [_resource(state) for state in reply.states]
    return to_json(told)


def acquire(owner: str, locks: Iterable[tuple[str, str]], lease_s: float, wait_lease_s: float) -> bytes:
    """A daemon's request for locks, to be sent with its own queue as `reply_to`."""
    return to_json(
        {
            "operation": "acquire",
            "owner": owner,
            "locks": [{"resource": resource, "mode": mode} for resource, mode in locks],
            "leaseSeconds": lease_s,
            "waitLeaseSeconds": wait_lease_s,
            "sole": True,
        }
    )


def release(owner: str) -> bytes:
    """A daemon's word that an attempt is over: what it holds and its place in the queue."""
    return to_json({"operation": "release", "owner": owner, "sole": True})


def keep(owners: Sequence[str], lease_s: float, wait_lease_s: float) -> bytes:
    """A daemon's word that these still run or wait."""
    return to_json(
        {
            "operation": "renew",
            "owners": owners,
            "leaseSeconds": lease_s,
            "waitLeaseSeconds": wait_lease_s,
            "sole": True,
        }
    )


def decode_reply(body: bytes) -> LockReply:
    """A reply as the client reads it.

    Raises:
        ValidationError: it is none.
    """
    return LockReply.model_validate_json(body)


def _acquire(message: LockRequest, where: dict[str, Any]) -> Request:
    return Acquire(
        owner=message.owner,
        locks=tuple((lock.resource, lock.mode) for lock in message.locks),
        lease_s=message.lease_seconds,
        wait=message.wait,
        wait_lease_s=message.wait_lease_seconds,
        sole=message.sole,
        **where,
    )


def _renew(message: LockRequest, where: dict[str, Any]) -> Request:
    if message.owners or not message.owner:
        waiting = message.wait_lease_seconds
        return Keep(
            owner=message.owner,
            owners=tuple(message.owners),
            lease_s=message.lease_seconds,
            wait_lease_s=message.lease_seconds if waiting is None else waiting,
            sole=message.sole,
            **where,
        )
    return Renew(owner=message.owner, resources=_names(message), lease_s=message.lease_seconds, **where)


def _release(message: LockRequest, where: dict[str, Any]) -> Request:
    return Release(owner=message.owner, resources=_names(message), sole=message.sole, **where)


def _cancel(message: LockRequest, where: dict[str, Any]) -> Request:
    return Cancel(owner=message.owner, **where)


def _inspect(message: LockRequest, where: dict[str, Any]) -> Request:
    return Inspect(owner=message.owner, resources=_names(message), after=message.after, **where)


def _force_release(message: LockRequest, where: dict[str, Any]) -> Request:
    if len(message.locks) != 1:
        raise RequestRefused("field-invalid", "locks: force-release takes exactly one")
    return ForceRelease(
        resource=message.locks[0].resource,
        owner=message.owner or None,
        reason=message.reason,
        by=message.by or "an operator",
        **where,
    )


_WITHOUT_OWNER = frozenset({"inspect", "force-release", "renew"})

_REQUESTS: dict[str, Callable[[LockRequest, dict[str, Any]], Request]] = {
    "acquire": _acquire,
    "renew": _renew,
    "release": _release,
    "cancel": _cancel,
    "inspect": _inspect,
    "force-release": _force_release,
}


def _names(message: LockRequest) -> tuple[str, ...]:
    return tuple(lock.resource for lock in message.locks)


def _grant(grant: Grant) -> dict[str, Any]:
    return {
        "resource": grant.resource,
        "mode": grant.mode,
        "fencingToken": grant.fencing_token,
        "leaseUntil": timestamp(grant.lease_until),
    }


def _resource(state: ResourceState) -> dict[str, Any]:
    return {
        "resource": state.resource,
        "fencingToken": state.fence,
        "holders": [
            _grant(grant) | {"owner": grant.owner, "grantedAt": timestamp(grant.granted_at)}
            for grant in state.holders
        ],
        "waiters": [
            {
                "owner": waiter.owner,
                "mode": waiter.mode_of(state.resource),
                "askedAt": timestamp(waiter.asked_at),
            }
            for waiter in state.waiters
        ],
        "waiting": state.waiting,
    }
