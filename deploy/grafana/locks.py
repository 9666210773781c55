"""The dashboard "Locks": who waits, for how long, and whether anybody lost what it held."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import DAEMON, Panel, Query, board, lines, number, variables


def locks() -> Dashboard:
    """The dashboard."""
    return board(
        "Locks",
        "The lock service of a prefix, and the jobs that wait for it.",
        variables(),
        {"Now": _now(), "Waiting": _waiting()},
    )


def _now() -> list[Panel]:
    waiting = f'sum(jef_jobs{{{DAEMON}, status="WAITING_FOR_LOCK"}}) or vector(0)'
    return [
        number("Held", "Locks that are granted.", "none", f"sum(jef_locks_held{{{DAEMON}}})"),
        number(
            "Waiters", "Requests that wait at the lock service.", "none", f"sum(jef_lock_waiters{{{DAEMON}}})"
        ),
        number("Jobs that wait", "Jobs that are WAITING_FOR_LOCK.", "none", waiting),
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
    ]
