"""Locks inside a transaction: the service's side (decide, tell places) and the daemon's (hear, go on)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import select

from jef_daemon.ledger import schema
from jef_daemon.ledger.hearing import Hearing
from jef_daemon.ledger.lock_store import LockStore
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lock import protocol, wire
from jef_daemon.lock.requests import Reply, Request
from jef_daemon.ports import Heard, Lost
from jef_daemon.workflow.inputs import LocksHeard

_W = schema.workflows.c
_MOST = 200
"""Workflows in one step."""


def store_of(transaction: Transaction, now: float | None = None) -> LockStore:
    """The lock service's store, at a time; None: the transaction's."""
    now = transaction.now if now is None else now
    count = transaction.count if transaction.is_counted else None
    return LockStore(transaction.connection, now, transaction.terms.lock_limits, count)


def decide(transaction: Transaction, requests: Sequence[Request], now: float | None) -> set[str]:
    """The lock service's part: decide requests, post the answers; returns resources whose queue moved."""
    store = store_of(transaction, now)
    _answer(transaction, store.run(requests))
    return store.touched


def tell_places(transaction: Transaction, resources: Iterable[str], listeners: str, most: int) -> None:
    """Tell the first waiters of resources where they stand, those who listen for it."""
    store = store_of(transaction)
    for resource in resources:
        told = protocol.places(store, resource, most)
        _answer(transaction, [reply for reply in told if (reply.reply_to or "").startswith(listeners)])


def _answer(transaction: Transaction, replies: Iterable[Reply]) -> None:
    for reply in replies:
        if reply.reply_to:
            transaction.post("", reply.reply_to, wire.encode(reply), None, reply.correlation_id)


def hear(transaction: Transaction, heard: Sequence[Heard]) -> list[Lost]:
    """The daemon's part: take the service's answers in; returns running attempts that lost their locks."""
    hearing = _hearing(transaction)
    lost = hearing.take(heard)
    _tell_workflows(transaction, hearing.of_workflows)
    return lost


def go_on_locking(transaction: Transaction, answered_up_to: float) -> int:
    """Ask what is due, ask again what was not heard, give back what was not used, end what lost its locks outside.

    And end workflows that have waited for theirs as long as they may.

    Args:
        transaction: to be committed by the caller.
        answered_up_to: requests of earlier than this were answered, or are lost.

    Returns:
        How many jobs gave their locks back.
    """
    asking = [
        *transaction.locks.due("later", transaction.now),
        *transaction.locks.due("asked", answered_up_to),
    ]
    for row in asking:
        transaction.locks.ask(row)
    transaction.locks.put(asking)
    unused = transaction.locks.due("granted", transaction.now)
    _hearing(transaction).give_back(unused)
    if transaction.terms.lost_locks_fail:
        _hearing(transaction).end_outside(transaction.locks.due("lost", transaction.now))
    waited = select(_W.key).where(_W.due_at <= transaction.now).order_by(_W.due_at).limit(_MOST)
    if keys := transaction.connection.scalars(waited).all():
        from jef_daemon.ledger import workflows  # its libraries are for those only who carry workflows out

        workflows.end_waits(transaction, keys)
    return len(unused)


def _tell_workflows(transaction: Transaction, heard: Sequence[LocksHeard]) -> None:
    if heard:
        from jef_daemon.ledger import workflows  # its libraries are for those only who carry workflows out

        workflows.take(transaction, heard)


def _hearing(transaction: Transaction) -> Hearing:
    terms = transaction.terms
    return Hearing(
        transaction.locks, transaction, transaction.now, terms.lock_times, lost_fail=terms.lost_locks_fail
    )
