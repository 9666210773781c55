"""Statements past SQLAlchemy's execution: compiled once, run by the driver's cursor, rows as plain tuples.

For the lock service, whose decisions are many small looks into indexes that somebody waits for, and for what every
transaction writes: there the execution of a statement costs ten times what the database does for it. Values are
the driver's own: no types are converted. Everything else goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Connection, Select, bindparam, select
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.base import Executable

Parameters = Mapping[str, Any]


class _Compiled:
    """A statement in the words of one database."""

    def __init__(self, statement: Executable, dialect: Dialect, names: Sequence[str]) -> None:
        # For many: a single insert would ask for the row's number, which nobody here wants to know.
        compiled = statement.compile(  # type: ignore[attr-defined]  # those that can be executed can be compiled
            dialect=dialect, column_keys=list(names), for_executemany=True
        )
        self.words = str(compiled)
        self._in_order = _picker(compiled.positiontup)
        binds = compiled.binds.items()
        self._constants = {name: each.value for name, each in binds if not each.required}

    def bind(self, given: Parameters) -> Any:
        """Parameters as the driver takes them."""
        values = {**self._constants, **given} if self._constants else given
        return values if self._in_order is None else self._in_order(values)


def _picker(names: Sequence[str] | None) -> Callable[[Parameters], Sequence[Any]] | None:
    """Puts values in order; None: the database takes them by name."""
    if names is None:
        return None
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: [values[name] for name in names]


_compiled: dict[tuple[str, Executable], _Compiled] = {}
"""By database and statement: statements are constants of their modules."""


class Driver:
    """Runs statements inside a transaction.

    Args:
        connection: in the transaction; whatever else is run on it is seen here, and the other way round.

    Raises:
        DBAPIError: from every method, as SQLAlchemy would.
    """

    def __init__(self, connection: Connection) -> None:
        self._dialect = connection.dialect
        self._cursor = connection.connection.cursor()

    def rows(self, statement: Executable, given: Parameters) -> list[Any]:
        """What a select finds."""
        compiled = self._compile(statement, given)
        self._run(self._cursor.execute, compiled.words, compiled.bind(given))
        return list(self._cursor.fetchall())

    def value(self, statement: Executable, given: Parameters) -> Any:
        """The first value of the first row; None where there is none."""
        found = self.rows(statement, given)
        return found[0][0] if found else None

    def change(self, statement: Executable, *given: Parameters) -> None:
        """Insert, update or delete, once for each of the parameters."""
        compiled = self._compile(statement, given[0])
        if len(given) == 1:
            self._run(self._cursor.execute, compiled.words, compiled.bind(given[0]))
        else:
            self._run(self._cursor.executemany, compiled.words, [compiled.bind(each) for each in given])

    def _compile(self, statement: Executable, given: Parameters) -> _Compiled:
        key = self._dialect.name, statement
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _Compiled(statement, self._dialect, tuple(given))
        return found

    def _run(self, execute: Any, words: str, bound: Any) -> None:
        fault = self._dialect.loaded_dbapi.Error
        try:
            execute(words, bound)
        except fault as error:
            raise DBAPIError.instance(
                words, bound, error, fault, hide_parameters=True, dialect=self._dialect
            ) from error


class ByKey:
    """Looks for rows by their keys, with statements of few lengths, so that each is compiled once.

    Args:
        columns: of the rows.
        key: that is looked for.
        rooms: how many keys a statement may take, rising; of fewer, the last is asked for more often than needed.
    """

    def __init__(self, columns: Sequence[Any], key: ColumnElement[str], rooms: Sequence[int]) -> None:
        self._columns, self._key, self._rooms = columns, key, rooms
        self._statements: dict[int, Select[Any]] = {}

    def find(self, driver: Driver, keys: Sequence[str]) -> Iterator[Any]:
        """Those that are there, in no order."""
        most = self._rooms[-1]
        for start in range(0, len(keys), most):
            some = keys[start : start + most]
            room = next(room for room in self._rooms if room >= len(some))
            padded = [*some, *[some[-1]] * (room - len(some))]
            yield from driver.rows(self._of(room), {f"key{number}": key for number, key in enumerate(padded)})

    def _of(self, room: int) -> Select[Any]:
        found = self._statements.get(room)
        if found is None:
            keys: list[BindParameter[str]] = [bindparam(f"key{number}") for number in range(room)]
            found = self._statements[room] = select(*self._columns).where(self._key.in_(keys))
        return found
