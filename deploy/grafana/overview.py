"""The dashboard "Overview": whether all is well, and if not, which stage of the flow it is."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    DAEMON,
    GREEN,
    ORANGE,
    RATE,
    RED,
    Panel,
    Query,
    bars,
    board,
    events,
    lines,
    number,
    quantile,
    quantiles,
    rates,
    rows,
    states,
    variables,
)


def overview() -> Dashboard:
    """The dashboard."""
    return board(
        "Overview",
        "All daemons of a prefix: is all well, and if not, at which stage.",
        variables(),
        {
            "Now": _now(),
            "From request to end": _flow(),
            "What is told": _told(),
            "Work outside": _outside(),
            "Silence": _silence(),
            "Workflows": _workflows(),
            "Inside": _inside(),
        },
    )


def _now() -> list[Panel]:
    jobs = f"jef_jobs{{{DAEMON}, status="
    finished = f"jef_jobs_finished_total{{{DAEMON}"
    return [
        number(
            "Daemons",
            "Daemons that answer.",
            "none",
            f'count(up{{job="jef", {DAEMON}}} == 1) or vector(0)',
            {0: RED, 1: GREEN},
        ),
        number(
            "Broker",
            "Whether all of them are connected.",
            "none",
            f"min(jef_broker_connected{{{DAEMON}}})",
            words={"0": ("away", RED), "1": ("connected", GREEN)},
        ),
        number(
            "Ledger",
            "Whether all of their ledgers take writes.",
            "none",
            f"max(jef_ledger_stalled{{{DAEMON}}})",
            words={"0": ("writes", GREEN), "1": ("stalled", RED)},
        ),
        number("Running", "Jobs that run.", "none", f'sum({jobs}"RUNNING"}}) or vector(0)'),
        number(
            "Queued",
            "Jobs that wait for a slot, or for a set time.",
            "none",
            f'sum({jobs}"QUEUED"}}) or vector(0)',
        ),
        number(
            "Slots in use",
            "Share of the slots.",
            "percentunit",
            f"sum(jef_slots_busy{{{DAEMON}}}) / sum(jef_slots{{{DAEMON}}})",
            {0.9: ORANGE},
        ),
        number(
            "Failed",
            "Share of the last hour's attempts that were FAILED.",
            "percentunit",
            f'(sum(increase({finished}, status="FAILED"}}[1h])) or vector(0)) / sum(increase({finished}}}[1h]))',
            {0.05: ORANGE, 0.25: RED},
        ),
        number(
            "Not told yet",
            "Messages that the broker has not confirmed.",
            "none",
            f"sum(jef_outbox_messages{{{DAEMON}}})",
            {1000: ORANGE},
        ),
    ]


def _flow() -> list[Panel]:
    return [
        lines(
            "Requests",
            "Valid requests per second, by what became of them at the door: `finished` are duplicates.",
            "reqps",
            rates("jef_jobs_received_total", "outcome"),
            stacked=True,
        ),
        lines(
            "Attempts that ended",
            "Per second, by status. A failure that is retried counts too.",
            "ops",
            rates("jef_jobs_finished_total", "status"),
            stacked=True,
        ),
        bars(
            "Dead letters",
            "Messages that could not be taken in, by reason.",
            events("jef_messages_refused_total", "reason"),
        ),
        lines(
            "Jobs that are not over",
            "By status. TIMED_OUT are still open to a late update.",
            "none",
            Query(f"sum by (status) (jef_jobs{{{DAEMON}}})", "{{status}}"),
            stacked=True,
        ),
        lines(
            "Slots",
            "In use, and all. Jobs that run outside use none.",
            "none",
            Query(f"sum(jef_slots_busy{{{DAEMON}}})", "in use"),
            Query(f"sum(jef_slots{{{DAEMON}}})", "all"),
        ),
        bars(
            "Retries",
            "New attempts, by policy or by command, by action.",
            events("jef_jobs_retried_total", "action"),
        ),
        lines(
            "Wait before the start",
            "From QUEUED to RUNNING, locks and set times included.",
            "s",
            *quantiles("jef_job_wait_seconds"),
        ),
        lines(
            "Duration by action",
            "95 of 100 attempts that completed took no longer.",
            "s",
            Query(
                quantile("jef_job_duration_seconds", 0.95, "action", f'{DAEMON}, status="COMPLETED"'),
                "{{action}}",
            ),
        ),
        lines(
            "Failures by action",
            "Share of the attempts within 15 minutes that were FAILED.",
            "percentunit",
            Query(
                f"max by (action) (instance_action:jef_jobs_failed:ratio_rate15m{{{DAEMON}}})", "{{action}}"
            ),
        ),
    ]


def _told() -> list[Panel]:
    return [
        lines(
            "Notifications",
            "Put into the outbox per second, by status.",
            "ops",
            rates("jef_notifications_total", "status"),
            stacked=True,
        ),
        lines(
            "Progress",
            "Told per second, by action.",
            "ops",
            rates("jef_progress_total", "action"),
            stacked=True,
        ),
        bars(
            "Connections lost",
            "Connections to the broker that were lost, by daemon.",
            events("jef_broker_reconnects_total", "instance"),
        ),
        lines(
            "Outbox",
            "Messages in the ledger that the broker has not confirmed, and those of them that are on their way.",
            "none",
            Query(f"sum(jef_outbox_messages{{{DAEMON}}})", "not confirmed"),
            Query(f"sum(jef_publishes_unconfirmed{{{DAEMON}}})", "on their way"),
        ),
        lines(
            "Outbox: the oldest message",
            "Its age, by daemon. It grows while the broker is away.",
            "s",
            Query(f"max by (instance) (jef_outbox_age_seconds{{{DAEMON}}})", "{{instance}}"),
        ),
        lines(
            "Until the broker confirms",
            "A handful of messages, from handing them over to the confirmation of the last.",
            "s",
            *quantiles("jef_publish_seconds"),
        ),
    ]


def _outside() -> list[Panel]:
    return [
        lines(
            "Updates",
            "Of async jobs, per second: accepted or refused.",
            "ops",
            rates("jef_updates_total", "outcome"),
            stacked=True,
        ),
        bars(
            "Updates refused",
            "By reason.",
            events("jef_updates_refused_total", "reason"),
        ),
        bars(
            "Kept out by the fences",
            "What attempts that are over still wanted to say or write, by what it was.",
            events("jef_fenced_writes_total", "what"),
        ),
    ]


def _silence() -> list[Panel]:
    return [
        bars(
            "Clocks that ran out",
            "update: silence, TIMED_OUT; queue, lock, execution: waits and runs that took too long, FAILED.",
            events("jef_jobs_timed_out_total", "clock"),
        ),
        bars(
            "Late",
            "Changes that came from an update after TIMED_OUT, by action.",
            events("jef_jobs_late_total", "action"),
        ),
        lines(
            "Watched",
            "Jobs whose next update the watcher waits for, by daemon.",
            "none",
            Query(f"sum by (instance) (jef_watcher_watched{{{DAEMON}}})", "{{instance}}"),
            stacked=True,
        ),
        lines(
            "From the deadline to TIMED_OUT",
            "How long after its deadline a silent job was on disk as TIMED_OUT.",
            "s",
            *quantiles("jef_watcher_lateness_seconds"),
        ),
        lines(
            "Watcher: behind",
            "By how much, by daemon; 0: nothing is overdue.",
            "s",
            Query(f"max by (instance) (jef_watcher_lag_seconds{{{DAEMON}}})", "{{instance}}"),
        ),
    ]


def _workflows() -> list[Panel]:
    ended = "jef_workflow_duration_seconds_count"
    return [
        lines(
            "Workflows that are not over",
            "By status.",
            "none",
            Query(f"sum by (status) (jef_workflows{{{DAEMON}}})", "{{status}}"),
            stacked=True,
        ),
        bars(
            "Workflows that ended",
            "By definition and status.",
            Query(
                f"sum by (workflow, status) (increase({ended}{{{DAEMON}}}[{RATE}])) > 0",
                "{{workflow}} {{status}}",
            ),
        ),
        lines(
            "From the request to the end",
            "95 of 100 workflows that completed took no longer, by definition.",
            "s",
            Query(
                quantile("jef_workflow_duration_seconds", 0.95, "workflow", f'{DAEMON}, status="COMPLETED"'),
                "{{workflow}}",
            ),
        ),
    ]


def _inside() -> list[Panel]:
    process = f'job="jef", {DAEMON}'
    return [
        states(
            "Parts",
            "Whether each works at all daemons, as /readyz says it.",
            Query(f"min by (part) (jef_part_works{{{DAEMON}}})", "{{part}}"),
            {"0": ("does not work", RED), "1": ("works", GREEN)},
        ),
        bars(
            "Processes that were replaced",
            "Of blocking executors: they crashed, or were stopped for a cancel, a time-out or the end of the daemon.",
            events("jef_pool_restarts_total", "cause"),
        ),
        lines(
            "Ledger: a transaction",
            "The sync to disk included.",
            "s",
            *quantiles("jef_ledger_transaction_seconds"),
        ),
        lines(
            "Ledger: operations that share a transaction",
            "More at once means fewer syncs: it rises with the load.",
            "none",
            *quantiles("jef_ledger_transaction_operations"),
        ),
        lines(
            "Event loop: lag",
            "How much later than asked a timer came.",
            "s",
            *quantiles("jef_event_loop_lag_seconds"),
        ),
        lines(
            "Processor",
            "Seconds per second, the daemon's own process: not those of blocking jobs and commands.",
            "percentunit",
            Query(
                f"sum by (instance) (rate(process_cpu_seconds_total{{{process}}}[{RATE}]))", "{{instance}}"
            ),
        ),
        lines(
            "Memory",
            "Resident, the daemon's own process.",
            "bytes",
            Query(f"process_resident_memory_bytes{{{process}}}", "{{instance}}"),
        ),
        lines(
            "File descriptors",
            "Open ones, the daemon's own process.",
            "none",
            Query(f"process_open_fds{{{process}}}", "{{instance}}"),
        ),
        rows(
            "What runs",
            "Versions, and the prefix that each daemon serves.",
            Query(f"jef_build_info{{{DAEMON}}}"),
            ["instance", "prefix", "version", "python"],
        ),
    ]
