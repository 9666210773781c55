"""Every error of the daemon, in one tree. Pure.

Each class says what becomes of the delivery that met it (`fate`) and, where it ends a command, the exit
code. Acknowledge, dead-letter or requeue is decided from here and nowhere else. Errors carry data; their
text is one sentence that names the culprit and the remedy, fit for a person.

    JefError
    ├── RequestRefused        the message is wrong                     → dead letter
    ├── TransitionRefused     the table has no such row                → acknowledged, recorded
    ├── ExecutorError         an executor cannot be loaded or run
    │   ├── ExecutorNotLoaded
    │   ├── ConfigurationRefused    the executor's model refuses the job's configuration
    │   └── ResponseRefused         what `execute` returned cannot be told
    ├── SettingsError         the operator's configuration             exit 3
    ├── BrokerError           the broker refuses us                    exit 4
    │   └── TopologyConflict  a queue or exchange exists otherwise
    ├── LedgerError           the ledger cannot be used                exit 5
    │   ├── LedgerTooNew, LedgerInUse
    │   └── LedgerUnavailable it may come back                         → requeue
    ├── NotFound              no such execution                        exit 6
    ├── LockRefused           a lock is not granted                    exit 1
    ├── LockLost              a lock that was held is lost             exit 7
    └── ProgramUnusable       the program to run cannot be started     exit 127
"""

from __future__ import annotations

from enum import StrEnum


class Fate(StrEnum):
    """What becomes of a delivery."""

    ACKNOWLEDGE = "acknowledge"
    """It is dealt with; the broker may forget it."""
    DEAD_LETTER = "dead-letter"
    """It can never be dealt with: kept, unharmed, with the reason."""
    REQUEUE = "requeue"
    """It is fine, we are not: somebody may try again."""


class ExitCode:
    """Exit codes of `jef`, documented in docs/cli.md."""

    OK = 0
    FAILED = 1
    """The command worked, its subject did not: a job FAILED, a check is not ok."""
    USAGE = 2
    SETTINGS = 3
    BROKER = 4
    LEDGER = 5
    NOT_FOUND = 6
    LOCK_LOST = 7
    """`jef locks run` lost its locks and stopped its command."""
    NO_PROGRAM = 127
    """`jef locks run` cannot start its command; a shell says it so."""
    INTERRUPTED = 130


class JefError(Exception):
    """Root of everything that is ours to raise."""

    fate = Fate.ACKNOWLEDGE
    exit_code = ExitCode.FAILED


class RequestRefused(JefError):
    """A message that can never become an execution.

    Attributes:
        code: stable, for machines: the header `x-jef-reason`.
        detail: a sentence that names the field: the header `x-jef-detail`.
        execution_id: where it could be read, else None.
    """

    fate = Fate.DEAD_LETTER

    def __init__(self, code: str, detail: str, execution_id: str | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.execution_id = execution_id


class TransitionRefused(JefError):
    """An event that the life cycle does not allow where the execution stands."""

    def __init__(self, execution_id: str, place: str, event: str) -> None:
        super().__init__(f"execution {execution_id} is {place}: {event} is not possible there")
        self.execution_id = execution_id
        self.place = place
        self.event = event


class ExecutorError(JefError):
    """An executor cannot be loaded, or what it was given or gave is wrong."""


class ExecutorNotLoaded(ExecutorError):
    """The action's executor cannot be found or imported, or is none."""

    exit_code = ExitCode.SETTINGS


class ConfigurationRefused(ExecutorError):
    """The executor's configuration model refuses the job's configuration."""


class ResponseRefused(ExecutorError):
    """What `execute` returned is no response, or cannot be written as JSON."""


class SettingsError(JefError):
    """The operator's configuration is wrong."""

    exit_code = ExitCode.SETTINGS


class BrokerError(JefError):
    """The broker refuses what we need."""

    fate = Fate.REQUEUE
    exit_code = ExitCode.BROKER


class TopologyConflict(BrokerError):
    """A queue or exchange exists with other arguments than ours."""


class LedgerError(JefError):
    """The ledger cannot be used."""

    fate = Fate.REQUEUE
    exit_code = ExitCode.LEDGER


class LedgerTooNew(LedgerError):
    """A newer version of this program has written the ledger."""


class LedgerInUse(LedgerError):
    """Another daemon owns the ledger."""


class LedgerUnavailable(LedgerError):
    """The ledger does not take writes now: disk full, locked, read-only."""


class NotFound(JefError):
    """There is no such execution."""

    exit_code = ExitCode.NOT_FOUND


class LockRefused(JefError):
    """A lock is not granted, or an operation on locks not done."""


class LockLost(JefError):
    """Locks that were held are not held any more.

    Attributes:
        resources: which.
        reason: why.
    """

    exit_code = ExitCode.LOCK_LOST

    def __init__(self, resources: str, reason: str) -> None:
        super().__init__(f"lost {resources}: {reason}")
        self.resources = resources
        self.reason = reason


class ProgramUnusable(JefError):
    """A program that was to be run is not there, or may not be executed."""

    exit_code = ExitCode.NO_PROGRAM
