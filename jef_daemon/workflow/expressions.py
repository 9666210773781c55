"""Expressions in definitions: `{{ workflow.asset }}`, conditions, lists. Pure; Jinja2's sandbox, made narrower.

They see JSON values and nothing else: no call, no method, no attribute of an object, no statement, and only the
filters and tests that are named here. `a.b` is the key `b` of the object `a`. What could make much of little
(`*` on text, `**`, `%`) is for numbers only, and no result is longer than `MOST_CHARACTERS`.
"""

from __future__ import annotations

import functools
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic_core import to_json

from jef_daemon.messages import MOST_NESTED

MOST_CHARACTERS = 1024 * 1024
"""Longest text that an expression may make."""
_BEYOND = 10**4300
"""No reader of ours, nor Python's own, takes a whole number with more digits than 4300."""
_WHOLE = re.compile(r"\s*\{\{-?(.*?)-?\}\}\s*", re.DOTALL)

Path = tuple[str, ...]
"""What an expression reads: `("stages", "probe", "result")`."""


class ExpressionError(ValueError):
    """An expression is none, or has no value: a sentence that names it."""


# --- what expressions may do -----------------------------------------------------------------------------

_NODES = (
    *(
        nodes.Template,
        nodes.Output,
        nodes.TemplateData,
        nodes.Const,
        nodes.Name,
        nodes.Getattr,
        nodes.Getitem,
    ),
    *(nodes.Slice, nodes.List, nodes.Dict, nodes.Pair, nodes.Compare, nodes.Operand, nodes.And, nodes.Or),
    *(nodes.Not, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos),
    *(nodes.Concat, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Keyword),
)
_BUILT_IN = (
    *("abs", "default", "first", "float", "int", "last", "length", "list", "lower", "max", "min", "round"),
    *("sort", "string", "sum", "trim", "unique", "upper"),
)
_TESTS = (
    *("boolean", "defined", "divisibleby", "even", "false", "in", "mapping", "none", "number", "odd"),
    *("sequence", "string", "true", "undefined"),
)


