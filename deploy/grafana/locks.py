"""The dashboard "Locks": who waits, for how long, and whether anybody lost what it held."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    DAEMON,
    ORANGE,
    Panel,
    Query,
    bars,
    board,
    buckets,
    events,
    heat,
    lines,
    number,
    quantile,
    quantiles,
    rates,
    variables,
)


def locks() -> Dashboard:
    """The dashboard."""
    return board(
        "Locks",
        "The lock service of a prefix, and the jobs that wait for it.",
        variables(),
        {"Now": _now(), "Held and waited for": _waiting(), "How long": _times(), "What went wrong": _wrong()},
    )


def _now() -> list[Panel]:
    waiting = f'sum(jef_jobs{{{DAEMON}, status="WAITING_FOR_LOCK"}}) or vector(0)'
    return [
        number("Held", "Locks that are granted.", "none", f"sum(jef_locks_held{{{DAEMON}}})"),
        number(
            "Waiters", "Requests that wait at the lock service.", "none", f"sum(jef_lock_waiters{{{DAEMON}}})"
        ),
        number("Jobs that wait", "Jobs that are WAITING_FOR_LOCK.", "none", waiting),
        number(
            "Wait, 95 of 100",
            "Of the jobs that had to wait within the last half hour, so many waited no longer; the worst action.",
            "s",
            f"max(instance_action:jef_lock_wait_seconds:p95_30m{{{DAEMON}}})",
            {900: ORANGE},
        ),
        number(
            "Lost in an hour",
            "Jobs that lost their locks while they ran.",
            "none",
            f"sum(increase(jef_locks_lost_total{{{DAEMON}}}[1h]))",
            {1: ORANGE},
        ),
        number(
            "Expired in an hour",
            "Granted locks that nobody renewed.",
            "none",
            f"sum(increase(jef_lock_leases_expired_total{{{DAEMON}}}[1h]))",
            {1: ORANGE},
        ),
    ]


def _waiting() -> list[Panel]:
    return [
        lines(
            "Locks held",
            "By mode: many SHARED or one EXCLUSIVE hold a resource.",
            "none",
            Query(f"sum by (mode) (jef_locks_held{{{DAEMON}}})", "{{mode}}"),
            stacked=True,
        ),
        lines(
            "Requests that wait",
            "At the lock service, by daemon.",
            "none",
            Query(f"sum by (instance) (jef_lock_waiters{{{DAEMON}}})", "{{instance}}"),
        ),
        lines(
            "Jobs that wait for locks",
            "By action. They use no slot.",
            "none",
            Query(f'sum by (action) (jef_jobs{{{DAEMON}, status="WAITING_FOR_LOCK"}})', "{{action}}"),
            stacked=True,
        ),
        lines(
            "Answers of the lock service",
            "Requests per second, by its answer at once. A grant to who waited is no request.",
            "reqps",
            rates("jef_lock_requests_total", "outcome"),
            stacked=True,
        ),
    ]


def _times() -> list[Panel]:
    return [
        lines(
            "Wait for locks",
            "Of the jobs that had to wait, from the answer that they must to the grant.",
            "s",
            *quantiles("jef_lock_wait_seconds"),
        ),
        lines(
            "Wait for locks by action",
            "95 of 100 of the jobs that had to wait waited no longer.",
            "s",
            Query(quantile("jef_lock_wait_seconds", 0.95, "action"), "{{action}}"),
        ),
        heat(
            "All waits",
            "How many jobs waited how long for their locks.",
            buckets("jef_lock_wait_seconds"),
        ),
    ]


def _wrong() -> list[Panel]:
    return [
        bars(
            "Locks lost",
            "Jobs that lost their locks while they ran, by daemon.",
            events("jef_locks_lost_total", "instance"),
        ),
        bars(
            "Leases that ran out",
            "Granted locks that nobody renewed, by lock service.",
            events("jef_lock_leases_expired_total", "instance"),
        ),
        bars(
            "Kept out by the fences",
            "Completions without their locks, renewals of what is not held, requests that a later one had overtaken.",
            events("jef_fenced_writes_total", "what", f'{DAEMON}, what=~"completion|lock-.*"'),
        ),
        bars(
            "Waits that were given up",
            "Jobs that waited for their locks for too long, by action.",
            events("jef_jobs_timed_out_total", "action", f'{DAEMON}, clock="lock"'),
        ),
    ]
