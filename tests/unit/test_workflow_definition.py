"""Definitions: what is wrong with one is told with its line; expressions see JSON and nothing else; pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # check-jsonschema brings it, without its types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from jef_daemon.workflow.definition import Definition, json_schema
from jef_daemon.workflow.expressions import FILTERS, TESTS, ExpressionError, expression, render, template
from jef_daemon.workflow.fitting import flaws
from jef_daemon.workflow.library import Library
from jef_daemon.workflow.loading import DefinitionError, load
from tests.support.process import ROOT

PAGE = (ROOT / "docs/workflows.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- example: definition -->\n```yaml\n(.*?)```", PAGE, re.DOTALL)
EXAMPLE = EXAMPLES[0]
NAMES: dict[str, Any] = {
    "workflow": {"a": 1, "s": "/x/y.mov", "l": [1, 2]},
    "job": {},
    "stages": {"p": {"result": "r"}},
}

SORCE = (
    "w.yaml:6: stage a.when: no variable 'sorce' is declared in variables or required; do you mean 'source'?"
)


def written(folder: Path, text: str, name: str = "w") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def said(path: Path) -> list[str]:
    with pytest.raises(DefinitionError) as caught:
        load(path)
    return [str(problem).removeprefix(f"{path.parent}/") for problem in caught.value.problems]


def test_the_examples_of_the_page_are_right(tmp_path: Path) -> None:
    (first,) = re.findall(r"hello.yaml <<'EOF'\n(.*?)EOF\n", PAGE, re.DOTALL)
    assert load(written(tmp_path, first, "hello")).plan.definition.required == ["who"]
    held = load(written(tmp_path, EXAMPLES[1], "replace")).plan.definition
    assert (held.locks[0].mode, held.lock_timeout) == ("EXCLUSIVE", 600)
    source = load(written(tmp_path, EXAMPLE, "ingest"))
    assert source.plan.needs["thumbnails"] == ("proxy", "sums")
    assert source.plan.needs["store"] == ("thumbnails",)
    assert Definition.model_validate_json(source.plan.definition.canonical()) == source.plan.definition


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stages: [{name: a, action: x}]", "w.yaml:1: name: required"),
        (
            "name: v\nstages: [{name: a, action: x}]",
            "w.yaml:1: name: the file is called 'w', the workflow 'v': name both alike",
        ),
        (
            "name: w\nstages:\n- name: a\n  action: x\n  onFail: fail",
            "w.yaml:5: stage a.onFail: there is no such key; do you mean 'onFailure'?",
        ),
        (
            "name: w\nstages:\n- {name: a, action: x}\n- name: b\n  action: x\n  needs: [c]",
            "w.yaml:6: stage b.needs.0: there is no stage 'c'; there is a, b",
        ),
        (
            "name: w\nstages:\n- {name: a, action: x, needs: b}\n- {name: b, action: x, needs: a}",
            "w.yaml:3: stage a.needs: a circle: a needs b needs a; take one of them out",
        ),
        (
            "name: w\nstages:\n- {name: a, action: x}\n- {name: a, action: x}",
            "w.yaml:4: stage a.name: there is a stage 'a' already; call one otherwise",
        ),
        (
            "name: w\nvariables: {source: 1}\nstages:\n- name: a\n  action: x\n  when:\n    workflow.sorce > 1",
            SORCE,
        ),
        (
            "name: w\nstages:\n- {name: a, action: x}\n- {name: b, needs: [], action: x, when: stages.a.result == 'y'}",
            "w.yaml:4: stage b.when: stage 'a' need not have ended by then; name it in needs",
        ),
        (
            "name: w\nstages:\n- name: a\n  action: x\n  onFailure: goto a",
            "w.yaml:5: stage a.onFailure: a stage cannot go on at itself; retry.attempts lets it have further jobs",
        ),
        (
            "name: w\nstages:\n- {name: a, action: x, when: '1 +'}",
            "w.yaml:3: stage a.when: {{ 1 + }}: it ends too early",
        ),
        (
            "name: w\nstages:\n- {name: a, action: x, onTimeout: retry}",
            "w.yaml:3: stage a: onTimeout: retry needs retry.attempts above 1",
        ),
        (
            "name: w\nvariables: {a: 1}\nlocks:\n- resource: 'asset/{{ job.a }}'\nstages: [{name: a, action: x}]",
            "w.yaml:4: locks.0.resource: there is no 'job'; expressions see workflow, workflowId",
        ),
        (
            (
                "name: w\nvariables: {asset: 1}\nlocks:\n- {resource: b}\n- resource: '{{ workflow.aset }}'\n"
                "stages: [{name: a, action: x}]"
            ),
            (
                "w.yaml:5: locks.1.resource: no variable 'aset' is declared in variables or required; "
                "do you mean 'asset'?"
            ),
        ),
        (
            (
                "name: w\nlocks:\n- {resource: r, mode: SHARED}\nstages:\n- name: a\n  action: x\n  locks:\n"
                "  - {resource: s}\n  - {resource: r}"
            ),
            (
                "w.yaml:9: stage a.locks.1: the workflow holds 'r' SHARED, the stage wants it EXCLUSIVE: "
                "let the workflow hold it EXCLUSIVE, or only the stage"
            ),
        ),
        (
            "name: w\nlocks:\n- {resource: r, mode: ALONE}\nstages: [{name: a, action: x}]",
            "w.yaml:3: locks.0.mode: should be 'SHARED' or 'EXCLUSIVE', not \"ALONE\"",
        ),
        (
            "name: w\nlockTimeout: 5\nstages: [{name: a, action: x}]",
            "w.yaml:1: lockTimeout is for locks; name some, or take it out",
        ),
        ("name: w\nstages:\n- {name: a}", "w.yaml:3: stage a: an action or a workflow, one of the two"),
        (
            "name: w\nname: w\nstages: []",
            "w.yaml:2: name: 'name' is there already, in line 1; take one of them out",
        ),
        ("name: w\nstages: [", "w.yaml:2: no YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_each_mistake_is_told_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    assert said(written(tmp_path, text)) == [line]


STAGE = "name: w\nstages:\n- {name: a, action: x}\n- "


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "{name: z, action: x, always: true, onFailure: goto a}",
            "stage z.onFailure: behind an always stage nothing follows: fail or continue",
        ),
        (
            "{name: b, action: x, onFailure: goto c}",
            "stage b.onFailure: there is no stage 'c'; there is a, b",
        ),
        (
            "{name: b, action: x, configuration: {k: '{{ stages.a.reslt }}'}}",
            "stage b.configuration.k: of a stage there is no 'reslt'; there is status, result, variables, error",
        ),
        (
            "{name: b, action: x, forEach: [1], when: item > 1}",
            "stage b.when: there is no 'item'; expressions see workflow, job, stages, workflowId",
        ),
        (
            "{name: b, action: x, configuration: {k: [.inf]}}",
            "stage b.configuration.k.0: .inf is no number of JSON; a text needs quotes",
        ),
        (
            "{name: b, workflow: v, variables: {k: " + "[" * 101 + "]" * 101 + "}}",
            "stage b.variables: it nests deeper than 100 levels",
        ),
        (
            "{name: b, action: x, forEach: [.nan]}",
            "stage b.forEach.0: .nan is no number of JSON; a text needs quotes",
        ),
        (
            "{name: b, action: x, when: outcome == 'FAILED'}",
            "stage b.when: there is no 'outcome'; expressions see workflow, job, stages, workflowId",
        ),
        (
            "{name: b, action: x, when: '{{ stages.a.result }} == {{ stages.a.status }}'}",
            (
                "stage b.when: stages.a.result }} == {{ stages.a.status: "
                "braces stand around the whole expression, or not at all"
            ),
        ),
        (
            "{name: b, action: x, when: 'true }} or'}",
            "stage b.when: true }} or: braces stand around the whole expression, or not at all",
        ),
        (
            "{name: z, action: x, always: true}\n- {name: b, action: x, needs: z}",
            "stage b.needs.0: 'z' is an always stage, which runs behind all others: nothing waits for it or reads it",
        ),
        (
            "{name: z, action: x, always: true, when: stages.z.result == 1}",
            "stage z.when: a stage does not see itself",
        ),
        (
            "{name: b, needs: [], action: x, onFailure: goto a}",
            "stage b.onFailure: 'a' does not come after 'b'; let it need 'b', or one that does",
        ),
        ("{name: b, action: x, variables: {k: 1}}", "stage b: variables is nothing that an action has"),
        ("{name: b, workflow: v, elsewhere: true}", "stage b: elsewhere is nothing that a workflow has"),
        ("{name: b, action: x, limit: 1}", "stage b: limit is for forEach"),
        ("{name: b, action: x, priority: true}", "stage b.priority: should be a whole number, not true"),
        ("{name: b, action: x, retry: {delay: true}}", "stage b.retry.delay: should be a number, not true"),
        (
            "{name: z, action: x, always: true, needs: a}",
            "stage z: needs is nothing that an always stage has: it runs when all others have ended",
        ),
    ],
)
def test_what_a_stage_cannot_be_is_told(tmp_path: Path, stage: str, said: str) -> None:
    path = written(tmp_path, STAGE + stage)
    with pytest.raises(DefinitionError) as caught:
        load(path)
    line = 4 + stage.count("\n")
    assert [str(problem) for problem in caught.value.problems] == [f"{path}:{line}: {said}"]


def test_what_cleans_up_may_look_at_every_stage(tmp_path: Path) -> None:
    always = "{name: z, action: x, always: true, configuration: {k: '{{ stages.a.status }}'}}"
    load(written(tmp_path, STAGE + always))


def test_a_date_is_a_text_and_a_file_has_a_limit(tmp_path: Path) -> None:
    source = load(written(tmp_path, STAGE + "{name: b, action: x, configuration: {k: 2026-01-02}}"))
    assert source.plan.definition.stages[1].configuration == {"k": "2026-01-02"}
    with pytest.raises(DefinitionError, match="bytes; 1048576 are allowed"):
        load(written(tmp_path, "#" * (1024 * 1024 + 1)))


def test_a_stage_may_want_less_than_its_workflow_holds(tmp_path: Path) -> None:
    """And the same resource named twice is held in the stronger mode."""
    stage = "{name: a, action: x, locks: [{resource: r}, {resource: r, mode: SHARED}]}"
    for locks in (
        "[{resource: r, mode: SHARED}, {resource: r}]",
        "[{resource: r}, {resource: r, mode: SHARED}]",
    ):
        load(written(tmp_path, f"name: w\nlocks: {locks}\nlockTimeout: 5\nstages: [{stage}]"))


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = "name: w\nstages:\n- {name: a, action: x, when: foo}\n- {name: b, action: x, needs: z}"
    assert len(said(written(tmp_path, text))) == 2


def test_a_word_that_older_yaml_takes_for_a_boolean_is_a_text(tmp_path: Path) -> None:
    source = load(written(tmp_path, "name: w\nstages: [{name: a, action: x, configuration: {k: no}}]"))
    assert source.plan.definition.stages[0].configuration == {"k": "no"}


def test_workflows_that_start_one_another_in_a_circle_are_refused(tmp_path: Path) -> None:
    for one, other in (("w", "v"), ("v", "w")):
        written(tmp_path, f"name: {one}\nstages: [{{name: a, workflow: {other}}}]", one)
    with pytest.raises(DefinitionError, match="a circle: w starts v starts w"):
        Library(tmp_path).with_inner("w")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    library = Library(tmp_path)
    written(tmp_path, "name: w\nstages: [{name: a, action: x}]")
    first = library.get("w").plan.definition.revision
    assert library.get("w") is library.get("w")
    written(tmp_path, "name: w\nstages: [{name: a, action: other}]")
    assert library.get("w").plan.definition.revision != first


@pytest.mark.parametrize("name", ["../w", "w/../w", "", "nobody", "w\n"])
def test_a_name_that_is_none_opens_no_file(tmp_path: Path, name: str) -> None:
    written(tmp_path, "name: w\nstages: [{name: a, action: x}]")
    (tmp_path / "inner").mkdir()
    with pytest.raises(DefinitionError, match="there is no workflow"):
        Library(tmp_path / "inner" if ".." in name else tmp_path).get(name)


# --- expressions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ workflow.a }}", 1),
        (" {{ workflow.a + 1.5 }} ", 2.5),
        ("{{ workflow.a }}{{ workflow.a }}", "11"),
        ("n{{ workflow.l }}", "n[1,2]"),
        ("{{ workflow.l }}", [1, 2]),
        ("{{ workflow.s | stem }}{{ workflow.s | suffix }}", "y.mov"),
        ("{{ workflow.nope | default('d') }}", "d"),
        ("{{ workflow['a'] == 1 and stages.p.result in ['r'] }}", True),
        ("{{ 'yes' if workflow.zz is defined else 'no' }}", "no"),
        ("{{ {'k': [workflow.a, none, true]} }}", {"k": [1, None, True]}),
        ("{{ workflow.l | unique }}", [1, 2]),
        ("{{ [workflow.l | unique, {'k': workflow.l | unique}] }}", [[1, 2], {"k": [1, 2]}]),
        ("plain", "plain"),
    ],
)
def test_an_expression_has_the_value_of_its_kind(text: str, value: Any) -> None:
    assert render({"x": [text]}, NAMES) == {"x": [value]}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{{ workflow.items() }}",
            "{% set x = 1 %}",
            "{% for i in workflow.l %}x{% endfor %}",
            "{{ 2 ** 9 }}",
        ),
        *(
            "{{ range(3) }}",
            "{{ workflow | attr('keys') }}",
            "{{ '%s' | format(1) }}",
            "{{ lipsum() }}",
            "{{ x",
            "{{ }}",
            "{{ x is callable }}",
            "{{ 1e999 }}",
            "{{ [-1e999] }}!",
            "{{ " + "9" * 4301 + " }}",
            "{{ 0x" + "f" * 4000 + " }}",
            "{{ '\\ud800' }}",
            "{{ ['\\ud800'] }}!",
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        ),
    ],
)
def test_what_is_no_expression_is_refused_before_it_runs(text: str) -> None:
    with pytest.raises(ExpressionError):
        template(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ workflow.nope }}", "workflow.nope: there is no 'nope'; there is: a, l, s"),
        ("{{ ''.__class__ }}", "''.__class__: a text has no '__class__'"),
        ("{{ workflow.__class__ }}", "there is no '__class__'"),
        ("{{ workflow.l.__len__ }}", "a list has no '__len__'"),
        ("{{ workflow.s * 1000000000 }}", "* is for numbers, not a text and a number"),
        ("{{ '%9999999999d' % 1 }}", "% is for numbers"),
        ("{{ workflow.s | replace('', workflow.big) | replace('', workflow.big) }}", "1048576 are allowed"),
        ("{{ workflow.a / 0 }}", "ZeroDivisionError"),
        ("{{ workflow.l[7] }}", "there is no number 7 in a list of 2"),
        ("{{ workflow.a < 'x' }}", "TypeError"),
        ("{{ workflow.l[true] }}", "a list has no True"),
        ("{{ workflow.big ~ workflow.big ~ workflow.big }}", "1048576 are allowed"),
        ("{{ workflow.many | join(workflow.big) }}", "1048576 are allowed"),
        ("{{ range }}", "'range' is undefined"),
        ("{{ [1, workflow.nope] }}", "[1, workflow.nope]: there is no 'nope'; there is: a, l, s"),
        ("{{ {'k': [workflow.l[7]]} }}", "there is no number 7 in a list of 2"),
        ("{{ 'inf' | float }}", "'inf' | float: a number is too large, or none at all"),
        ("{{ ['nan' | float] }}", "a number is too large, or none at all"),
        ("{{ 1e308 * 10 }}", "1e308 * 10: a number is too large, or none at all"),
        (
            "{{ 1" + "0" * 2200 + " * 1" + "0" * 2200 + " }}",
            "a number is too large: it has more than 4300 digits",
        ),
        ("{{ {1: 2} }}", "an object's keys are texts, not a number"),
        ("{{ {none: 2} }}", "an object's keys are texts, not null"),
    ],
)
def test_an_expression_without_a_value_says_why(text: str, words: str) -> None:
    names = (
        {**NAMES, "workflow": {**NAMES["workflow"], "big": "x" * 400_000, "many": [1, 2, 3, 4]}}
        if "big" in text
        else NAMES
    )
    with pytest.raises(ExpressionError) as caught:
        template(text).value(names)
    assert words in str(caught.value)


WORDS = {
    "i": 3,
    "z": 0,
    "big": 10**400,
    "huge": 10**4299,
    "h": 1e308,
    "s": "text",
    "inf": "inf",
    "e": "",
    "t": True,
    "n": None,
    "l": [3, 1, 2],
    "m": [1, "a", None],
    "o": {"a": 1, "b": [1, 2]},
    "lo": [{"a": 1}, {}],
    "el": [],
}
LEAVES = [f"workflow.{name}" for name in WORDS]
LEAVES += [
    "1",
    "-1.5",
    "'nan'",
    "'a'",
    "[]",
    "{}",
    "none",
    "true",
    "1e308",
    "nobody",
    "workflow.nope",
    "workflow.l[9]",
]
BEHIND = [
    *("", "(1)", "('a')", "(attribute='a')", "(2, 'ceil')", "(none)", "(true)", "(1, 2, 3)", "(workflow.h)")
]
OPERATORS = [*("+", "-", "*", "/", "//", "%", "~", "==", "<", ">=", "in", "not in", "and", "or")]
filtered = st.tuples(st.sampled_from(FILTERS), st.sampled_from(BEHIND)).map("".join)
tested = st.tuples(st.sampled_from(TESTS), st.sampled_from(["", " 2", " workflow.l"])).map("".join)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.just("|"), filtered).map(" ".join),
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(" ".join),
        st.tuples(inner, st.just("is"), tested).map(" ".join),
        st.tuples(inner, st.just("if"), inner, st.just("else"), inner).map(" ".join),
        st.tuples(inner, inner).map(", ".join).map("[{}]".format),
        inner.map("{{'k': {}}}".format),
    ).map("({})".format)


@given(st.recursive(st.sampled_from(LEAVES), larger, max_leaves=6), st.booleans())
def test_whatever_an_expression_is_it_gives_json_or_says_why_not(source: str, is_text: bool) -> None:
    """It is evaluated where workflows are kept: what it raised there, or left there, would stop all of them."""
    try:
        made = template(f"x {{{{ {source} }}}}") if is_text else expression(source)
        found = made.value({"workflow": WORDS})
    except ExpressionError:
        return
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_nests_deeper_than_may_be_is_no_value() -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    assert expression("workflow").value({"workflow": value}) == value
    with pytest.raises(ExpressionError, match="workflow: it nests deeper than 100 levels"):
        expression("workflow").value({"workflow": [value]})


def test_what_a_value_holds_is_never_evaluated() -> None:
    assert render("{{ workflow.x }}!", {"workflow": {"x": "{{ 1 + 1 }}"}}) == "{{ 1 + 1 }}!"


def test_an_expression_tells_what_it_reads() -> None:
    found = expression("stages.p.result ~ workflow['a'] ~ job").reads
    assert {("stages", "p", "result"), ("workflow", "a"), ("job",)} <= found


# --- actions ---------------------------------------------------------------------------------------------


class Model(BaseModel):
    path: str
    size: int = 1


def test_a_configuration_is_held_against_the_actions_model() -> None:
    """As far as it is certain before a workflow runs."""
    stages = [
        {"name": "a", "action": "x", "configuration": {"path": "{{ job.p }}", "size": "{{ job.s }}"}},
        {"name": "b", "action": "x", "configuration": {"size": "big"}},
        {"name": "c", "action": "y"},
        {"name": "d", "action": "z", "elsewhere": True},
        {"name": "e", "action": "broken"},
    ]
    found = flaws(
        Definition.model_validate({"name": "w", "stages": stages}), {"x": Model}, {"broken": "no module"}
    )
    told = {(*flaw.where[1:],): flaw.said for flaw in found}
    assert set(told) == {
        *((1, "configuration", "path"), (1, "configuration", "size")),
        *((2, "action"), (4, "action")),
    }
    assert told[(1, "configuration", "path")] == "the action needs it"
    assert "elsewhere: true" in told[(2, "action")]
    assert told[(4, "action")] == "no module"


def test_what_an_expression_will_make_is_not_held_against_a_choice_of_kinds() -> None:
    """The model tells of each kind that it is not; nobody knows yet."""

    class Model(BaseModel):
        size: int | list[int]

    told = "the action refuses it: should be a whole number or a list, not"
    for value, refused in (("{{ workflow.n }}", []), ("large", [f'{told} "large"'])):
        stage = {"name": "a", "action": "x", "configuration": {"size": value}}
        definition = Definition.model_validate({"name": "w", "stages": [stage]})
        assert [flaw.said for flaw in flaws(definition, {"x": Model}, {})] == refused


def test_a_key_that_an_action_does_not_know_names_the_nearest() -> None:
    class Model(BaseModel):
        model_config = ConfigDict(extra="forbid")
        path: str = ""

    stage = {"name": "a", "action": "x", "configuration": {"pathh": "x"}}
    definition = Definition.model_validate({"name": "w", "stages": [stage]})
    said = "the action refuses it: there is no such key; do you mean 'path'?"
    assert [flaw.said for flaw in flaws(definition, {"x": Model}, {})] == [said]


# --- schema ----------------------------------------------------------------------------------------------


def test_the_schema_takes_the_examples_and_refuses_mistakes() -> None:
    """As an editor holds them against it; what an editor can know of them is refused."""
    schema = jsonschema.Draft202012Validator(json.loads(json.dumps(json_schema())))
    yaml = YAML(typ="safe", pure=True)
    for example in (*EXAMPLES, (ROOT / "config/workflows/ingest.yaml").read_text()):
        schema.validate(yaml.load(example))
    stage = "{name: a, action: x"
    wrong = {
        "stages: [" + stage + "}]": "'name' is a required property",
        "name: w\nstages: []": "[] should be non-empty",
        "name: w\nstages: [" + stage + ", onFail: fail}]": "'onFail' was unexpected",
        "name: w\nstages: [" + stage + ", onFailure: stop}]": "'stop' does not match",
        "name: w\nlocks: [{mode: SHARED}]\nstages: [" + stage + "}]": "'resource' is a required property",
        "name: w\nlocks: [{resource: r, mode: X}]\nstages: [" + stage + "}]": "'X' is not one of",
        "name: w\nlockTimeout: 0\nstages: [" + stage + "}]": "0 is not valid",
        "name: w\nstages: [" + stage + ", timeouts: {updte: 1}}]": "'updte' was unexpected",
        "name: w\nstages: [" + stage + ", workflow: v}]": "is valid under each of",
        "name: w\nstages: [{name: a}]": "is not valid under any of the given schemas",
    }
    for text, said in wrong.items():
        errors = list(schema.iter_errors(yaml.load(text)))
        assert [said for error in errors if said in error.message] == [said], (text, errors)
    schema.validate(yaml.load("name: w\nstages: [" + stage + ", needs: b}]"))
