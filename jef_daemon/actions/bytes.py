"""Progress over bytes and files, in words that people read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jef_daemon.sdk import ExecutionContext

CHUNK = 1024 * 1024
"""Bytes read at once."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human(size: float) -> str:
    """`1.2 GiB`."""
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of a tree."""

    path: Path
    relative: str
    """Below the tree, with forward slashes; a single file's own name."""
    size: int


def files_of(path: Path) -> list[File]:
    """The regular files of a file or tree, by name; links and special files are left out.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    if not path.is_dir():
        return [File(path, path.name, path.stat().st_size)]
    return sorted(_walk(path, ""), key=lambda file: file.relative)


def _walk(folder: Path, above: str) -> Iterator[File]:
    with os.scandir(folder) as entries:
        for entry in entries:
            relative = f"{above}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, f"{relative}/")
            elif entry.is_file(follow_symlinks=False):
                yield File(folder / entry.name, relative, entry.stat(follow_symlinks=False).st_size)


class ByteProgress:
    """Tells how many bytes and files are done.

    Args:
        context: the job's.
        total: bytes there are to do.
        files: files there are to do.
    """

    def __init__(self, context: ExecutionContext[Any], total: int, files: int) -> None:
        self._context = context
        self._total = total
        self._files = files
        self._done = 0
        self._files_done = 0

    def add(self, size: int) -> None:
        """Some bytes are done."""
        self._done += size
        percent = 100 * self._done / self._total if self._total else 100
        told = f"{human(self._done)} of {human(self._total)}"
        if self._files > 1:
            told += f", {self._files_done} of {self._files} files"
        # 100 is told by the end of the job alone.
        self._context.progress(min(99, percent), told)

    def end_file(self) -> None:
        """A file is done."""
        self._files_done += 1
        self.add(0)
