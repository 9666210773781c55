"""The names of exchanges and queues, each beginning with the configured prefix. Pure."""

from __future__ import annotations

from dataclasses import dataclass

WATCHED = "jef-watched"
"""Header of the notifications of executions that may fall silent; its value is their ledger's own name.

Without the `x-` of our other headers: those a headers exchange overlooks.
"""


@dataclass(frozen=True, slots=True)
class Names:
    """Every name of the wire protocol for one prefix."""

    prefix: str = "jef"

    @property
    def jobs(self) -> str:
        """Topic exchange that takes requests; routing key: the action's name."""
        return f"{self.prefix}.jobs"

    def job_queue(self, action: str) -> str:
        """The queue of one action's requests."""
        return f"{self.prefix}.jobs.{action}"

    @property
    def unroutable(self) -> str:
        """Alternate exchange of `jobs` and its queue: requests whose action nobody knows."""
        return f"{self.prefix}.unroutable"

    @property
    def status(self) -> str:
        """Topic exchange of status notifications."""
        return f"{self.prefix}.status"

    @property
    def watched(self) -> str:
        """Headers exchange behind `status`: watchers hear only those whose silence matters to them."""
        return f"{self.prefix}.watched"

    @property
    def dead(self) -> str:
        """Fanout exchange of dead letters."""
        return f"{self.prefix}.dead"

    @property
    def dead_letters(self) -> str:
        """The queue that keeps dead letters for operators."""
        return f"{self.prefix}.dead-letters"

    @property
    def updates(self) -> str:
        """Queue of async jobs' updates."""
        return f"{self.prefix}.updates"

    @property
    def control(self) -> str:
        """Queue of commands."""
        return f"{self.prefix}.control"

    def daemon(self, ledger: str) -> str:
        """The queue of what is meant for the daemon with this ledger and no other."""
        return f"{self.prefix}.daemon.{ledger}"

    @property
    def daemons(self) -> str:
        """Fanout exchange to all daemons: commands for an execution that one of them may know."""
        return f"{self.prefix}.daemons"

    @property
    def locks(self) -> str:
        """Queue of the lock service."""
        return f"{self.prefix}.locks"

    def lock_replies(self, ledger: str) -> str:
        """The queue in which the daemon with this ledger hears the lock service."""
        return f"{self.prefix}.lock-replies.{ledger}"

    @property
    def lock_keeper(self) -> str:
        """The exchange that remembers which ledger the locks are kept in; nothing is published to it."""
        return f"{self.prefix}.lock-keeper"

    @property
    def workflows(self) -> str:
        """Queue of workflow requests, and the fanout exchange to it: who may publish there reaches no other queue."""
        return f"{self.prefix}.workflows"

    @property
    def coordinator(self) -> str:
        """Queue of what the workflow coordinator must hear: ends of stages' jobs, commands for workflows."""
        return f"{self.prefix}.coordinator"

    @property
    def workflow_keeper(self) -> str:
        """The exchange that remembers which ledger the workflows are kept in; nothing is published to it."""
        return f"{self.prefix}.workflow-keeper"

    @property
    def workflow_status(self) -> str:
        """Topic exchange of workflow notifications."""
        return f"{self.prefix}.workflow-status"
