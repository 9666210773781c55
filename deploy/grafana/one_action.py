"""The dashboard "One action": how its jobs fare, from the request to the end."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    ACTION,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Panel,
    Query,
    bars,
    board,
    buckets,
    events,
    heat,
    lines,
    number,
    quantiles,
    rates,
    variables,
)

_COMPLETED = f'{ACTION}, status="COMPLETED"'


def one_action() -> Dashboard:
    """The dashboard."""
    return board(
        "One action",
        "One action, at all daemons of a prefix or at some.",
        variables(one_action=True),
        {"Now": _now(), "How its jobs fare": _jobs(), "How long it takes": _times()},
    )


def _now() -> list[Panel]:
    jobs, finished = f"jef_jobs{{{ACTION}, status=", f"jef_jobs_finished_total{{{ACTION}"
    return [
        number("Running", "Jobs that run.", "none", f'sum({jobs}"RUNNING"}}) or vector(0)'),
        number("Queued", "Jobs that wait for a slot.", "none", f'sum({jobs}"QUEUED"}}) or vector(0)'),
        number(
            "Waiting for locks",
            "Jobs that wait for locks.",
            "none",
            f'sum({jobs}"WAITING_FOR_LOCK"}}) or vector(0)',
        ),
        number(
            "Silent",
            "Jobs that are TIMED_OUT and still open to a late update.",
            "none",
            f'sum({jobs}"TIMED_OUT"}}) or vector(0)',
            {1: ORANGE},
        ),
        number(
            "Ended in an hour",
            "Attempts that ended within the last hour.",
            "none",
            f"sum(increase({finished}}}[1h]))",
            {0: BLUE},
        ),
        number(
            "Failed",
            "Share of the last hour's attempts that were FAILED.",
            "percentunit",
            f'(sum(increase({finished}, status="FAILED"}}[1h])) or vector(0)) / sum(increase({finished}}}[1h]))',
            {0: GREEN, 0.05: ORANGE, 0.25: RED},
        ),
    ]


def _jobs() -> list[Panel]:
    return [
        lines(
            "Requests",
            "Valid requests per second, by what became of them at the door.",
            "reqps",
            rates("jef_jobs_received_total", "outcome", ACTION),
            stacked=True,
        ),
        lines(
            "Attempts that ended",
            "Per second, by status.",
            "ops",
            rates("jef_jobs_finished_total", "status", ACTION),
            stacked=True,
        ),
        lines(
            "Jobs that are not over",
            "By status.",
            "none",
            Query(f"sum by (status) (jef_jobs{{{ACTION}}})", "{{status}}"),
            stacked=True,
        ),
        lines(
            "Failures",
            "Share of the attempts within 15 minutes that were FAILED, by daemon.",
            "percentunit",
            Query(
                f"max by (instance) (instance_action:jef_jobs_failed:ratio_rate15m{{{ACTION}}})",
                "{{instance}}",
            ),
        ),
        lines(
            "Progress",
            "Told per second, by daemon.",
            "ops",
            rates("jef_progress_total", "instance", ACTION),
        ),
        bars(
            "Clocks that ran out",
            "update: silence, TIMED_OUT; queue, lock, execution: waits and runs that took too long, FAILED.",
            events("jef_jobs_timed_out_total", "clock", ACTION),
        ),
        bars("Retries", "New attempts, by daemon.", events("jef_jobs_retried_total", "instance", ACTION)),
        bars(
            "Late",
            "Changes that came from an update after TIMED_OUT, by daemon.",
            events("jef_jobs_late_total", "instance", ACTION),
        ),
    ]


def _times() -> list[Panel]:
    return [
        lines(
            "Wait before the start",
            "From QUEUED to RUNNING, locks and set times included.",
            "s",
            *quantiles("jef_job_wait_seconds", ACTION),
        ),
        lines(
            "Wait for locks",
            "Of the jobs that had to wait, from the answer that they must to the grant.",
            "s",
            *quantiles("jef_lock_wait_seconds", ACTION),
        ),
        lines(
            "Duration",
            "Of attempts that completed.",
            "s",
            *quantiles("jef_job_duration_seconds", _COMPLETED),
        ),
        heat(
            "All waits",
            "How many jobs waited how long.",
            buckets("jef_job_wait_seconds", ACTION),
        ),
        heat(
            "All durations",
            "How many attempts that completed took how long: two humps are two kinds of jobs.",
            buckets("jef_job_duration_seconds", _COMPLETED),
        ),
    ]
