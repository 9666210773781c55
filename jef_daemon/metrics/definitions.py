"""The table of metrics: the page, the code and the dashboards are held against it."""

from __future__ import annotations

from dataclasses import dataclass

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.ports import Accepted

_JOB_S = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
_SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_LATE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric."""

    name: str
    kind: str
    """`counter`, `histogram`, `gauge`."""
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of histograms."""
    values: tuple[str, ...] = ()
    """All values of the last label, where they are fixed. A counter tells each from the start, with 0: the first that
    is counted is an increase, too."""


_REQUESTS = (
    Definition(
        "jef_jobs_received_total",
        "counter",
        "Valid requests, by what became of them at the door: new, known and finished (duplicates), taken-again, "
        "cancelled (before it came).",
        ("action", "outcome"),
        values=tuple(word.value for word in Accepted if word is not Accepted.REFUSED),
    ),
    Definition(
        "jef_messages_refused_total",
        "counter",
        "Messages that became dead letters, by the reason in their header x-jef-reason.",
        ("reason",),
    ),
)

_JOBS = (
    Definition(
        "jef_jobs_finished_total",
        "counter",
        "Attempts that ended, by status; a failure that is retried counts too.",
        ("action", "status"),
        values=tuple(status.value for status in Status if status in FINAL),
    ),
    Definition("jef_jobs_retried_total", "counter", "New attempts, by policy or by command.", ("action",)),
    Definition(
        "jef_jobs_timed_out_total",
        "counter",
        "Clocks that ran out: silence between updates (TIMED_OUT), the wait for a slot, the wait for locks, the run "
        "(FAILED).",
        ("action", "clock"),
        values=("update", "queue", "lock", "execution"),
    ),
    Definition(
        "jef_job_wait_seconds",
        "histogram",
        "From QUEUED to RUNNING, the wait for locks and for a set time included.",
        ("action",),
        _JOB_S,
    ),
    Definition(
        "jef_job_duration_seconds",
        "histogram",
        "From RUNNING to the end of the attempt, by status.",
        ("action", "status"),
        _JOB_S,
    ),
    Definition(
        "jef_jobs",
        "gauge",
        "Jobs that are not over, by status: QUEUED, WAITING_FOR_LOCK, RUNNING, TIMED_OUT (still open).",
        ("action", "status"),
    ),
    Definition("jef_slots", "gauge", "Slots: jobs that can run here at the same time."),
    Definition("jef_slots_busy", "gauge", "Slots in use; async jobs whose work runs outside use none."),
    Definition(
        "jef_pool_restarts_total",
        "counter",
        "Processes of blocking executors that had to be replaced: crashed in the middle of a job, stopped there for a "
        "cancel, a time-out or the end of the daemon, or renewed as the configuration was read again.",
        ("cause",),
        values=("crashed", "stopped", "renewed"),
    ),
)

_TOLD = (
    Definition("jef_progress_total", "counter", "Progress that was recorded and told.", ("action",)),
    Definition(
        "jef_notifications_total",
        "counter",
        "Status notifications put into the outbox, repeated ones for duplicates included.",
        ("status",),
        values=tuple(status.value for status in Status),
    ),
    Definition(
        "jef_updates_total",
        "counter",
        "Updates of async jobs that reached the ledger: accepted or refused.",
        ("outcome",),
        values=("accepted", "refused"),
    ),
    Definition(
        "jef_updates_refused_total",
        "counter",
        "Updates that do not count, by reason: the execution is not known, the token is not this attempt's, the "
        "attempt is fenced, it is over already, it does not run, the variables are too long; and those that never "
        "reach a ledger: malformed, by HTTP without a token, or with the token of a ledger that no daemon has.",
        ("reason",),
        values=(
            "unknown-execution",
            "stale-token",
            "fenced",
            "finished",
            "not-running",
            "too-long",
            "malformed",
            "no-token",
            "unknown-ledger",
        ),
    ),
    Definition(
        "jef_jobs_late_total", "counter", "Changes that came from an update after TIMED_OUT.", ("action",)
    ),
    Definition(
        "jef_fenced_writes_total",
        "counter",
        "What the fences kept out, by what it was: an update with the token of an attempt that is over, progress, an "
        "outcome or a checkpoint of such an attempt, what a call of its executor said, a completion without its "
        "locks; at the lock service a renewal of what is not held, and a request that had been overtaken by its "
        "successor.",
        ("what",),
        values=(
            "update",
            "progress",
            "outcome",
            "checkpoint",
            "call",
            "completion",
            "lock-renewal",
            "lock-request",
        ),
    ),
)

