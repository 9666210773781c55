"""Statements past SQLAlchemy's execution mean and fail what they mean and fail with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from jef_daemon.ledger import schema
from jef_daemon.ledger.driver import Driver
from jef_daemon.ledger.opening import open_engine

_C = schema.lock_resources.c
_PUT = insert(schema.lock_resources)
_MOVE = (
    update(schema.lock_resources)
    .where(_C.resource == bindparam("r"))
    .values(waiting=_C.waiting + bindparam("by"))
)
_WAITED_FOR = (
    select(_C.resource).where(_C.waiting > 0, _C.fence == bindparam("n")).order_by(_C.resource).limit(2)
)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = open_engine(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as begun:
        schema.metadata.create_all(begun)
        yield begun
    engine.dispose()


def put(driver: Driver, *names: str) -> None:
    driver.change(_PUT, *({"resource": name, "fence": 1, "waiting": 0} for name in names))


def test_one_and_many(connection: Connection) -> None:
    """What it changes it sees, with the constants that a statement brings along, and so does SQLAlchemy."""
    driver = Driver(connection)
    put(driver, "a")
    put(driver, "b", "c", "d")
    driver.change(_MOVE, {"r": "b", "by": 2}, {"r": "c", "by": 1}, {"r": "d", "by": 1})
    assert driver.rows(_WAITED_FOR, {"n": 1}) == [("b",), ("c",)]
    assert driver.value(_WAITED_FOR, {"n": 1}) == "b"
    assert driver.value(_WAITED_FOR, {"n": 2}) is None
    assert connection.scalars(select(_C.waiting).order_by(_C.resource)).all() == [0, 2, 1, 1]


def test_faults_are_the_same_as_elsewhere(connection: Connection) -> None:
    """Whoever tells a ledger at fault from a statement at fault goes by their class."""
    driver = Driver(connection)
    put(driver, "a")
    with pytest.raises(IntegrityError, match="UNIQUE"):
        put(driver, "a")
    connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(OperationalError, match="readonly"):
        put(driver, "b")


def test_a_parameter_that_is_missing_is_a_mistake(connection: Connection) -> None:
    """Not a NULL."""
    with pytest.raises(KeyError, match="by"):
        Driver(connection).change(_MOVE, {"r": "a"})
