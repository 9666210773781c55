"""The lock store's SQL: each statement written once, so that each is compiled once."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Select, and_, bindparam, delete, func, insert, select, union, update

from jef_daemon.ledger import schema
from jef_daemon.lock.state import Among, Grant, Mode, Waiter

_GRANTS, _WAITERS, _WANTS = schema.lock_grants.c, schema.lock_waiters.c, schema.lock_wants.c
_RESOURCES = schema.lock_resources.c

_GRANT = [
    _GRANTS[name]
    for name in (
        "resource",
        "mode",
        "owner",
        "fencing_token",
        "lease_until",
        "granted_at",
        "reply_to",
        "correlation_id",
    )
]
_WAITER = [
    _WAITERS[name]
    for name in (
        "ticket",
        "owner",
        "locks",
        "reply_to",
        "correlation_id",
        "asked_at",
        "wait_until",
        "lease_s",
        "blocked_at",
        "overtaken",
        "firm",
    )
]

GRANTS_OF = select(*_GRANT).where(_GRANTS.owner == bindparam("owner")).order_by(_GRANTS.resource)
HOLDERS = (
    select(*_GRANT)
    .where(_GRANTS.resource == bindparam("resource"))
    .order_by(_GRANTS.fencing_token)
    .limit(bindparam("most"))
)
WAITER_OF = select(*_WAITER).where(_WAITERS.owner == bindparam("owner"))
AHEAD = (
    select(func.count())
    .select_from(schema.lock_wants)
    .where(_WANTS.resource == bindparam("resource"), _WANTS.ticket < bindparam("ticket"))
)
COUNTERS = select(_RESOURCES.fence, _RESOURCES.waiting).where(_RESOURCES.resource == bindparam("name"))
LAST_TICKET = select(func.max(_WAITERS.ticket))
EXPIRED_GRANTS = (
    select(*_GRANT)
    .where(_GRANTS.lease_until <= bindparam("now"))
    .order_by(_GRANTS.lease_until, _GRANTS.resource, _GRANTS.owner)
    .limit(bindparam("most"))
)
EXPIRED_WAITERS = (
    select(*_WAITER)
    .where(_WAITERS.wait_until <= bindparam("now"))
    .order_by(_WAITERS.wait_until, _WAITERS.ticket)
    .limit(bindparam("most"))
)
_IN_USE = union(
    select(_GRANTS.resource).where(_GRANTS.resource > bindparam("after")),
    select(_RESOURCES.resource).where(_RESOURCES.waiting > 0, _RESOURCES.resource > bindparam("after")),
)
IN_USE_PAGE = _IN_USE.order_by("resource").limit(bindparam("most"))

_THIS_GRANT = and_(_GRANTS.resource == bindparam("r"), _GRANTS.owner == bindparam("o"))
PUT_GRANT = insert(schema.lock_grants)
RENEW_GRANT = (
    update(schema.lock_grants)
    .where(_THIS_GRANT)
    .values(
        lease_until=bindparam("until"), reply_to=bindparam("reply"), correlation_id=bindparam("correlation")
    )
)
DROP_GRANT = delete(schema.lock_grants).where(_THIS_GRANT)
PUT_RESOURCE = insert(schema.lock_resources)
SET_FENCE = (
    update(schema.lock_resources).where(_RESOURCES.resource == bindparam("r")).values(fence=bindparam("n"))
)
COUNT = (
    update(schema.lock_resources)
    .where(_RESOURCES.resource == bindparam("r"))
    .values(waiting=_RESOURCES.waiting + bindparam("by"))
)
PUT_WAITER = insert(schema.lock_waiters)
CHANGE_WAITER = (
    update(schema.lock_waiters)
    .where(_WAITERS.ticket == bindparam("t"))
    .values({name: bindparam(f"new_{name}") for name in ("reply_to", "correlation_id", "wait_until")})
    .values({name: bindparam(f"new_{name}") for name in ("lease_s", "blocked_at", "overtaken", "firm")})
)
DROP_WAITER = delete(schema.lock_waiters).where(_WAITERS.ticket == bindparam("t"))
PUT_WANT = insert(schema.lock_wants)
CHANGE_WANT = (
    update(schema.lock_wants)
    .where(_WANTS.resource == bindparam("r"), _WANTS.ticket == bindparam("t"))
    # A renewal changes neither, and is most of what changes a waiter.
    .where((_WANTS.firm != bindparam("is_firm")) | (_WANTS.blocked != bindparam("is_blocked")))
    .values(firm=bindparam("is_firm"), blocked=bindparam("is_blocked"))
)
# With the resource, as the key begins with it: by the ticket alone the whole table would be read.
DROP_WANT = delete(schema.lock_wants).where(
    _WANTS.resource == bindparam("r"), _WANTS.ticket == bindparam("t")
)
PROLONG_GRANTS = (
    update(schema.lock_grants)
    .where(_GRANTS.lease_until < bindparam("least"))
    .values(lease_until=bindparam("least"))
)
PROLONG_WAITERS = (
    update(schema.lock_waiters)
    .where(_WAITERS.wait_until < bindparam("least"))
    .values(wait_until=bindparam("least"))
)
SHIFT_GRANTS = update(schema.lock_grants).values(lease_until=_GRANTS.lease_until + bindparam("by"))
SHIFT_WAITERS = update(schema.lock_waiters).values(wait_until=_WAITERS.wait_until + bindparam("by"))
PUT_HISTORY = insert(schema.lock_history)
PURGE = delete(schema.lock_history).where(
    schema.lock_history.c.number.in_(
        select(schema.lock_history.c.number)
        .where(schema.lock_history.c.at < bindparam("before"))
        .limit(bindparam("most"))
    )
)


def _waiters_statement(mode: Mode | None, among: Among) -> Select[Any]:
    statement = (
        select(*_WAITER)
        .join_from(schema.lock_wants, schema.lock_waiters, _WANTS.ticket == _WAITERS.ticket)
        .where(_WANTS.resource == bindparam("resource"), _WANTS.ticket > bindparam("after"))
        .order_by(_WANTS.ticket)
        .limit(bindparam("most"))
    )
    if mode is not None:
        statement = statement.where(_WANTS.mode == mode.value)
    if among is not Among.ALL:
        statement = statement.where(_WANTS.firm if among is Among.FIRM else _WANTS.blocked)
    return statement


WAITERS_OF = {(mode, among): _waiters_statement(mode, among) for mode in (None, *Mode) for among in Among}
"""One statement for each kind of look, so that each is compiled once."""


def grant_of(row: Any) -> Grant:
    """The grant of a row."""
    return Grant(row[0], Mode(row[1]), *row[2:])


def waiter_of(row: Any) -> Waiter:
    """The waiter of a row."""
    locks = tuple((resource, Mode(mode)) for resource, mode in json.loads(row[2]))
    # A database without truth values gives 0 and 1.
    return Waiter(row[0], row[1], locks, *[*row[3:-1], bool(row[-1])])