def _replace(text: str, old: str, new: str) -> str:
    text, old, new = str(text), str(old), str(new)
    _bound(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _join(values: Sequence[Any], between: str = "") -> str:
    texts = [as_text(value) for value in values]
    _bound(sum(map(len, texts)) + len(texts) * len(between))
    return str(between).join(texts)


def _bound(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise ExpressionError(f"its text would have {characters} characters; {MOST_CHARACTERS} are allowed")


_OWN: dict[str, Callable[..., Any]] = {
    "basename": lambda path: posixpath.basename(str(path)),
    "dirname": lambda path: posixpath.dirname(str(path)),
    "join": _join,
    "json": lambda value: to_json(value).decode(),
    "replace": _replace,
    "stem": lambda path: posixpath.splitext(posixpath.basename(str(path)))[0],
    "suffix": lambda path: posixpath.splitext(str(path))[1],
}
FILTERS = tuple(sorted((*_BUILT_IN, *_OWN)))
"""What may stand behind a `|`."""
TESTS = tuple(sorted(_TESTS))
"""What may stand behind `is`."""


class _Narrow(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox without anything but JSON values."""

    intercepted_binops = frozenset({"*", "%", "//", "/"})

    def __init__(self) -> None:
        # Not optimized: what is constant would be evaluated when a definition is read, where it must not fail.
        super().__init__(undefined=StrictUndefined, finalize=as_text, autoescape=False, optimized=False)
        self.globals.clear()
        self.filters = {name: self.filters[name] for name in _BUILT_IN} | _OWN
        self.tests = {name: known for name, known in self.tests.items() if name in _TESTS}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`a.b` is `a["b"]`: what Python's objects have beside their values is nobody's business."""
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A value of a map, a list or a text; what is not there says what is."""
        if isinstance(obj, Mapping):
            if argument in obj:
                return obj[argument]
            known = ", ".join(sorted(map(str, obj))[:20]) or "nothing"
            return self.undefined(hint=f"there is no {argument!r}; there is: {known}")
        is_index = isinstance(argument, int | slice) and not isinstance(argument, bool)
        if is_index and isinstance(obj, list | str):
            try:
                return obj[argument]
            except IndexError:
                return self.undefined(hint=f"there is no number {argument} in a list of {len(obj)}")
        return self.undefined(hint=f"{_kind(obj)} has no {argument!r}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Numbers only: a text times a million, or padded by `%` to as much, would fill the memory."""
        if not all(isinstance(value, int | float) for value in (left, right)):
            raise ExpressionError(f"{operator} is for numbers, not {_kind(left)} and {_kind(right)}")
        return super().call_binop(context, operator, left, right)


def as_text(value: Any) -> Any:
    """A value as it stands in a text: JSON where it is no text."""
    if isinstance(value, str | Undefined):
        return value
    return to_json(value).decode()


def plain(value: Any, levels: int = MOST_NESTED) -> Any:
    """A value as JSON that every reader can take, whatever filters made of it.

    Raises:
        ExpressionError: it is none: not there, infinite, nested too deep, half a character.
    """
    if value is None or isinstance(value, str | int | float):
        if said := _wrong(value):
            raise ExpressionError(said)
        return value
    if isinstance(value, Undefined):
        value._fail_with_undefined_error()  # noqa: SLF001  the library's own words
    if not levels:
        raise ExpressionError(f"it nests deeper than {MOST_NESTED} levels")
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), "")
        if wrong != "":
            raise ExpressionError(f"an object's keys are texts, not {_kind(wrong)}")
        return {key: plain(inner, levels - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [plain(inner, levels - 1) for inner in value]
    raise ExpressionError(f"{type(value).__name__} is nothing that a variable can be")


def _wrong(value: Any) -> str:
    """Why a reader would not take a text or a number; empty: it would."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number is too large, or none at all"
    if isinstance(value, int):
        return "" if -_BEYOND < value < _BEYOND else "a number is too large: it has more than 4300 digits"
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return "a text holds half a character"
    return ""


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


# --- compiled --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expression:
    """One compiled expression, or text with some in it."""

    source: str
    reads: frozenset[Path]
    """The paths that it reads, as far as they are fixed."""
    _evaluate: Callable[[Mapping[str, Any]], Any]

    def value(self, names: Mapping[str, Any]) -> Any:
        """What it is, given what it may see.

        Raises:
            ExpressionError: it has no value: something is not there, or is of the wrong kind.
        """
        try:
            found = plain(self._evaluate(names))
        except (TemplateError, ExpressionError) as error:
            raise ExpressionError(f"{self.source.strip()}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ExpressionError(f"{self.source.strip()}: {type(error).__name__}: {error}") from None
        if isinstance(found, str):
            try:
                _bound(len(found))
            except ExpressionError as error:
                raise ExpressionError(f"{self.source.strip()}: {error}") from None
        return found


@functools.lru_cache(maxsize=4096)
def template(text: str) -> Expression:
    """Text with `{{ … }}` in it. One that is a single expression keeps the type of its value.

    Raises:
        ExpressionError: it is none.
    """
    tree = _parsed(text)
    found = list(tree.find_all(nodes.Output))
    parts = [part for output in found for part in output.nodes]
    inner = _WHOLE.fullmatch(text)
    spoken = [part for part in parts if not (isinstance(part, nodes.TemplateData) and not part.data.strip())]
    if inner and len(spoken) == 1 and not isinstance(spoken[0], nodes.TemplateData):
        return expression(inner[1])
    compiled = _ENVIRONMENT.from_string(text)
    return Expression(text, frozenset(_reads(tree)), compiled.render)


@functools.lru_cache(maxsize=4096)
def expression(source: str) -> Expression:
    """An expression without braces around it; with them, it is the same.

    Raises:
        ExpressionError: it is none.
    """
    inner = _WHOLE.fullmatch(source)
    if inner:
        source = inner[1]
    tree = _parsed("{{ " + source + " }}")
    if not _is_one(tree):
        raise ExpressionError(f"{source.strip()}: braces stand around the whole expression, or not at all")
    compiled = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
    return Expression(source, frozenset(_reads(tree)), lambda names: compiled(**names))


def _is_one(tree: nodes.Template) -> bool:
    """Whether it is one expression and nothing beside: `{{ a }} == {{ b }}` is two, and a text."""
    parts = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    return len(parts) == 1 and not isinstance(parts[0], nodes.TemplateData)


def is_template(value: Any) -> bool:
    """Whether a value has an expression in it."""
    return isinstance(value, str) and "{{" in value


def render(value: Any, names: Mapping[str, Any]) -> Any:
    """A value of a definition with all expressions in it evaluated; what they give is not looked at again.

    Raises:
        ExpressionError: one has no value.
    """
    if isinstance(value, dict):
        return {key: render(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [render(inner, names) for inner in value]
    return template(value).value(names) if is_template(value) else value


def _parsed(text: str) -> nodes.Template:
    try:
        tree = _ENVIRONMENT.parse(text)
    except TemplateSyntaxError as error:
        said = str(error.message).replace("unexpected 'end of print statement'", "it ends too early")
        raise ExpressionError(f"{text.strip()}: {said}") from None
    except RecursionError:
        raise ExpressionError("it is nested too deeply") from None
    except ValueError:  # Python's own, of a number with too many digits
        raise ExpressionError(f"{text.strip()[:100]}: a number is too large") from None
    for node in (tree, *tree.find_all(nodes.Node)):
        _refuse(text, node)
    return tree


def _refuse(text: str, node: nodes.Node) -> None:
    if isinstance(node, nodes.Const) and (said := _wrong(node.value)):
        raise ExpressionError(f"{text.strip()[:100]}: {said}")
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        raise ExpressionError(f"{text.strip()}: no filter {node.name!r}; one of {', '.join(FILTERS)}")
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        raise ExpressionError(f"{text.strip()}: no test {node.name!r}; one of {', '.join(TESTS)}")
    if not isinstance(node, _NODES):
        said = f"{type(node).__name__} is not possible in an expression"
        if isinstance(node, nodes.Call):
            said = "calls are not possible; filters are: {{ value | upper }}"
        raise ExpressionError(f"{text.strip()}: {said}")


def _reads(tree: nodes.Node) -> Iterator[Path]:
    """Every path from a name on, as long as its keys are constants; the shorter ones of each too."""
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Getitem)):
        path = _path(node)
        if path:
            yield path


def _path(node: nodes.Node) -> Path:
    if isinstance(node, nodes.Name):
        return (node.name,)
    if isinstance(node, nodes.Getattr):
        above = _path(node.node)
        return (*above, node.attr) if above else ()
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        above = _path(node.node)
        return (*above, str(node.arg.value)) if above else ()
    return ()


_ENVIRONMENT = _Narrow()
