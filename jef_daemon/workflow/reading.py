"""YAML 1.2 as JSON values, with the line of each; what YAML can say and JSON cannot is a mistake with its line. Pure.

The library's nodes are read rather than what it makes of them: they know their lines, and what aliases would make of a
short file is known before it fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from jef_daemon.messages import MOST_NESTED
from jef_daemon.workflow.plan import Where

MOST_BYTES = 1024 * 1024
MOST_LEVELS = MOST_NESTED + 10
"""Deepest nesting of a definition: what a value may have, and what lies around it."""
_MOST_WEIGHT = 2 * MOST_BYTES
"""Characters, and two for each value; a file of `MOST_BYTES` comes to more only by its aliases."""
_TAG = "tag:yaml.org,2002:"
_REMEDIES = {
    "found character '\\t'": "it is indented with a tab: YAML wants spaces",
    "found character": "a text that begins with this needs quotes",
    "mapping values are not allowed": "a text with a colon in it needs quotes; or the line is indented too far",
    "expected <block end>": "a line is indented otherwise than those it belongs to, or a quote ends too early",
    "expected ',' or": "a bracket is not closed, or a comma is missing",
    "found unexpected end of stream": "a quote is not closed",
    "could not find expected ':'": "the line is no `key: value`",
    "found undefined alias": "what follows a * must stand further up behind an &; a text with * needs quotes",
    "but found another document": "a definition is one: take `---` and what follows it out",
}
"""By the beginning of what the library says."""
_UNQUOTED = 'a text with {{ }} needs quotes: "{{ … }}"'


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something that is no JSON value."""

    line: int
    """From 1."""
    where: Where
    said: str


class NoYamlError(ValueError):
    """A text that holds no values."""

    def __init__(self, said: str, line: int = 0) -> None:
        super().__init__(said)
        self.line = line
        """From 1; 0: the text as a whole."""


@dataclass(slots=True)
class Reading:
    """What stands in a text."""

    value: Any = None
    lines: dict[Where, int] = field(default_factory=dict)
    """The line of each key and item."""
    mistakes: list[Mistake] = field(default_factory=list)


def read(content: bytes) -> Reading:
    """The values of a YAML text.

    Raises:
        NoYamlError: it holds none.
    """
    text = _decoded(content)
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        said = f"no YAML: the character U+{ord(text[error.position]):04X}; take it out"
        raise NoYamlError(said, line) from None
    except MarkedYAMLError as error:
        raise _explained(error, text.splitlines()) from None
    except (YAMLError, ValueError) as error:
        raise NoYamlError(f"no YAML: {str(error).partition(chr(10))[0]}") from None
    except RecursionError:
        raise NoYamlError(_TOO_DEEP, _deep_line(text)) from None
    if node is None:
        raise NoYamlError("it is empty; a definition has a `name` and `stages`")
    return _Walk(yaml).read(node)


_TOO_DEEP = f"it is nested deeper than {MOST_LEVELS} levels"


