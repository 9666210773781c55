"""Placeholders in a command: looked up once, one argument each, nothing interpreted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.actions.placeholders import check, fill, fill_all, fill_text, names
from jef_daemon.errors import ConfigurationRefused

VALUES = {
    "configuration": {
        "source": "/in/a b.mov",
        "count": 3,
        "ratio": 0.5,
        "fast": True,
        "flags": ["-a", 1, False],
        "none": None,
        "deep": {"er": "x"},
    },
    "jobContextVariables": {"width": 320},
    "workflowContextVariables": {},
    "executionId": "624",
    "attempt": 2,
}


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("plain", ["plain"]),
        ("", [""]),
        ("{configuration.source}", ["/in/a b.mov"]),
        ("--in={configuration.source}", ["--in=/in/a b.mov"]),
        ("{configuration.count}x{configuration.ratio}", ["3x0.5"]),
        ("{configuration.fast}", ["true"]),
        ("{configuration.deep.er}", ["x"]),
        ("{jobContextVariables.width}", ["320"]),
        ("{executionId}-{attempt}", ["624-2"]),
        ("{configuration.flags}", ["-a", "1", "false"]),
        ("{{}}", ["{}"]),
        ("{{executionId}}", ["{executionId}"]),
        ("{{{executionId}}}", ["{624}"]),
    ],
)
def test_filled(template: str, arguments: list[str]) -> None:
    """One argument, whatever blanks it holds; a list only where it stands alone."""
    assert fill(check(template), VALUES) == arguments


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{configuration.nothing}", r"configuration\.nothing is missing"),
        ("{configuration.source.deeper}", r"configuration\.source\.deeper is missing"),
        ("{workflowId}", "workflowId is missing"),
        ("{configuration.none}", r"configuration\.none is NoneType"),
        ("{configuration.deep}", r"configuration\.deep is dict"),
        ("-{configuration.flags}", r"configuration\.flags is list"),
    ],
)
def test_what_cannot_be_filled(template: str, named: str) -> None:
    """Refused before anything runs, with the field's name."""
    with pytest.raises(ConfigurationRefused, match=named):
        fill(check(template), VALUES)


@pytest.mark.parametrize("value", ["\0", "a\0b", ["a", "\0"]])
def test_nul(value: Any) -> None:
    """The kernel would cut the argument there."""
    with pytest.raises(ConfigurationRefused, match=r"configuration\.x holds a NUL"):
        fill("{configuration.x}", {"configuration": {"x": value}})


def test_a_list_in_a_list() -> None:
    with pytest.raises(ConfigurationRefused, match="is list"):
        fill("{configuration.x}", {"configuration": {"x": [["a"]]}})


@pytest.mark.parametrize(
    "template",
    [
        "{",
        "}",
        "{}",
        "{0}",
        "{ executionId }",
        "{configuration}",
        "{configuration.}",
        "{configuration..a}",
        "{environment.HOME}",
        "{executionId.x}",
        "{a{executionId}}",
        "{executionId!r}",
        "{attempt:>9}",
    ],
)
def test_no_placeholder(template: str) -> None:
    """The operator learns of it when the daemon starts, not when a job comes."""
    with pytest.raises(ValueError, match="is no placeholder"):
        check(template)


def test_names() -> None:
    assert names("{{x}}{configuration.a}-{scratch}{{") == ["configuration.a", "scratch"]


@given(st.text(st.characters(exclude_characters="\0")))
def test_a_value_is_never_interpreted(value: str) -> None:
    """Braces, quotes, blanks, a placeholder in it: it arrives as it is, as one argument."""
    values = {"configuration": {"x": value}, "executionId": "624"}
    assert fill_all(["{configuration.x}", "a{configuration.x}b"], values) == [value, f"a{value}b"]


@given(st.text())
def test_escaped_text_comes_back(text: str) -> None:
    """Any text can be written in a template."""
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert names(check(escaped)) == []
    assert fill_text(escaped, {}) == text


@given(st.lists(st.sampled_from(["{", "}", "executionId", "configuration.x", "."]), max_size=8))
def test_what_passed_the_check_can_be_filled(parts: list[str]) -> None:
    """No third outcome besides filled and refused by the check, where the configuration has what it names."""
    template = "".join(parts)
    try:
        check(template)
    except ValueError:
        return
    values: dict[str, Any] = {"configuration": {}}
    for name in names(template):
        *above, last = name.split(".")
        inner = values
        for part in above:
            found = inner.setdefault(part, {})
            inner = found if isinstance(found, dict) else {}
        inner.setdefault(last, "1")
    with contextlib.suppress(ConfigurationRefused):  # one name is another's beginning: x and x.y
        fill(template, values)
        return
    heads = [name for name in names(template) if any(n.startswith(f"{name}.") for n in names(template))]
    assert heads
