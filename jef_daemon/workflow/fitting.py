"""A definition held against the actions that there are: unknown ones, configurations that their models refuse. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.expressions import is_template
from jef_daemon.workflow.plan import Flaw, Where
from jef_daemon.workflow.refusals import REQUIRED, flaws_of, keys_of


def flaws(
    definition: Definition, models: Mapping[str, type[BaseModel]], broken: Mapping[str, str]
) -> Iterator[Flaw]:
    """What does not fit.

    Args:
        definition: one in which everything fits together.
        models: of the configurations, by action.
        broken: actions that cannot be served, and why.
    """
    for number, stage in enumerate(definition.stages):
        at: Where = ("stages", number)
        if stage.action is None or stage.elsewhere:
            continue
        if stage.action in broken:
            yield Flaw((*at, "action"), broken[stage.action])
        elif stage.action not in models:
            near = difflib.get_close_matches(stage.action, models, 1)
            meant = f"do you mean {near[0]!r}? " if near else ""
            remedy = "`jef actions` lists them; elsewhere: true, if another daemon or Enterprise has it"
            yield Flaw((*at, "action"), f"there is no action {stage.action!r}; {meant}{remedy}")
        else:
            yield from _refused(stage.configuration, models[stage.action], (*at, "configuration"))


def _refused(configuration: dict[str, Any], model: type[BaseModel], at: Where) -> Iterator[Flaw]:
    """What the action's model says of all that is certain before a workflow runs."""
    try:
        model.model_validate(configuration)
    except ValidationError as error:
        for flaw in flaws_of(error, configuration, lambda where: keys_of(model) if len(where) == 1 else ()):
            if not _has_template(configuration, flaw.where):
                is_missing = flaw.said == REQUIRED
                said = "the action needs it" if is_missing else f"the action refuses it: {flaw.said}"
                yield Flaw((*at, *flaw.where), said)


def _has_template(value: Any, where: Where) -> bool:
    """Whether an expression, whose value nobody knows yet, is at a place or in it."""
    for part in where:
        if is_template(value):
            return True
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False  # a key that is missing, or one of the model's own
    return _holds_template(value)


def _holds_template(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_template, value.values()))
    if isinstance(value, list):
        return any(map(_holds_template, value))
    return is_template(value)