def _deep_line(text: str) -> int:
    """Where it becomes too deep: the library's events, other than its nodes, need no stack."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MOST_LEVELS:
            return int(event.start_mark.line) + 1
    return 0


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NoYamlError(
            f"the byte 0x{content[error.start]:02X} is no UTF-8: save the file as UTF-8", line
        ) from None


def _explained(error: MarkedYAMLError, lines: list[str]) -> NoYamlError:
    said = str(error.problem or error.context or error)
    mark = error.problem_mark or error.context_mark
    if said.endswith(("<stream end>'", "end of stream")):
        mark = error.context_mark or mark  # where it began: that it is open at the end, everybody sees
    number = mark.line + 1 if mark is not None else 0
    line = lines[number - 1] if 0 < number <= len(lines) else ""
    remedy = next((remedy for begin, remedy in _REMEDIES.items() if said.startswith(begin)), "")
    if said.startswith("expected <block end>") and ": {{" in line:
        remedy = _UNQUOTED
    return NoYamlError(f"no YAML: {said}" + (f"; {remedy}" if remedy else ""), number)


class _Walk:
    """One way through all nodes.

    Args:
        yaml: knows what a plain word is: a number, a text.
    """

    def __init__(self, yaml: YAML) -> None:
        self._yaml = yaml
        self._found = Reading()
        self._weight = 0
        self._above: list[Node] = []

    def read(self, root: Node) -> Reading:
        """All of it."""
        self._found.lines[()] = _line(root)
        self._found.value = self._value(root, (), _line(root))
        return self._found

    def _value(self, node: Node, where: Where, line: int) -> Any:
        self._weight += 2 + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if self._weight > _MOST_WEIGHT:
            raise NoYamlError(f"its aliases make more than {_MOST_WEIGHT} characters of it", line)
        if isinstance(node, ScalarNode):
            return self._scalar(node, where, line)
        if any(node is each for each in self._above):
            return self._wrong(line, where, "an alias stands within what it names")
        if len(self._above) == MOST_LEVELS:
            raise NoYamlError(_TOO_DEEP, line)
        self._above.append(node)
        try:
            return self._map(node, where) if isinstance(node, MappingNode) else self._list(node, where, line)
        finally:
            self._above.pop()

    def _list(self, node: Node, where: Where, line: int) -> list[Any]:
        self._refuse_tag(node, "seq", where, line)
        found = []
        for number, each in enumerate(node.value):
            self._found.lines[*where, number] = _line(each)
            found.append(self._value(each, (*where, number), _line(each)))
        return found

    def _map(self, node: MappingNode, where: Where) -> dict[str, Any]:
        self._refuse_tag(node, "map", where, _line(node))
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        own = [(key, value) for key, value in node.value if not _is_merge(key)]
        for key, value in own:
            name = self._key(key, where)
            if name is None:
                continue
            if name in first:
                said = f"{name!r} is there already, in line {first[name]}; take one of them out"
                self._wrong(_line(key), (*where, name), said)
                continue
            first[name] = self._found.lines[*where, name] = _line(key)
            found[name] = self._value(value, (*where, name), _line(key))
        return self._merged(node, where) | found

    def _merged(self, node: MappingNode, where: Where) -> dict[str, Any]:
        """What `<<` takes over: of several, the first has the last word, and the map's own keys before all."""
        found: dict[str, Any] = {}
        for source in _sources(node):
            if isinstance(source, MappingNode):
                lines = dict(self._found.lines)
                found = self._value(source, where, _line(source)) | found
                self._found.lines |= lines
            else:
                self._wrong(_line(source), where, "<< takes the keys of an object; it is none")
        return found

    def _key(self, key: Node, where: Where) -> Any:
        if isinstance(key, MappingNode) and key.flow_style:
            return self._wrong(_line(key), where, f"a key is an object; {_UNQUOTED}")
        if not isinstance(key, ScalarNode):
            return self._wrong(_line(key), where, "a key is a text, no list and no object")
        if key.tag != f"{_TAG}str":
            return self._wrong(_line(key), where, f'the key {key.value} is no text: write "{key.value}"')
        return self._text(key, where, _line(key))

    def _scalar(self, node: ScalarNode, where: Where, line: int) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        if kind in {"str", "timestamp"}:  # JSON has no instants
            return self._text(node, where, line)
        if kind in {"null", "bool", "int", "float"}:
            try:
                found = self._yaml.constructor.construct_object(node)
            except (ValueError, YAMLError):
                found = math.nan
            if not isinstance(found, float) or math.isfinite(found):
                return float(found) if isinstance(found, float) else found
            return self._wrong(line, where, f"{_short(node.value)} is no number of JSON; a text needs quotes")
        return self._refuse_tag(node, "str", where, line)

    def _text(self, node: ScalarNode, where: Where, line: int) -> Any:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            said = f"{_short(node.value)!a} holds half a character: write the character itself, or \\U and 8 digits"
            return self._wrong(line, where, said)
        return str(node.value)

    def _refuse_tag(self, node: Node, kind: str, where: Where, line: int) -> Any:
        if str(node.tag) != _TAG + kind:
            tag = str(node.tag).replace(_TAG, "!!")
            self._wrong(line, where, f"the tag {tag} is not possible: values are JSON's; take it out")
        return None

    def _wrong(self, line: int, where: Where, said: str) -> Any:
        """Keep a mistake; returns what stands for its value, so that the others are found too."""
        self._found.mistakes.append(Mistake(line, where, said))
        return None


def _is_merge(key: Node) -> bool:
    return str(key.tag) == f"{_TAG}merge"


def _sources(node: MappingNode) -> Iterator[Node]:
    for key, value in node.value:
        if _is_merge(key):
            yield from value.value if isinstance(value, SequenceNode) else (value,)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
