"""In which ledger the locks of a prefix are kept, and in which its workflows: one for each, since the first time.

Part in the flow: before the bus consumes what only their keeper may answer, it asks here whether that is this daemon.
A service with another ledger knows nothing of the locks that are held: it would grant them again. A coordinator with
another one knows nothing of the workflows that there are: it would start them again.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from jef_daemon.names import Names
from jef_daemon.rabbitmq.session import Session
from jef_daemon.rabbitmq.topology import COORDINATOR, LOCKS, WORKFLOWS

log = structlog.get_logger()


class Keeper:
    """What one ledger of a prefix keeps, as an exchange on the broker remembers.

    Args:
        register: the exchange.
        ledger: ours; None: we keep nothing.
        event: what the log calls it when it is another one.
        consequence: what that means for this daemon.
    """

    def __init__(self, register: str, ledger: str | None, event: str, consequence: str) -> None:
        self._register, self._ledger = register, ledger
        self._event, self._consequence = event, consequence
        self.elsewhere = ""
        """The ledger that keeps it, once it is known to be another one."""

    async def is_ours(self, session: Session) -> bool:
        """Whether it is kept in our ledger; it is from now on where nobody kept it."""
        if self._ledger is None:
            return False
        keeper = await session.keeper(self._register, self._ledger)
        is_ours = keeper == self._ledger
        if not is_ours and self.elsewhere != keeper:
            log.warning(
                self._event,
                ledger=keeper,
                ours=self._ledger,
                consequence=self._consequence,
                remedy=f"only if that ledger is gone for good: delete the exchange {self._register}",
            )
        self.elsewhere = "" if is_ours else keeper
        return is_ours


def keepers(names: Names, ledger: str | None) -> Mapping[str, Keeper]:
    """Who keeps what, by the sources that only the keeper consumes."""
    locks = Keeper(
        names.lock_keeper,
        ledger,
        "locks_kept_elsewhere",
        "this daemon is no lock service; the one with that ledger is",
    )
    workflows = Keeper(
        names.workflow_keeper,
        ledger,
        "workflows_kept_elsewhere",
        "this daemon is no coordinator; the one with that ledger is",
    )
    return {LOCKS: locks, WORKFLOWS: workflows, COORDINATOR: workflows}
