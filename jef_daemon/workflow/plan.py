"""A definition made ready: who waits for whom, what is compiled; and what is wrong with it. Pure."""

from __future__ import annotations

import functools
import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jef_daemon.lock.state import Mode
from jef_daemon.workflow.definition import Definition, Stage
from jef_daemon.workflow.expressions import (
    Expression,
    ExpressionError,
    Path,
    expression,
    is_template,
    plain,
    template,
)

Where = tuple[str | int, ...]
"""A place in a definition: `("stages", 2, "needs")`."""

ROOTS = ("workflow", "job", "stages", "workflowId")
"""What every expression sees."""
ITEM_ROOTS = ("item", "index")
"""What expressions of a `forEach` stage see beside."""
LAST_ROOTS = ("outcome",)
"""What expressions of an `always` stage see beside."""
LOCK_ROOTS = ("workflow", "workflowId")
"""What expressions of the workflow's own locks see: they are asked for before anything runs."""
STAGE_KEYS = ("status", "result", "variables", "error")
"""What is known of a stage that has ended."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """A mistake in a definition."""

    where: Where
    said: str
    """What is wrong and what to do."""


class PlanError(ValueError):
    """A definition that cannot be carried out."""

    def __init__(self, flaws: list[Flaw]) -> None:
        super().__init__("; ".join(flaw.said for flaw in flaws))
        self.flaws = flaws


@dataclass(frozen=True)
class Plan:
    """A definition in which everything fits together."""

    definition: Definition
    stages: Mapping[str, Stage]
    """By name, in the order of the file."""
    needs: Mapping[str, tuple[str, ...]]
    """Of each stage: those that must have passed."""
    after: Mapping[str, frozenset[str]]
    """Of each stage: all that come after it, near and far."""
    conditions: Mapping[str, Expression | bool]
    lists: Mapping[str, Expression | list[Any]]
    """Of each `forEach` stage."""

    # Looked at with every event of every workflow, and the same for all of them.

    @functools.cached_property
    def ordinary(self) -> tuple[Stage, ...]:
        """Those that are no `always` stages."""
        return tuple(stage for stage in self.stages.values() if not stage.always)

    @functools.cached_property
    def last(self) -> tuple[Stage, ...]:
        """The `always` stages."""
        return tuple(stage for stage in self.stages.values() if stage.always)

    @functools.cached_property
    def timeouts(self) -> Mapping[str, dict[str, Any]]:
        """Of each stage, as its requests carry them."""
        return {name: stage.timeouts.model_dump(by_alias=True) for name, stage in self.stages.items()}

    @functools.cached_property
    def looking_back(self) -> frozenset[str]:
        """Those whose expressions read what has become of other stages: it is gathered for no others."""
        return frozenset(
            self.definition.stages[int(where[1])].name
            for where, text, is_bare in texts(self.definition)
            if where[0] == "stages" and ("stages",) in (expression(text) if is_bare else template(text)).reads
        )


def plan(definition: Definition) -> Plan:
    """Make a definition ready.

    Raises:
        PlanError: with every flaw.
    """
    flaws = list(_flaws(definition))
    if flaws:
        raise PlanError(flaws)
    return _made(definition)


def _made(definition: Definition) -> Plan:
    stages = {stage.name: stage for stage in definition.stages}
    needs = {name: tuple(found) for name, found in _needs(definition).items()}
    conditions: dict[str, Expression | bool] = {}
    lists: dict[str, Expression | list[Any]] = {}
    for name, stage in stages.items():
        conditions[name] = expression(stage.when) if isinstance(stage.when, str) else stage.when
        if stage.for_each is not None:
            lists[name] = expression(stage.for_each) if isinstance(stage.for_each, str) else stage.for_each
    before = _before(needs)
    after = {name: frozenset(other for other in stages if name in before[other]) for name in stages}
    return Plan(definition, stages, needs, after, conditions, lists)


@functools.lru_cache(maxsize=256)
def plan_of(canonical: str) -> Plan:
    """The plan of a definition that was found right before, by whichever version: workflows are pinned to it."""
    return _made(Definition.model_validate_json(canonical))


def texts(definition: Definition) -> Iterator[tuple[Where, str, bool]]:
    """Every text that may hold expressions: where it is, the text, and whether it is one without braces."""
    for which, lock in enumerate(definition.locks):
        yield from _templates(lock.resource, ("locks", which, "resource"))
    for number, stage in enumerate(definition.stages):
        at: Where = ("stages", number)
        if isinstance(stage.when, str):
            yield (*at, "when"), stage.when, True
        if isinstance(stage.for_each, str):
            yield (*at, "forEach"), stage.for_each, True
        yield from _templates(stage.configuration, (*at, "configuration"))
        yield from _templates(stage.variables, (*at, "variables"))
        for which, lock in enumerate(stage.locks):
            yield from _templates(lock.resource, (*at, "locks", which, "resource"))


def _templates(value: Any, where: Where) -> Iterator[tuple[Where, str, bool]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _templates(inner, (*where, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _templates(inner, (*where, number))
    elif is_template(value):
        yield where, value, False


# --- what may be wrong -----------------------------------------------------------------------------------


def _flaws(definition: Definition) -> Iterator[Flaw]:
    yield from _name_flaws(definition)
    if len({stage.name for stage in definition.stages}) < len(definition.stages):
        return  # of two stages with one name, nobody can say who waits for which
    needs = _needs(definition)
    circle = _circle(needs)
    if circle:
        number = [stage.name for stage in definition.stages].index(circle[0])
        said = " needs ".join((*circle, circle[0]))
        yield Flaw(("stages", number, "needs"), f"a circle: {said}; take one of them out")
        return
    yield from _value_flaws(definition)
    before = _before(needs)
    yield from _goto_flaws(definition, before)
    yield from _lock_flaws(definition)
    yield from _expression_flaws(definition, before)


def _name_flaws(definition: Definition) -> Iterator[Flaw]:
    seen: set[str] = set()
    known = {stage.name for stage in definition.stages if not stage.always}
    for number, stage in enumerate(definition.stages):
        if stage.name in seen:
            yield Flaw(
                ("stages", number, "name"), f"there is a stage {stage.name!r} already; call one otherwise"
            )
        seen.add(stage.name)
        for which, need in enumerate(stage.needs or ()):
            if need not in known:
                yield Flaw(("stages", number, "needs", which), _absent(need, known, definition))
        if stage.always and stage.goto:
            yield Flaw(
                ("stages", number, "onFailure"), "behind an always stage nothing follows: fail or continue"
            )


def _value_flaws(definition: Definition) -> Iterator[Flaw]:
    """Values that no message could carry."""
    written: list[tuple[Where, Any]] = [(("variables",), definition.variables)]
    for number, stage in enumerate(definition.stages):
        at: Where = ("stages", number)
        written += [((*at, "configuration"), stage.configuration), ((*at, "variables"), stage.variables)]
        written.append(((*at, "forEach"), stage.for_each))
    for where, value in written:
        try:
            plain(value)
        except ExpressionError as error:
            yield Flaw(where, str(error))


def _goto_flaws(definition: Definition, before: Mapping[str, set[str]]) -> Iterator[Flaw]:
    known = {stage.name for stage in definition.stages if not stage.always}
    for number, stage in enumerate(definition.stages):
        goto, at = stage.goto, ("stages", number, "onFailure")
        if goto is None or stage.always:
            continue
        if goto not in known:
            yield Flaw(at, _absent(goto, known, definition))
        elif goto == stage.name:
            yield Flaw(at, "a stage cannot go on at itself; retry.attempts lets it have further jobs")
        elif stage.name not in before[goto]:
            yield Flaw(
                at,
                f"{goto!r} does not come after {stage.name!r}; let it need {stage.name!r}, or one that does",
            )


def _lock_flaws(definition: Definition) -> Iterator[Flaw]:
    """What would wait for its own workflow."""
    held: dict[str, Mode] = {}
    for lock in definition.locks:
        held[lock.resource] = stronger(held.get(lock.resource), lock.mode)
    for number, stage in enumerate(definition.stages):
        for which, lock in enumerate(stage.locks):
            mine = held.get(lock.resource)
            if mine is not None and not mine.covers(lock.mode):
                said = f"the workflow holds {lock.resource!r} SHARED, the stage wants it EXCLUSIVE"
                remedy = "let the workflow hold it EXCLUSIVE, or only the stage"
                yield Flaw(("stages", number, "locks", which), f"{said}: {remedy}")


def _expression_flaws(definition: Definition, all_before: Mapping[str, set[str]]) -> Iterator[Flaw]:
    declared = {*definition.variables, *definition.required}
    ordinary = {stage.name for stage in definition.stages if not stage.always}
    for where, text, is_bare in texts(definition):
        roots: tuple[str, ...] = LOCK_ROOTS
        before: set[str] = set()
        own = ""
        if where[0] == "stages":
            stage = definition.stages[int(where[1])]
            own, before = stage.name, ordinary if stage.always else all_before[stage.name]
            has_item = stage.for_each is not None and where[2] not in {"when", "forEach"}
            roots = ROOTS + (ITEM_ROOTS if has_item else ()) + (LAST_ROOTS if stage.always else ())
        try:
            found = expression(text) if is_bare else template(text)
        except ExpressionError as error:
            yield Flaw(where, str(error))
            continue
        unseen = functools.partial(_unseen, own=own, before=before, definition=definition)
        for said in sorted(
            {_unreadable(path, roots, declared, before, unseen) for path in found.reads} - {""}
        ):
            yield Flaw(where, said)


def _unreadable(
    path: Path, roots: Iterable[str], declared: set[str], before: set[str], unseen: Callable[[str], str]
) -> str:
    """Why a path leads nowhere; empty: it may lead somewhere. `unseen` tells why a stage that is not before is not."""
    root, key = path[0], path[1] if len(path) > 1 else None
    if root not in roots:
        return f"there is no {root!r}; expressions see {', '.join(roots)}"
    if root == "workflow" and key is not None and key not in declared:
        return f"no variable {key!r} is declared in variables or required{_like(key, declared)}"
    if root == "stages" and key is not None and key not in before:
        return unseen(key)
    if root == "stages" and len(path) > 2 and path[2] not in STAGE_KEYS:
        return f"of a stage there is no {path[2]!r}; there is {', '.join(STAGE_KEYS)}"
    return ""


def _unseen(name: str, own: str, before: set[str], definition: Definition) -> str:
    if name == own:
        return "a stage does not see itself"
    if any(stage.name == name and not stage.always for stage in definition.stages):
        return f"stage {name!r} need not have ended by then; name it in needs"
    return _absent(name, before, definition)


def _absent(name: str, known: Iterable[str], definition: Definition) -> str:
    if any(stage.name == name for stage in definition.stages):
        return f"{name!r} is an always stage, which runs behind all others: nothing waits for it or reads it"
    return f"there is no stage {name!r}{_like(name, known)}"


def stronger(one: Mode | None, other: Mode) -> Mode:
    """Of the modes in which a resource is named twice, the one that counts."""
    return Mode.EXCLUSIVE if Mode.EXCLUSIVE in (one, other) else other


def _like(word: str, known: Iterable[str]) -> str:
    import difflib  # only where something is wrong

    near = difflib.get_close_matches(word, sorted(known), 1)
    return f"; do you mean {near[0]!r}?" if near else f"; there is {', '.join(sorted(known)) or 'none'}"


# --- who waits for whom ----------------------------------------------------------------------------------


def _needs(definition: Definition) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    last = None
    for stage in definition.stages:
        if stage.always:
            found[stage.name] = []
            continue
        found[stage.name] = list(stage.needs) if stage.needs is not None else [last] if last else []
        last = stage.name
    return found


def _before(needs: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Of each stage all that must have passed before it, near and far; there is no circle."""
    found: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(needs).static_order():
        near = needs.get(name, ())
        found[name] = set(near).union(*(found[each] for each in near))
    return found


def _circle(needs: Mapping[str, list[str]]) -> list[str]:
    """Stages that wait for one another, from the first of the file on; empty: none do."""
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:0:-1]  # each is needed by the next; the first stands at the end again
        names = list(needs)
        first = circle.index(min(circle, key=names.index))
        return [*circle[first:], *circle[:first]]
    return []
