"""What a model refuses, that of definitions or an action's, in words of whoever writes the file. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from jef_daemon.workflow.definition import Definition, LockWish, Stage, StageRetry, StageTimeouts
from jef_daemon.workflow.plan import Flaw, Where

_KINDS = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}
"""Of the library's names of mistakes: what a value is to be."""
_FORMS = {
    "_-]{0,99}$": "a letter or digit, then letters, digits, `_`, `-`; at most 100",
    "9_]{0,99}$": "a letter or `_`, then letters, digits, `_`; at most 100",
    "{0,39}$": "a letter, then letters, digits, `_`; at most 40",
    "{0,39})$": "`fail`, `continue`, or `goto STAGE`",
}
"""Patterns in words, by their end."""
REQUIRED = "required"
_SHOULD = "Input should be "
_MODELS: Mapping[str | int, type[BaseModel]] = {
    "locks": LockWish,
    "retry": StageRetry,
    "timeouts": StageTimeouts,
    "stages": Stage,
}


def flaws_of(error: ValidationError, values: Any, known: Callable[[Where], Iterable[str]]) -> list[Flaw]:
    """One flaw for each place, where the library tells of each kind that a value is not.

    Args:
        error: the model's.
        values: what it refused.
        known: the keys that there are where one is unknown.
    """
    found: dict[Where, list[str]] = {}
    for problem in error.errors(include_url=False):
        where = _place(problem["loc"], values, is_missing=problem["type"] == "missing")
        found.setdefault(where, []).append(_said(problem, where, known))
    return [Flaw(where, _together(said)) for where, said in found.items()]


def _place(location: tuple[int | str, ...], values: Any, *, is_missing: bool) -> Where:
    """Where it is in the file; the library's names of kinds, which stand between, left out."""
    where: list[str | int] = []
    for part in location:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            continue
        where.append(part)
    return (*where, location[-1]) if is_missing else tuple(where)


def known_keys(where: Where) -> Iterable[str]:
    """Those of a definition that may stand where this one does."""
    above = [part for part in where[:-1] if isinstance(part, str)]
    return keys_of(_MODELS.get(above[-1], Definition) if above else Definition)


def keys_of(model: type[BaseModel]) -> Iterable[str]:
    """As they are written."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _said(problem: Any, where: Where, known: Callable[[Where], Iterable[str]]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"there is no such key; {_advice(str(where[-1]), known(where))}"
    if kind == "missing":
        return REQUIRED
    if kind == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    if kind == "too_long":
        return f"has {context['actual_length']} items; {context['max_length']} are allowed"
    if kind in {"too_short", "string_too_short"}:
        return "should not be empty"
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        form = next((words for end, words in _FORMS.items() if pattern.endswith(end)), pattern)
        return f"should be {form}; not {_short(problem['input'])}"
    msg = str(problem["msg"])
    if kind not in _KINDS and not msg.startswith(_SHOULD):
        return msg[:1].lower() + msg[1:]
    return f"should be {_KINDS.get(kind) or msg.removeprefix(_SHOULD)}, not {_short(problem['input'])}"


def _together(said: list[str]) -> str:
    """`should be a text or a list, not 5`; where it is of one of the kinds, what is wrong with that one."""
    kinds = [each for each in dict.fromkeys(said) if each.startswith("should be ")]
    if len(kinds) < len(said):
        return next(each for each in said if each not in kinds)
    first, *more = kinds
    if not more:
        return first
    wanted = [each.removeprefix("should be ").partition(", not ")[0] for each in (first, *more)]
    return f"should be {' or '.join(wanted)}, not {first.rpartition(', not ')[2]}"


def _advice(key: str, known: Iterable[str]) -> str:
    by_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(key.lower(), by_case, 1)
    return (
        f"do you mean {by_case[near[0]]!r}?" if near else f"there is {', '.join(by_case.values()) or 'none'}"
    )


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
