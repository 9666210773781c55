"""No statement reads a whole table: what waits and what is kept may be a hundred thousand rows."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import Delete, Select, Update
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.base import Executable

from jef_daemon import ledger
from jef_daemon.ledger import SqlLedger

_MODULES = [
    importlib.import_module(f"{ledger.__name__}.{each.name}")
    for each in pkgutil.iter_modules(ledger.__path__)
    if not each.ispkg
]


OF_ALL = {"SHIFT_GRANTS", "SHIFT_WAITERS"}
"""Those that mean every row: the wall clock was set, and every lease moves."""


def statements(module: ModuleType) -> dict[str, Executable]:
    """Those that a module keeps, by name; those it keeps in a table, by its key."""
    found: dict[str, Executable] = {}
    for name, value in vars(module).items():
        members = value.items() if isinstance(value, dict) and not name.startswith("__") else [("", value)]
        found |= {f"{name}{key}": each for key, each in members if isinstance(each, Select | Update | Delete)}
    return found


@pytest.fixture
async def database(tmp_path: Path) -> sqlite3.Connection:
    """A ledger's, empty: SQLite then chooses by the indexes alone."""
    async with SqlLedger(f"sqlite:///{tmp_path / 'ledger.db'}"):
        pass
    return sqlite3.connect(tmp_path / "ledger.db")


async def test_every_statement_looks_into_an_index(database: sqlite3.Connection) -> None:
    """SQLite says how it would go about it."""
    looked_at, scans = 0, []
    for module in _MODULES:
        for name, statement in statements(module).items():
            compiled = statement.compile(dialect=sqlite.dialect())  # type: ignore[attr-defined]  # all three have it
            words = re.sub(r"__\[POSTCOMPILE_\w+\]", "?", str(compiled))
            plan = database.execute(f"EXPLAIN QUERY PLAN {words}", [1] * words.count("?"))
            steps = [row[3] for row in plan]
            scans += [f"{name}: {step}" for step in steps if step.startswith("SCAN") and "INDEX" not in step]
            looked_at += 1
    assert looked_at > 30
    assert {scan.partition(":")[0] for scan in scans} == OF_ALL
