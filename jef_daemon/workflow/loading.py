"""Definitions in files: YAML 1.2, with the line of each mistake."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Flaw, Plan, PlanError, Where, plan
from jef_daemon.workflow.reading import MOST_BYTES, NoYamlError, read
from jef_daemon.workflow.refusals import flaws_of, known_keys

SUFFIX = ".yaml"
"""Of the files."""


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
        files = list(dict.fromkeys(problem.file for problem in problems))
        self.problems = sorted(problems, key=lambda problem: (files.index(problem.file), problem.line))
        super().__init__("\n".join(map(str, self.problems)))


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
    names = _names(values)
    try:
        # Strict, and as JSON: what an editor refuses by the schema (a number in quotes) is refused here too.
        definition = Definition.model_validate_json(to_json(values), strict=True)
        flaws = list(_name_flaws(definition, file))
        made = plan(definition)
    except ValidationError as error:
        flaws = flaws_of(error, values, known_keys)
    except PlanError as error:
        flaws += error.flaws
    if flaws:
        raise DefinitionError([_problem(file, flaw, lines, names) for flaw in flaws])
    return Source(file, made, lines)


def _name_flaws(definition: Definition, file: Path) -> Iterator[Flaw]:
    if definition.name != file.stem:
        said = f"the file is called {file.stem!r}, the workflow {definition.name!r}: name both alike"
        yield Flaw(("name",), said)


def _names(values: Any) -> list[Any]:
    """Of the stages, as far as they have some."""
    found = values.get("stages") if isinstance(values, dict) else None
    stages = found if isinstance(found, list) else []
    return [stage.get("name") if isinstance(stage, dict) else None for stage in stages]


def _read(file: Path) -> tuple[Any, dict[Where, int]]:
    try:
        found = read(_content(file))
    except NoYamlError as error:
        raise DefinitionError([Problem(file, error.line, "", str(error))]) from None
    if found.mistakes:
        names = _names(found.value)
        raise DefinitionError(
            [Problem(file, each.line, _words(each.where, names), each.said) for each in found.mistakes]
        )
    return found.value, found.lines


def _content(file: Path) -> bytes:
    if file.suffix != SUFFIX:
        said = f"nothing finds it: call it {file.stem}{SUFFIX}"
        raise DefinitionError([Problem(file, 0, "", said)])
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would keep who reads it waiting for ever
            raise DefinitionError([Problem(file, 0, "", f"it is {_kind(found.st_mode)}, no file")])
        if found.st_size > MOST_BYTES:
            said = f"it has {found.st_size} bytes; {MOST_BYTES} are allowed"
            raise DefinitionError([Problem(file, 0, "", said)])
        return file.read_bytes()
    except OSError as error:
        raise DefinitionError([Problem(file, 0, "", f"it cannot be read: {error.strerror}")]) from None


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"


def _problem(file: Path, flaw: Flaw, lines: Mapping[Where, int], names: list[Any]) -> Problem:
    where = flaw.where
    while where not in lines and where:
        where = where[:-1]
    return Problem(file, lines.get(where, 0), _words(flaw.where, names), flaw.said)


def _words(where: Where, names: list[Any]) -> str:
    """A place as people call it: a stage by its name."""
    words = [str(part) for part in where]
    if len(where) > 1 and where[0] == "stages" and isinstance(where[1], int) and where[1] < len(names):
        words[:2] = [f"stage {names[where[1]] or where[1] + 1}"]
    return ".".join(words)
