"""The folder of definitions: read when a workflow is asked for, and again once a file has changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from jef_daemon.workflow.definition import Stage, WorkflowName
from jef_daemon.workflow.loading import SUFFIX, DefinitionError, Problem, Source, load
from jef_daemon.workflow.plan import Flaw, Where

_NAME = re.compile(str(WorkflowName.__metadata__[0].pattern))  # type: ignore[attr-defined]  # of an Annotated
_SHOWN = 20
"""Names that are told where one is unknown."""


class Library:
    """Definitions by name.

    Args:
        folder: of `NAME.yaml`; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[tuple[int, int], Source]] = {}

    def names(self) -> list[str]:
        """Of all definitions, right or wrong."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}"))

    def get(self, name: str) -> Source:
        """A definition as it is now.

        Raises:
            DefinitionError: there is none, or it is wrong.
        """
        found = self._mark(name)
        if found is None:
            raise DefinitionError([Problem(self.folder, 0, "", self._unknown(name))])
        known = self._read.get(name)
        if known is None or known[0] != found:
            known = self._read[name] = found, load(self._file(name))
        return known[1]

    def with_inner(self, name: str) -> Mapping[str, Source]:
        """A definition and those of all workflows that its stages may start, near and far.

        Raises:
            DefinitionError: one is missing or wrong, is not given what it requires, or they start one another in a
                circle.
        """
        found: dict[str, Source] = {}
        problems = list(self._collect(name, (), found, self.get(name)))
        if problems:
            raise DefinitionError(problems)
        return found

    def _collect(
        self, name: str, above: tuple[str, ...], found: dict[str, Source], source: Source
    ) -> Iterator[Problem]:
        found[name] = source
        for number, stage in enumerate(source.plan.definition.stages):
            if stage.workflow is None:
                continue
            at = ("stages", number, "workflow")
            circle = (*above, name, stage.workflow)
            if stage.workflow in circle[:-1]:
                words = " starts ".join(circle[circle.index(stage.workflow) :])
                yield source.problem(Flaw(at, f"a circle: {words}; take one of them out"))
            elif self._mark(stage.workflow) is None:
                yield source.problem(Flaw(at, self._unknown(stage.workflow)))
            else:
                yield from self._inner(source, at, stage, (*above, name), found)

    def _inner(
        self, source: Source, at: Where, stage: Stage, above: tuple[str, ...], found: dict[str, Source]
    ) -> Iterator[Problem]:
        """What is wrong with a workflow that a stage starts, and with how it does."""
        name = str(stage.workflow)
        try:
            inner = self.get(name)
        except DefinitionError as error:
            yield source.problem(Flaw(at, f"the workflow {name!r} has mistakes of its own"))
            yield from error.problems
            return
        given = stage.variables
        missing = [each for each in inner.plan.definition.required if given.get(each) is None]
        if missing:
            said = f"the workflow {name!r} requires {', '.join(missing)}: name it in variables"
            yield source.problem(Flaw(at, said))
        yield from self._collect(name, above, found, inner)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _mark(self, name: str) -> tuple[int, int] | None:
        """By which a file that has changed is known; None: there is none."""
        try:
            found = self._file(name).stat() if _NAME.search(name) else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_size)

    def _unknown(self, name: str) -> str:
        try:
            next(self.folder.iterdir(), None)  # as a pattern, what cannot be read is empty
        except OSError as error:
            return f"there is no workflow {name!r}: the folder cannot be read: {error.strerror}"
        known = [each for each in self.names() if _NAME.search(each)]
        near = difflib.get_close_matches(name, known, 1)
        there = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "") or "none"
        advice = f"do you mean {near[0]!r}?" if near else f"there is: {there}"
        return f"there is no workflow {name!r}; {advice}"
