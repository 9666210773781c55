"""The ledger: executions, their append-only history and the outbox, in one transaction.

    schema        the tables; migrations/ brings older ledgers to them
    opening       engine, ownership, version, what errors mean
    writer        group commit: one transaction for all that is ready
    transaction   what is shared inside it: executions moved by events, history, outbox;  terms: what they all keep
    door          requests become executions
    claiming      queued executions get a slot
    job_locks     what jobs asked of the lock service;  hearing: its answers
    lock_store    what the lock service keeps;  lock_statements: its SQL;  locking: both in a transaction
    driver        statements of which many are run while somebody waits
    updating      async jobs' updates;  control: commands;  calling: polls and checkpoints
    watching      clocks that run out: silence, waits, limits, grace
    lifetime      start and end of a daemon, keeping house
    rows          between rows and values
    reading       looking, for people;  standing: numbers, for who watches
    ledger        the port's implementation for the daemon;  owned: its database, from opening to letting go

The only package that imports the database library. SQLite is the embedded default; the queries are
SQLAlchemy Core, so that PostgreSQL finds its place here.
"""

from jef_daemon.ledger.ledger import SqlLedger
from jef_daemon.ledger.reading import Entry, Filter, JobLock, LockEntry, Page, Reader, summary
from jef_daemon.ledger.standing import Standing
from jef_daemon.ledger.terms import Policy

__all__ = [
    "Entry",
    "Filter",
    "JobLock",
    "LockEntry",
    "Page",
    "Policy",
    "Reader",
    "SqlLedger",
    "Standing",
    "summary",
]
