"""The live table of jobs: one row each, a progress bar, the message. Fed with status notifications."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from jef_daemon.cli.words import STYLES, styled

_ROWS = 30


class JobTable:
    """Keeps the last notification of each job and draws them.

    Args:
        title: above the table.
        rows: most rows; the longest unchanged ones leave first.
    """

    def __init__(self, title: str = "", rows: int = _ROWS) -> None:
        self._title = title
        self._rows = rows
        self._jobs: dict[str, Mapping[str, Any]] = {}

    def put(self, notification: Mapping[str, Any]) -> bool:
        """Take a notification; False when it was seen before or is older than what is shown."""
        execution_id = str(notification.get("executionId"))
        known = self._jobs.get(execution_id)
        if known is not None and notification.get("sequence", 0) <= known.get("sequence", 0):
            return False
        self._jobs.pop(execution_id, None) if len(self._jobs) >= self._rows else None
        self._jobs[execution_id] = notification
        while len(self._jobs) > self._rows:
            del self._jobs[next(iter(self._jobs))]
        return True

    def __rich__(self) -> Table:
        table = Table(title=self._title or None, expand=True, title_style="bold")
        table.add_column("job", no_wrap=True, max_width=24)
        table.add_column("action", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("progress", width=20)
        table.add_column("%", justify="right", width=4)
        table.add_column("message", ratio=1, no_wrap=True, overflow="ellipsis")
        for execution_id, told in self._jobs.items():
            status, percent = str(told.get("status")), int(told.get("progress") or 0)
            bar = ProgressBar(
                total=100,
                completed=percent,
                width=20,
                complete_style=STYLES.get(status, "white"),
                finished_style="green",
            )
            message = escape(str(told.get("message") or "").partition("\n")[0])
            table.add_row(execution_id, str(told.get("action")), styled(status), bar, str(percent), message)
        return table


def line(told: Mapping[str, Any]) -> str:
    """A notification as a line of text, where there is no terminal."""
    message = str(told.get("message") or "").replace("\n", " ")
    return (
        f"{told.get('timestamp', '')} {told.get('executionId')} {told.get('action')} {told.get('status')} "
        f"{told.get('progress')}% {message}"
    ).rstrip()
