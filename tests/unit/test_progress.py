"""Many reports, few notifications, and the last one always."""

from __future__ import annotations

import asyncio

from jef_daemon.events import Progressed
from jef_daemon.run.progress import Progress


def told(events: list[Progressed]) -> list[tuple[int | None, str | None]]:
    return [(event.progress, event.message) for event in events]


async def test_reports_within_the_interval_become_one() -> None:
    """They are told once, when the interval ends, as the latest was."""
    seen: list[Progressed] = []
    came = asyncio.Event()

    def emit(event: Progressed) -> None:
        seen.append(event)
        came.set()

    progress = Progress(0.01, emit)
    for percent in range(50):
        progress.report(percent, None)
    assert seen == []
    await asyncio.wait_for(came.wait(), 5)
    assert told(seen) == [(49, None)]
    assert progress.rest() == []


async def test_the_last_report_is_told_at_the_end() -> None:
    """A job shorter than the interval loses nothing."""
    progress = Progress(3600, lambda event: None)
    progress.report(25, "In Progress")
    progress.report(None, "nearly")
    assert told(progress.rest()) == [(25, "nearly")]
    assert progress.rest() == []


async def test_a_repeated_report_is_not_told_twice() -> None:
    """Nothing new, nothing told."""
    seen: list[Progressed] = []
    progress = Progress(0, seen.append)
    progress.report(10, "x")
    progress.report(10, "x")
    progress.report(10, None)
    assert told(seen) == [(10, "x")]


async def test_nothing_is_told_after_the_end() -> None:
    """A straggler's report would follow the final status."""
    seen: list[Progressed] = []
    progress = Progress(0, seen.append)
    progress.rest()
    progress.report(10, "late")
    assert seen == []
