"""Pictures of definitions: everything is in them, no arrow runs behind a box, no text over its edge."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.workflow import drawing
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.layout import layout
from jef_daemon.workflow.plan import Plan, plan
from tests.unit.test_workflow_definition import EXAMPLES

SVG = "{http://www.w3.org/2000/svg}"
HELD = [{"resource": 'asset/{{ workflow.a }}"<b>#1'}]


def planned(*stages: dict[str, object], **more: object) -> Plan:
    whole = [{"action": "x", **stage} for stage in stages]
    return plan(Definition.model_validate({"name": "w", "stages": whole, "variables": {"a": 1}, **more}))


def example(text: str) -> Plan:
    from ruamel.yaml import YAML

    return plan(Definition.model_validate(YAML(typ="safe", pure=True).load(text)))


def test_lines_tell_every_stage_and_its_terms() -> None:
    found = drawing.text(example(EXAMPLES[0])).splitlines()
    assert found[1:] == [
        "  probe       probe      at once",
        "  proxy       transcode  after probe  [2 attempts]",
        "  sums        checksum   after probe",
        "  thumbnails  thumbnail  after proxy, sums  [forEach, 2 at once; when workflow.duration > 1]",
        "  store       copy       after thumbnails  [locks asset/{{ workflow.asset }} EXCLUSIVE]",
        "  clean       clean      at the end",
    ]
    held = drawing.text(example(EXAMPLES[1])).splitlines()
    assert held[1] == "  holds asset/{{ workflow.asset }} EXCLUSIVE, from its beginning to its end"


def test_what_an_end_does_is_told_and_a_condition_of_two_lines_is_one() -> None:
    found = drawing.text(
        planned(
            {"name": "a", "onFailure": "goto c", "when": "workflow.a\n  == 1\n", "elsewhere": True},
            {"name": "b", "onFailure": "continue", "retry": {"attempts": 3}, "onTimeout": "retry"},
            {"name": "c"},
        )
    ).splitlines()
    assert found[1:] == [
        "  a  x (elsewhere)  at once  [when workflow.a == 1; on failure: goto c]",
        "  b  x              after a  [3 attempts; on timeout: retry; on failure: continue]",
        "  c  x              after b",
    ]


def test_mermaid_reads_nothing_in_a_text() -> None:
    """Its own signs, and HTML's, are written as it wants them; looked at in a browser."""
    lines = drawing.mermaid(
        planned(
            {"name": "end", "when": "workflow.a <1 and '`#' != \"&\"", "onFailure": "goto last"},
            {"name": "b"},
            {"name": "last"},
            {"name": "z", "always": True},
            locks=HELD,
        )
    ).splitlines()
    held = "holds asset/{{ workflow.a }}#quot;#lt;b#gt;#35;1 EXCLUSIVE, from its beginning to its end"
    when = "when workflow.a #lt;1 and '#96;#35;' != #quot;#amp;#quot;; on failure: goto last"
    assert lines == [
        "flowchart TD",
        f'  subgraph held["{held}"]',
        "  direction TB",
        f'  s_end["end<br/>x<br/>{when}"]',
        '  s_b["b<br/>x"]',
        '  s_last["last<br/>x"]',
        '  s_z(["z<br/>x"])',
        "  end",
        "  s_end --> s_b",
        "  s_b --> s_last",
        "  s_last --> s_z",
        "  s_end -. failed .-> s_last",
    ]


def test_a_picture_has_all_stages_arrows_and_locks() -> None:
    name = "a_name_as_long_as_the_name_of_a_stage_is"
    found = planned(
        {"name": "a", "onFailure": f"goto {name}"},
        {"name": "b", "description": "<says> & does", "when": "workflow.a < " + " + ".join(["1"] * 50)},
        {"name": name, "needs": ["a", "b"]},
        {"name": "z", "always": True},
        locks=HELD,
    )
    picture = ElementTree.fromstring(drawing.svg(found))
    boxes = picture.findall(f".//{SVG}g/{SVG}rect")
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == len(boxes) == 4
    ways = picture.findall(f".//{SVG}g/{SVG}path")
    assert [way.get("class") for way in ways] == [None, None, None, None, "goto"]
    assert len({way.get("d") for way in ways}) == 5
    words = [text.text or "" for text in picture.iter(f"{SVG}text")]
    assert 'holds asset/{{ workflow.a }}"<b>#1 EXCLUSIVE, from its beginning to its end' in words
    width = int(boxes[0].get("width") or 0)
    small = [text.text or "" for text in picture.findall(f".//{SVG}text[@class='s']")]
    assert max(map(len, small)) * 6.8 < width
    assert any(word.endswith("…") for word in small)
    assert len(name) * 8 < width
    titles = [title.text or "" for title in picture.findall(f".//{SVG}g/{SVG}title")]
    assert titles[1].startswith("<says> & does: x; when workflow.a < 1 + 1")


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    stages: list[dict[str, object]] = []
    for number in range(draw(st.integers(1, 9))):
        before = [str(stage["name"]) for stage in stages]
        needs = draw(st.lists(st.sampled_from(before), unique=True, max_size=4)) if before else []
        stages.append({"name": f"s{number}", "needs": needs})
    made = planned(*stages, *({"name": f"z{n}", "always": True} for n in range(draw(st.integers(0, 2)))))
    jumps = [(one, other) for one, after in made.after.items() for other in sorted(after)]
    for one, other in draw(st.lists(st.sampled_from(jumps), max_size=3)) if jumps else ():
        next(stage for stage in stages if stage["name"] == one)["onFailure"] = f"goto {other}"
    return planned(*stages, *({"name": name, "always": True} for name in made.stages if name.startswith("z")))


@given(graphs())
def test_no_arrow_runs_behind_a_box_or_over_another(found: Plan) -> None:
    width, height = 190, 70
    drawn = layout(found, (width, height))
    assert set(drawn.places) == set(found.stages)
    corners = list(drawn.places.values())
    for number, (x, y) in enumerate(corners):
        assert 0 <= x <= drawn.width - width
        assert 0 <= y <= drawn.height - height
        assert all(y != other_y or abs(x - other_x) > width for other_x, other_y in corners[:number])
    ends = []
    for arrow, points in drawn.routes:
        ends += [(arrow.start, points[0]), (arrow.end, points[-1])]
        for (from_x, from_y), (x, y) in zip(points[1::2], points[2::2], strict=False):
            assert from_x == x
            assert y - from_y == height
            assert not any(top == from_y and left <= x <= left + width for left, top in corners)
        for (_, from_y), (_, y) in zip(points[::2], points[1::2], strict=False):
            assert 0 < y - from_y < height  # between two rows
    assert len(ends) == len(set(ends))


def test_what_nobody_could_follow_is_drawn_all_the_same() -> None:
    """Each of two hundred stages needs all before it: what others imply is left out."""
    stages: list[dict[str, object]] = [
        {"name": f"s{n}", "needs": [f"s{m}" for m in range(n)]} for n in range(200)
    ]
    drawn = drawing.svg(planned(*stages))
    assert len(re.findall("<path d", drawn)) == 199 + 2  # and two arrow heads
