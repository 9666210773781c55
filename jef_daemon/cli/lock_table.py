"""The table of locks: a row for each holder, who waits beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from rich.table import Table
from rich.text import Text

from jef_daemon.cli.words import took
from jef_daemon.lock.messages import HolderInfo, ResourceInfo

_WAITERS = 3
"""So many of a queue's first are named."""
_COLUMNS = ("resource", "mode", "holder", "number", "held for", "lease left", "waiting")
_FIGURES = {"number", "held for", "lease left"}


class LockTable:
    """Draws what the lock service told.

    Args:
        states: a page.
        title: above it.
    """

    def __init__(self, states: Sequence[ResourceInfo], title: str = "") -> None:
        self._states = states
        self._title = title

    def __rich__(self) -> Table:
        table = Table(title=self._title or None, box=None, header_style="bold", pad_edge=False)
        for column in _COLUMNS:
            side: Literal["left", "right"] = "right" if column in _FIGURES else "left"
            table.add_column(column, no_wrap=True, justify=side, overflow="ellipsis")
        now = datetime.now(UTC)
        for state in self._states:
            holders: list[HolderInfo | None] = [*state.holders] or [None]
            for number, holder in enumerate(holders):
                first = number == 0
                row = [state.resource if first else "", *_of(holder, state, now)]
                row.append(_waiting(state, now) if first else "")
                table.add_row(*(Text(cell) for cell in row))
        return table


def _of(holder: HolderInfo | None, state: ResourceInfo, now: datetime) -> list[str]:
    if holder is None:
        return ["", "nobody", str(state.fencing_token), "", ""]
    return [
        holder.mode,
        holder.owner,
        str(holder.fencing_token),
        took((now - holder.granted_at).total_seconds()),
        took((holder.lease_until - now).total_seconds()),
    ]


def _waiting(state: ResourceInfo, now: datetime) -> str:
    if not state.waiting:
        return ""
    first = [
        f"{waiter.owner} {waiter.mode} {took((now - waiter.asked_at).total_seconds())}"
        for waiter in state.waiters[:_WAITERS]
    ]
    more = ", …" if state.waiting > len(first) else ""
    return f"{state.waiting}: {', '.join(first)}{more}"
