"""Definitions in files: YAML 1.2, with the line of each mistake."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Flaw, Plan, PlanError, Where, plan

_MOST_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake, and where it is."""

    file: Path
    line: int
    """From 1; 0: the file as a whole."""
    where: str
    """`stages.2.needs`, or a stage's name instead of its number."""
    said: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{place}: {self.where}: {self.said}" if self.where else f"{place}: {self.said}"


class DefinitionError(ValueError):
    """A file that holds no workflow that can be carried out."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Source:
    """A definition, and where its parts stand."""

    file: Path
    plan: Plan
    lines: Mapping[Where, int]

    def problem(self, flaw: Flaw) -> Problem:
        """A flaw with its line."""
        return _problem(self.file, flaw, self.lines, [stage.name for stage in self.plan.definition.stages])


def load(file: Path) -> Source:
    """Read a definition.

    Raises:
        DefinitionError: with every mistake that can be told at once.
    """
    values, lines = _read(file)
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in _stages(values)]
    try:
        definition = Definition.model_validate(values)
    except ValidationError as error:
        flaws = [_flaw_of(problem) for problem in error.errors()]
        raise DefinitionError([_problem(file, flaw, lines, names) for flaw in flaws]) from None
    flaws = []
    if definition.name != file.stem:
        flaws.append(
            Flaw(
                ("name",),
                f"the file is called {file.stem!r}, the workflow {definition.name!r}: name both alike",
            )
        )
    try:
        made = plan(definition)
    except PlanError as error:
        raise DefinitionError([_problem(file, flaw, lines, names) for flaw in flaws + error.flaws]) from None
    if flaws:
        raise DefinitionError([_problem(file, flaw, lines, names) for flaw in flaws])
    return Source(file, made, lines)


def _stages(values: Any) -> list[Any]:
    found = values.get("stages") if isinstance(values, dict) else None
    return found if isinstance(found, list) else []


def _read(file: Path) -> tuple[Any, dict[Where, int]]:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DefinitionError([Problem(file, 0, "", f"it cannot be read: {error.strerror}")]) from None
    if len(text) > _MOST_BYTES:
        raise DefinitionError([Problem(file, 0, "", f"it has {len(text)} bytes; {_MOST_BYTES} are allowed")])
    yaml = YAML(typ="rt", pure=True)
    try:
        found = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = f"no YAML: {error.problem or error.context or error}"
        raise DefinitionError([Problem(file, mark.line + 1 if mark else 0, "", said)]) from None
    except (YAMLError, ValueError, RecursionError) as error:
        said = f"no YAML: {str(error).partition(chr(10))[0]}"
        raise DefinitionError([Problem(file, 0, "", said)]) from None
    lines = dict(_lines(found, ()))
    return _plain(found), lines


def _lines(value: Any, where: Where) -> Iterator[tuple[Where, int]]:
    """The line of each key and item."""
    keys: Iterator[Any]
    if isinstance(value, CommentedMap):
        keys = iter(value)
    elif isinstance(value, CommentedSeq):
        keys = iter(range(len(value)))
    else:
        return
    if not where:
        yield where, value.lc.line + 1
    for key in keys:
        data = value.lc.data or {}
        if key in data:
            yield (*where, key), data[key][0] + 1
        yield from _lines(value[key], (*where, key))


def _plain(value: Any) -> Any:
    """JSON values; an instant is a text, as JSON has none."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _flaw_of(problem: Any) -> Flaw:
    said = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        said = "there is no such key; docs/workflows.md lists them"
    elif problem["type"] == "missing":
        said = "required"
    return Flaw(tuple(problem["loc"]), said[:1].lower() + said[1:])


def _problem(file: Path, flaw: Flaw, lines: Mapping[Where, int], names: list[Any]) -> Problem:
    where = flaw.where
    while where not in lines and where:
        where = where[:-1]
    words = [str(part) for part in flaw.where]
    if (
        len(words) > 1
        and words[0] == "stages"
        and isinstance(flaw.where[1], int)
        and flaw.where[1] < len(names)
    ):
        words[:2] = [f"stage {names[flaw.where[1]] or flaw.where[1] + 1}"]
    return Problem(file, lines.get(where, 0), ".".join(words), flaw.said)
