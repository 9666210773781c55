"""Purging from outside a daemon: small transactions, so that a daemon that writes meanwhile waits for moments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from jef_daemon.errors import LedgerUnavailable
from jef_daemon.ledger import schema
from jef_daemon.ledger.lifetime import finished_before, purge, purge_workflows
from jef_daemon.ledger.opening import existing, explain, open_engine
from jef_daemon.ledger.terms import Terms
from jef_daemon.ledger.transaction import Transaction

_STEP = 500
_PAUSE_S = 0.02
"""Between two steps the daemon gets the write lock."""


@dataclass(frozen=True, slots=True)
class Finished:
    """So many of each."""

    executions: int = 0
    workflows: int = 0

    def __add__(self, other: Finished) -> Finished:
        return Finished(self.executions + other.executions, self.workflows + other.workflows)

    def __bool__(self) -> bool:
        return bool(self.executions or self.workflows)

    def __str__(self) -> str:
        workflows = f" and {self.workflows} workflows" if self.workflows else ""
        return f"{self.executions} executions{workflows}"


def count_finished(ledger_url: str, before: float) -> Finished:
    """How many executions and workflows finished before an instant.

    Raises:
        LedgerUnavailable: there is no ledger, or it cannot be read.
    """
    engine = open_engine(existing(ledger_url), read_only=True)
    try:
        with engine.connect() as connection:
            return _count(connection, before)
    except DBAPIError as error:
        raise LedgerUnavailable(explain(error, engine.url)) from None
    finally:
        engine.dispose()


def _count(connection: Connection, before: float) -> Finished:
    ended = schema.workflows.c.finished_at
    executions = select(func.count()).select_from(schema.executions).where(finished_before(before))
    workflows = select(func.count()).select_from(schema.workflows).where(ended < before)
    return Finished(connection.scalar(executions) or 0, connection.scalar(workflows) or 0)


def purge_finished(ledger_url: str, before: float) -> Iterator[Finished]:
    """Delete them, a step at a time; yields how many each step deleted.

    Raises:
        LedgerUnavailable: there is no ledger, or it cannot be written.
    """
    engine = open_engine(existing(ledger_url))
    try:
        while True:
            with engine.begin() as connection:
                transaction = Transaction(connection, Terms(), time.time(), 0)
                executions = purge(transaction, before, _STEP)
                done = Finished(executions, purge_workflows(transaction, before, _STEP))
            if not done:
                return
            yield done
            time.sleep(_PAUSE_S)
    except DBAPIError as error:
        raise LedgerUnavailable(explain(error, engine.url)) from None
    finally:
        engine.dispose()
