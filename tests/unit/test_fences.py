"""The stores of docs/locks.md, as printed: an older number is refused, whatever came between."""

from __future__ import annotations

import contextlib
import functools
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs/locks.md").read_text(encoding="utf-8")


def printed(name: str) -> Callable[..., None]:
    """A function of the page, from the block that defines it."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(next(text for text in blocks if f"def {name}(" in text), found)
    function: Callable[..., None] = found[name]
    return function


Write = Callable[[str, int], None]
"""Text and number."""


@pytest.fixture(params=["database", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Write, Callable[[], str]]]:
    """A store's `write`, and what reads it."""
    if request.param == "file":
        target, replace = tmp_path / "asset", printed("replace")
        yield lambda text, fence: replace(target, text.encode(), fence), target.read_text
        return
    path, write = tmp_path / "assets.db", printed("write")
    connect = functools.partial(sqlite3.connect, path, timeout=30)
    with contextlib.closing(connect()) as one:
        one.execute("CREATE TABLE assets (id INTEGER PRIMARY KEY, title TEXT, fence INTEGER)")

    def write_apart(text: str, fence: int) -> None:
        with contextlib.closing(connect()) as one:
            write(one, 42, text, fence)

    def read() -> str:
        with contextlib.closing(connect()) as one:
            return str(one.execute("SELECT title FROM assets WHERE id = 42").fetchone()[0])

    yield write_apart, read


def test_an_older_number_is_refused(store: tuple[Write, Callable[[], str]]) -> None:
    """The holder itself may write again, its successor may, it may not after that."""
    write, read = store
    for text, fence in (("a", 33), ("b", 33), ("c", 34), ("d", 1000)):
        write(text, fence)
        assert read() == text
    for fence in (999, 34, 1):
        with pytest.raises(PermissionError, match=str(fence)):
            write("late", fence)
    assert read() == "d"


def test_of_many_at_once_the_latest_stays(store: tuple[Write, Callable[[], str]]) -> None:
    write, read = store

    together = threading.Barrier(4)

    def try_to(fence: int) -> None:
        together.wait(10)
        with contextlib.suppress(PermissionError):
            write(str(fence), fence)

    with ThreadPoolExecutor(4) as pool:
        for first in range(1, 161, 4):
            list(pool.map(try_to, range(first, first + 4)))
            assert read() == str(first + 3)
