"""`{configuration.x}` in the arguments of a command: looked up, never interpreted by a shell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jef_daemon.errors import ConfigurationRefused

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(
    r"(configuration|jobContextVariables|workflowContextVariables)(\.[^.{}\s]+)+|executionId|workflowId|attempt|scratch"
)


def check(template: str) -> str:
    """Return a template that is well-formed.

    Raises:
        ValueError: it is not; names the placeholder.
    """
    for match in _PLACEHOLDER.finditer(template):
        if match[0] in {"{{", "}}"}:
            continue
        if match[1] is None or not _NAME.fullmatch(match[1]):
            raise ValueError(
                f"{match[0]!r} in {template!r} is no placeholder; write {{configuration.key}}, {{executionId}}, "
                "{scratch}, and {{ }} for braces"
            )
    return template


def names(template: str) -> list[str]:
    """The placeholders of a template."""
    return [match[1] for match in _PLACEHOLDER.finditer(template) if match[1]]


def fill(template: str, values: Mapping[str, Any]) -> list[str]:
    """The arguments that a template becomes: one, or those of a list that it names alone.

    Raises:
        ConfigurationRefused: a value is missing or is nothing that an argument can be.
    """
    whole = re.fullmatch(r"\{([^{}]+)\}", template)
    if whole:
        value = _look_up(whole[1], values)
        if isinstance(value, list):
            return [_text(whole[1], item) for item in value]
        return [_text(whole[1], value)]
    return [fill_text(template, values)]


def fill_text(template: str, values: Mapping[str, Any]) -> str:
    """A template with its placeholders replaced.

    Raises:
        ConfigurationRefused: see `fill`.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] in {"{{", "}}"}:
            return match[0][0]
        return _text(match[1], _look_up(match[1], values))

    return _PLACEHOLDER.sub(replace, template)


def fill_all(templates: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """All arguments of a command."""
    return [argument for template in templates for argument in fill(template, values)]


def _look_up(name: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise ConfigurationRefused(f"{name} is missing; the command needs it")
        found = found[part]
    return found


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ConfigurationRefused(
            f"{name} is {type(value).__name__}; an argument takes a text, a number or a boolean"
        )
    text = str(value)
    if "\0" in text:
        raise ConfigurationRefused(f"{name} holds a NUL character, which no argument can")
    return text
