"""Rows of text under one another: whole where a program reads them, cut to its width on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator, Sequence

import typer

_SHORT = 60


def columns(rows: Sequence[Sequence[str]], before: str = "") -> Iterator[str]:
    """A line for each row; every column but the last is as wide as its longest cell.

    Args:
        rows: of equal length.
        before: stands before each line.
    """
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)][:-1]
    for row in rows:
        cells = [f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False)]
        yield f"{before}{''.join(cells)}{row[-1]}".rstrip()


def print_columns(rows: Sequence[Sequence[str]], spare: Collection[int] = ()) -> None:
    """Rows, the first of which is a heading; a line each, whatever the terminal's width.

    Args:
        rows: of equal length.
        spare: columns that a terminal too narrow for all goes without, before lines are cut.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in fitting(rows, width, spare):
        typer.echo(line)


def fitting(rows: Sequence[Sequence[str]], width: int, spare: Collection[int]) -> list[str]:
    """Lines of at most so many characters; 0: of any length."""
    lines = list(columns(rows))
    if not width or max(map(len, lines)) <= width:
        return lines
    kept = [[cell for number, cell in enumerate(row) if number not in spare] for row in rows]
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in columns(kept)]


def plain(text: str) -> str:
    """A text in one line, without what would move a terminal's cursor: ids and messages come from anywhere."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def short(text: str) -> str:
    """A text that leaves room for what stands beside it."""
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
