"""The folder of definitions: read when a workflow is asked for, and again once a file has changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from jef_daemon.workflow.definition import WorkflowName
from jef_daemon.workflow.loading import DefinitionError, Problem, Source, load
from jef_daemon.workflow.plan import Flaw

_NAME = re.compile(str(WorkflowName.__metadata__[0].pattern))  # type: ignore[attr-defined]  # of an Annotated


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
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    def get(self, name: str) -> Source:
        """A definition as it is now.

        Raises:
            DefinitionError: there is none, or it is wrong.
        """
        file = self.folder / f"{name}.yaml"
        try:
            found = file.stat() if _NAME.search(name) else None
        except OSError:
            found = None
        if found is None:
            there = ", ".join(self.names()) or "none"
            said = f"there is no workflow {name!r} in {self.folder}; there is: {there}"
            raise DefinitionError([Problem(file, 0, "", said)])
        mark = (found.st_mtime_ns, found.st_size)
        known = self._read.get(name)
        if known is None or known[0] != mark:
            known = self._read[name] = mark, load(file)
        return known[1]

    def with_inner(self, name: str) -> Mapping[str, Source]:
        """A definition and those of all workflows that its stages may start, near and far.

        Raises:
            DefinitionError: one is missing or wrong, or they start one another in a circle.
        """
        found: dict[str, Source] = {}
        self._collect(name, (), found)
        return found

    def _collect(self, name: str, above: tuple[str, ...], found: dict[str, Source]) -> None:
        source = found[name] = self.get(name)
        for flaw, inner in self._inner(source):
            circle = (*above, name, inner)
            if inner in circle[:-1]:
                said = f"a circle: {' starts '.join(circle[circle.index(inner) :])}"
                raise DefinitionError([source.problem(Flaw(flaw, said))])
            self._collect(inner, (*above, name), found)

    def _inner(self, source: Source) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for number, stage in enumerate(source.plan.definition.stages):
            if stage.workflow is not None:
                yield ("stages", number, "workflow"), stage.workflow
