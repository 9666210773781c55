"""Tables in Markdown, and what a value must be, in words: read off a JSON Schema, of settings and messages alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
_ANCHORS = re.compile(r"^\^|^\\A|\$$|\\z$")
"""Of a pattern, what only says that the whole text is meant."""


def kind_of(schema: Schema, root: Schema) -> str:
    """What a value must be, in words: its type, its choices, its range."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        found = root["$defs"][name]
        return kind_of(found, root) if found.get("type") != "object" else f"object `{name}`"
    if "anyOf" in schema:
        return " or ".join(kind_of(one, root) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    kinds = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "object": "object",
        "null": "null",
    }
    kind = kinds.get(schema.get("type", ""), "any value")
    if schema.get("type") == "array":
        kind = f"list of {kind_of(schema['items'], root)}"
    kind = {"path": "path", "password": "text, secret", "date-time": "RFC 3339 instant"}.get(
        schema.get("format", ""), kind
    )
    return ", ".join(word for word in (kind, _range(schema)) if word)


def _range(schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    if "pattern" in schema:
        return f"like `{_ANCHORS.sub('', schema['pattern'])}`"
    if "maxLength" in schema:
        return f"{schema.get('minLength', 0)} to {schema['maxLength']} characters"
    if least is not None and most is not None:
        return f"{_number(least)} to {_number(most)}"
    words = [f"above {_number(above)}" if above is not None else ""]
    words += [f"at least {_number(least)}" if least is not None else ""]
    words += [f"at most {_number(most)}" if most is not None else ""]
    return ", ".join(filter(None, words))


def _number(value: float) -> str:
    return f"{value:.15g}"  # no separators: it is to be copied


def row(*cells: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |\n"


def table(*heads: str) -> str:
    """The head of a table."""
    return row(*heads) + row(*("---" for _ in heads))
