"""Rows of text under one another: whole where a program reads them, cut to its width on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence

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


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows, the first of which is a heading; a line each, whatever the terminal's width."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in columns(rows):
        typer.echo(line if len(line) <= width or not width else f"{line[: width - 1]}…")


def plain(text: str) -> str:
    """A text in one line, without what would move a terminal's cursor: ids and messages come from anywhere."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def short(text: str) -> str:
    """A text that leaves room for what stands beside it."""
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
