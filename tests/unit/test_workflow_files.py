"""Files that are no definitions: each mistake of YAML, and each wrong value, is a sentence with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jef_daemon.workflow import drawing
from jef_daemon.workflow.library import Library
from jef_daemon.workflow.loading import DefinitionError, Problem, load
from tests.support.process import ROOT

BEGIN = "name: w\nvariables: {x: 1}\nstages:\n- name: a\n  action: x\n"
QUOTES = 'a text with {{ }} needs quotes: "{{ … }}"'


def said(path: Path) -> list[str]:
    with pytest.raises(DefinitionError) as caught:
        load(path)
    return [str(problem).removeprefix(f"{path.parent}/") for problem in caught.value.problems]


def of_text(folder: Path, text: str | bytes) -> list[str]:
    path = folder / "w.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return said(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "w.yaml: it is empty; a definition has a `name` and `stages`"),
        ("# nothing yet\n", "w.yaml: it is empty; a definition has a `name` and `stages`"),
        ("hello", 'w.yaml:1: should be an object, not "hello"'),
        ("name: f\xfcr".encode("latin-1"), "w.yaml:1: the byte 0xFC is no UTF-8: save the file as UTF-8"),
        (b"name: w\nnot\0e: w", "w.yaml:2: no YAML: the character U+0000; take it out"),
        (
            "name: w\nstages:\n\t- name: a",
            (
                "w.yaml:3: no YAML: found character '\\t' that cannot start any token; "
                "it is indented with a tab: YAML wants spaces"
            ),
        ),
        (
            "name: w\nstages:\n  - name: a\n   action: x",
            (
                "w.yaml:4: no YAML: expected <block end>, but found '<block mapping start>'; "
                "a line is indented otherwise than those it belongs to, or a quote ends too early"
            ),
        ),
        (
            "name: w\nstages: [a\n\n",
            (
                "w.yaml:2: no YAML: expected ',' or ']', but got '<stream end>'; "
                "a bracket is not closed, or a comma is missing"
            ),
        ),
        (
            f"{BEGIN}  configuration: {{path: {{{{ workflow.x }}}}}}",
            f"w.yaml:6: stage a.configuration.path: a key is an object; {QUOTES}",
        ),
        (
            f"{BEGIN}  configuration:\n    path: {{{{ workflow.x }}}}/b",
            f"w.yaml:7: no YAML: expected <block end>, but found '<scalar>'; {QUOTES}",
        ),
        (
            f"{BEGIN}  action: y",
            "w.yaml:6: stage a.action: 'action' is there already, in line 5; take one of them out",
        ),
        (
            f"{BEGIN}  configuration: {{1: 2}}",
            'w.yaml:6: stage a.configuration: the key 1 is no text: write "1"',
        ),
        (
            f"{BEGIN}  configuration: {{? [1] : 2}}",
            "w.yaml:6: stage a.configuration: a key is a text, no list and no object",
        ),
        (
            f"{BEGIN}  configuration: !conf {{}}",
            "w.yaml:6: stage a.configuration: the tag !conf is not possible: values are JSON's; take it out",
        ),
        (
            f"{BEGIN}  configuration: {{k: !!set {{b}}}}",
            "w.yaml:6: stage a.configuration.k: the tag !!set is not possible: values are JSON's; take it out",
        ),
        (
            f"{BEGIN}  configuration: {{k: .inf}}",
            "w.yaml:6: stage a.configuration.k: .inf is no number of JSON; a text needs quotes",
        ),
        (
            f"{BEGIN}  configuration: {{k: {'9' * 5000}}}",
            f"w.yaml:6: stage a.configuration.k: {'9' * 39}… is no number of JSON; a text needs quotes",
        ),
        (
            f'{BEGIN}  description: "\\ud83d"',
            (
                "w.yaml:6: stage a.description: '\\ud83d' holds half a character: "
                "write the character itself, or \\U and 8 digits"
            ),
        ),
        (
            f"{BEGIN}  configuration: {{k: &k [*k]}}",
            "w.yaml:6: stage a.configuration.k.0: an alias stands within what it names",
        ),
        (
            f"{BEGIN}  configuration: {{<<: 5}}",
            "w.yaml:6: stage a.configuration: << takes the keys of an object; it is none",
        ),
        (
            f"{BEGIN}---\nname: v",
            "w.yaml:6: no YAML: but found another document; a definition is one: take `---` and what follows it out",
        ),
    ],
)
def test_what_json_cannot_say_is_told_with_its_line(tmp_path: Path, text: str | bytes, line: str) -> None:
    assert of_text(tmp_path, text) == [line]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("foreach: [1]", "foreach: there is no such key; do you mean 'forEach'?"),
        ("timeouts: {updte: 5}", "timeouts.updte: there is no such key; do you mean 'update'?"),
        ("locks: [{resource: r, zzz: 1}]", "locks.0.zzz: there is no such key; there is resource, mode"),
        ("always: 'yes'", 'always: should be true or false, not "yes"'),
        ("limit: '3'", 'limit: should be a whole number, not "3"'),
        ("when: 5", "when: should be a text or true or false, not 5"),
        ("forEach: {}", "forEach: should be a text or a list, not an object"),
        (f"forEach: {[0] * 1001}", "forEach: has 1001 items; 1000 are allowed"),
        ("retry: 3", "retry: should be an object, not 3"),
        ("timeouts: {update: -1}", "timeouts.update: should be greater than 0, not -1"),
        ("locks: [{resource: ''}]", "locks.0.resource: should not be empty"),
        ("onFailure: stop", 'onFailure: should be `fail`, `continue`, or `goto STAGE`; not "stop"'),
    ],
)
def test_a_wrong_value_is_told_in_words_of_the_file(tmp_path: Path, line: str, told: str) -> None:
    assert of_text(tmp_path, f"{BEGIN}  {line}") == [f"w.yaml:6: stage a.{told}"]


def test_names_are_told_their_form(tmp_path: Path) -> None:
    text = "name: w x\nvariables: {x-y: 1}\nrequired: []\nstages:\n- {name: 1a, action: x}"
    assert of_text(tmp_path, text) == [
        'w.yaml:1: name: should be a letter or digit, then letters, digits, `_`, `-`; at most 100; not "w x"',
        (
            "w.yaml:2: variables.x-y: should be a letter or `_`, then letters, digits, `_`; at most 100; "
            'not "x-y"'
        ),
        'w.yaml:5: stage 1a.name: should be a letter, then letters, digits, `_`; at most 40; not "1a"',
    ]


def test_a_short_file_cannot_become_a_large_one(tmp_path: Path) -> None:
    """Nine times nine times …: its aliases would fill the memory."""
    rows = ["  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    found = of_text(tmp_path, "name: w\nvariables:\n" + "\n".join(rows) + "\nstages: []")
    assert found == ["w.yaml:3: its aliases make more than 2097152 characters of it"]


@pytest.mark.parametrize("levels", [110, 600])
def test_a_deep_one_is_told_where_it_becomes_too_deep(tmp_path: Path, levels: int) -> None:
    """Also where the library gives up itself."""
    text = f"{BEGIN}  configuration:\n    k: " + "[" * levels + "]" * levels
    assert of_text(tmp_path, text) == ["w.yaml:7: it is nested deeper than 110 levels"]


def test_anchors_and_merged_keys_are_used(tmp_path: Path) -> None:
    """What stands in a map itself goes before what it takes over; of several, the first."""
    path = tmp_path / "w.yaml"
    path.write_text(
        "name: w\nstages:\n- &a {name: a, action: x, priority: 1}\n"
        "- {<<: [{priority: 2}, *a], name: b}\n- {name: c, action: x, <<: {action: y, priority: 3}}"
    )
    stages = load(path).plan.definition.stages
    assert [(each.name, each.action, each.priority) for each in stages] == [
        ("a", "x", 1),
        ("b", "x", 2),
        ("c", "x", 3),
    ]


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder.yaml", tmp_path / "pipe.yaml"
    folder.mkdir()
    os.mkfifo(pipe)
    assert said(folder) == ["folder.yaml: it is a folder, no file"]
    assert said(pipe) == ["pipe.yaml: it is a pipe or a device, no file"]
    assert said(tmp_path / "none.yaml") == ["none.yaml: it cannot be read: No such file or directory"]
    other = tmp_path / "w.yml"
    other.write_text("name: w")
    assert said(other) == ["w.yml: nothing finds it: call it w.yaml"]


INGEST = (ROOT / "config/workflows/ingest.yaml").read_text()
SIGNS = [*"{}[]:-'\"|~?#\\%@`", "{{", "}}", "{%", "&a ", "*a", "!!x ", "null", "1e999"]
SIGNS += ["\n", "  ", "\t", "\0", "- ", "<<: *a", "---\n", "always: true", "needs: [a]", "\U0001f3ac", ""]
EDITS = st.tuples(st.integers(0, len(INGEST)), st.integers(0, 9), st.sampled_from(SIGNS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EDITS, min_size=1, max_size=4))
def test_whatever_is_typed_is_a_definition_or_mistakes_with_lines(
    tmp_path: Path, edits: list[tuple[int, int, str]]
) -> None:
    text = INGEST
    for at, removed, put in edits:
        text = text[:at] + put + text[at + removed :]
    path = tmp_path / "ingest.yaml"
    path.write_text(text)
    found: list[Problem] = []
    try:
        plan = load(path).plan
    except DefinitionError as error:
        found = error.problems
    else:
        assert all(draw(plan) for draw in (drawing.text, drawing.mermaid, drawing.svg))
    assert all(problem.line for problem in found), found


# --- workflows within one another ------------------------------------------------------------------------


def within(folder: Path, stage: str, inner: str | None) -> list[str]:
    """What is said of a workflow with one stage, which starts another."""
    (folder / "w.yaml").write_text(f"name: w\nstages:\n- name: a\n  {stage}\n")
    if inner is not None:
        (folder / "inner.yaml").write_text(f"name: inner\n{inner}")
    with pytest.raises(DefinitionError) as caught:
        Library(folder).with_inner("w")
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


STAGES = "stages: [{name: b, action: x}]"


@pytest.mark.parametrize(
    ("stage", "inner", "lines"),
    [
        (
            "workflow: innner",
            STAGES,
            ["w.yaml:4: stage a.workflow: there is no workflow 'innner'; do you mean 'inner'?"],
        ),
        ("workflow: z", None, ["w.yaml:4: stage a.workflow: there is no workflow 'z'; there is: w"]),
        (
            "workflow: inner",
            "stages: []",
            [
                "w.yaml:4: stage a.workflow: the workflow 'inner' has mistakes of its own",
                "inner.yaml:2: stages: should not be empty",
            ],
        ),
        (
            "{workflow: inner, variables: {p: 1, q: null}}",
            f"required: [p, q, r]\n{STAGES}",
            ["w.yaml:4: stage a.workflow: the workflow 'inner' requires q, r: name it in variables"],
        ),
        (
            "workflow: w",
            None,
            ["w.yaml:4: stage a.workflow: a circle: w starts w; take one of them out"],
        ),
    ],
)
def test_what_is_wrong_with_a_workflow_within_is_told_where_it_is_named(
    tmp_path: Path, stage: str, inner: str | None, lines: list[str]
) -> None:
    if stage.startswith("{"):
        stage = "<<: " + stage
    assert within(tmp_path, stage, inner) == lines
