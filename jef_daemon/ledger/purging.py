"""Purging from outside a daemon: small transactions, so that a daemon that writes meanwhile waits for moments."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from jef_daemon.errors import LedgerUnavailable
from jef_daemon.ledger import schema
from jef_daemon.ledger.lifetime import purge
from jef_daemon.ledger.opening import existing, explain, open_engine
from jef_daemon.ledger.transaction import Terms, Transaction
from jef_daemon.lifecycle import FINAL

_STEP = 500
_PAUSE_S = 0.02
"""Between two steps the daemon gets the write lock."""


def count_finished(ledger_url: str, before: float) -> int:
    """How many executions finished before an instant.

    Raises:
        LedgerUnavailable: there is no ledger, or it cannot be read.
    """
    columns = schema.executions.c
    finished = columns.status.in_([status.value for status in FINAL]) & (columns.finished_at < before)
    engine = open_engine(existing(ledger_url), read_only=True)
    try:
        with engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(schema.executions).where(finished)) or 0
    except DBAPIError as error:
        raise LedgerUnavailable(explain(error, engine.url)) from None
    finally:
        engine.dispose()


def purge_finished(ledger_url: str, before: float) -> Iterator[int]:
    """Delete them, a step at a time; yields how many each step deleted.

    Raises:
        LedgerUnavailable: there is no ledger, or it cannot be written.
    """
    engine = open_engine(existing(ledger_url))
    try:
        while True:
            with engine.begin() as connection:
                done = purge(Transaction(connection, Terms(), time.time(), 0), before, _STEP)
            if not done:
                return
            yield done
            time.sleep(_PAUSE_S)
    except DBAPIError as error:
        raise LedgerUnavailable(explain(error, engine.url)) from None
    finally:
        engine.dispose()