_LOCKS = (
    Definition(
        "jef_locks_held",
        "gauge",
        "Locks that this lock service has granted, by mode.",
        ("mode",),
        values=("SHARED", "EXCLUSIVE"),
    ),
    Definition("jef_lock_waiters", "gauge", "Requests that wait at this lock service."),
    Definition(
        "jef_lock_requests_total",
        "counter",
        "Requests to this lock service, by its answer at once (a grant to who waited is no request); stale: overtaken "
        "by its successor, without an answer.",
        ("outcome",),
        values=(
            "granted",
            "waiting",
            "refused",
            "renewed",
            "lost",
            "kept",
            "released",
            "cancelled",
            "state",
            "stale",
        ),
    ),
    Definition(
        "jef_lock_wait_seconds",
        "histogram",
        "Waits of this daemon's jobs for locks, from the answer that they must wait to the grant; those that did not "
        "have to wait, and those that gave up, are not in it.",
        ("action",),
        _JOB_S,
    ),
    Definition(
        "jef_locks_lost_total", "counter", "Attempts of this daemon that lost their locks while they ran."
    ),
    Definition(
        "jef_lock_leases_expired_total",
        "counter",
        "Granted locks that this lock service ended, as nobody renewed them.",
    ),
)

_WORKFLOWS = (
    Definition(
        "jef_workflows",
        "gauge",
        "Workflows of this coordinator that are not over, by status; TIMED_OUT is none that a workflow has.",
        ("status",),
        values=("QUEUED", "WAITING_FOR_LOCK", "RUNNING"),
    ),
    Definition(
        "jef_workflow_duration_seconds",
        "histogram",
        "From the request for a workflow until its end, waits and retries included, by the name of its definition and "
        "by COMPLETED, FAILED or CANCELLED; one that is retried ends again.",
        ("workflow", "status"),
        _JOB_S,
    ),
)

_WATCHER = (
    Definition("jef_watcher_watched", "gauge", "Executions whose next update the watcher waits for."),
    Definition(
        "jef_watcher_lateness_seconds",
        "histogram",
        "How long after its deadline a silent execution was on disk as TIMED_OUT.",
        (),
        _LATE_S,
    ),
    Definition(
        "jef_watcher_lag_seconds",
        "gauge",
        "How far the watcher is behind now, with a deadline or with its look at the ledger; 0: nothing is overdue.",
    ),
)

_BROKER = (
    Definition("jef_outbox_messages", "gauge", "Messages in the ledger that the broker has not confirmed."),
    Definition(
        "jef_outbox_age_seconds", "gauge", "Age of the oldest of them, across restarts; 0: there is none."
    ),
    Definition("jef_publishes_unconfirmed", "gauge", "Messages on their way to the broker, of those."),
    Definition(
        "jef_publish_seconds",
        "histogram",
        "From handing messages of the outbox to the broker, up to 500 at once, until it confirmed the last of them.",
        (),
        _SHORT_S,
    ),
    Definition("jef_broker_connected", "gauge", "1 while there is a connection to the broker."),
    Definition("jef_broker_reconnects_total", "counter", "Connections to the broker that were lost."),
)

_LEDGER = (
    Definition(
        "jef_ledger_transaction_seconds",
        "histogram",
        "One transaction of the ledger, the sync to disk included.",
        (),
        _SHORT_S,
    ),
    Definition(
        "jef_ledger_transaction_operations", "histogram", "Operations that shared a transaction.", (), _COUNT
    ),
    Definition("jef_ledger_stalled", "gauge", "1 while the ledger takes no writes (disk full, locked)."),
)

_DAEMON = (
    Definition(
        "jef_part_works",
        "gauge",
        "1 while a part works, as /readyz says it; the lock service and the watcher only where they have a role.",
        ("part",),
        values=("daemon", "broker", "ledger", "lock service", "watcher"),
    ),
    Definition(
        "jef_event_loop_lag_seconds",
        "histogram",
        "How much later than asked a timer of the event loop came; measured twice a second.",
        (),
        _SHORT_S,
    ),
    Definition(
        "jef_build_info",
        "gauge",
        "Always 1; says what runs, and the prefix that it serves.",
        ("version", "python", "prefix"),
    ),
)

FAMILIES: dict[str, tuple[Definition, ...]] = {
    "Requests": _REQUESTS,
    "Jobs": _JOBS,
    "What is told of jobs": _TOLD,
    "Locks": _LOCKS,
    "Workflows": _WORKFLOWS,
    "The watcher": _WATCHER,
    "Outbox and broker": _BROKER,
    "The ledger": _LEDGER,
    "The daemon": _DAEMON,
}
"""What is looked at together, by its heading on the page."""

DEFINITIONS: tuple[Definition, ...] = tuple(one for family in FAMILIES.values() for one in family)
"""Every metric of ours; those that begin with `process_` come from prometheus_client."""
