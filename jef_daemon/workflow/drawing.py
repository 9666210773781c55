"""A workflow as a picture: text, Mermaid, SVG. Pure, and without programs of others."""

from __future__ import annotations

import itertools
from html import escape

from jef_daemon.workflow.definition import Stage
from jef_daemon.workflow.layout import Arrow, Point, edges, gotos, layout, ordered
from jef_daemon.workflow.plan import Plan

_LEAST_WIDTH, _MOST_SAID, _PAD, _LINE = 190, 260, 10, 18
_CHARACTER, _SMALL = 8.0, 6.8
"""Width of a character, 13 and 11 pixels high, of a broad font: which one is there, only who looks knows."""
_BEND = 26
_STYLE = (
    "text{font:13px sans-serif;text-anchor:middle}.s{font-size:11px;fill:#555}.c{text-anchor:start}"
    ".back{fill:#fff}g rect{fill:#eef4fb;stroke:#3b6ea5;rx:6}.always rect{fill:#f6f1e7;stroke:#9a7b3c}"
    "path{fill:none;stroke:#555;marker-end:url(#a)}"
    ".goto{stroke:#b3372f;stroke-dasharray:5 4;marker-end:url(#f)}"
)

_HEAD = (
    '<marker id="{}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill:{};stroke:none;marker-end:none"/></marker>'
)
_ARROWS = f"<defs>{_HEAD.format('a', '#555')}{_HEAD.format('f', '#b3372f')}</defs>"
_MERMAID = str.maketrans({"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"})


def text(plan: Plan) -> str:
    """Lines for a terminal: a stage each, in an order in which they may run."""
    width = max(len(name) for name in plan.stages)
    kinds = max(len(_what(stage)) for stage in plan.stages.values())
    lines = [f"{plan.definition.name} ({plan.definition.revision})", *(f"  {held}" for held in _held(plan))]
    for stage in ordered(plan):
        needs = plan.needs[stage.name]
        behind = "at the end" if stage.always else f"after {', '.join(needs)}" if needs else "at once"
        terms = _terms(stage)
        said = f"  [{terms}]" if terms else ""
        lines.append(f"  {stage.name:<{width}}  {_what(stage):<{kinds}}  {behind}{said}")
    return "\n".join(lines) + "\n"


def mermaid(plan: Plan) -> str:
    """A Mermaid flowchart, which GitHub and many editors draw."""
    lines = ["flowchart TD"]
    held = "<br/>".join(each.translate(_MERMAID) for each in _held(plan))
    if held:
        lines += [f'  subgraph held["{held}"]', "  direction TB"]
    for stage in plan.stages.values():
        rows = [stage.name, _what(stage), *([_terms(stage)] if _terms(stage) else [])]
        label = "<br/>".join(row.translate(_MERMAID) for row in rows)
        opening, closing = ('(["', '"])') if stage.always else ('["', '"]')
        lines.append(f"  {_node(stage.name)}{opening}{label}{closing}")
    if held:
        lines.append("  end")
    lines += [f"  {_node(each.start)} --> {_node(each.end)}" for each in edges(plan)]
    lines += [f"  {_node(each.start)} -. failed .-> {_node(each.end)}" for each in gotos(plan)]
    return "\n".join(lines) + "\n"


def svg(plan: Plan) -> str:
    """A picture of its own: stages in rows, each below all that it needs."""
    box = _size(plan)
    found = layout(plan, box)
    captions = [f"{plan.definition.name} ({plan.definition.revision})", *_held(plan)]
    top = len(captions) * _LINE + _PAD
    width = max(found.width, int(max(map(len, captions)) * _CHARACTER) + 2 * _PAD)
    height, moved = found.height + top, (width - found.width) // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>{escape(plan.definition.name)}</title><style>{_STYLE}</style>{_ARROWS}",
        f'<rect class="back" width="{width}" height="{height}"/>',
    ]
    parts += [
        f'<text class="c" x="{_PAD}" y="{number * _LINE + _LINE}">{escape(said)}</text>'
        for number, said in enumerate(captions)
    ]
    parts.append(f'<g transform="translate({moved} {top})">')
    parts += [_path(arrow, points) for arrow, points in found.routes]
    parts += [_box(plan.stages[name], place, box) for name, place in found.places.items()]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def _size(plan: Plan) -> Point:
    """Of each box: wide enough for every name, and for what is said of most stages."""
    stages = plan.stages.values()
    name = max(len(stage.name) for stage in stages) * _CHARACTER
    said = max(len(words) for stage in stages for words in (_what(stage), _terms(stage))) * _SMALL
    width = max(_LEAST_WIDTH, int(max(name, min(said, _MOST_SAID))) + 2 * _PAD)
    return width, (3 if any(map(_terms, stages)) else 2) * _LINE + 16


def _box(stage: Stage, place: Point, box: Point) -> str:
    (x, y), terms = place, _terms(stage)
    middle, group = x + box[0] // 2, ' class="always"' if stage.always else ""
    rows = [("", stage.name), ("s", _what(stage)), *([("s", terms)] if terms else [])]
    first = y + (box[1] - len(rows) * _LINE) // 2 + 13
    told = "".join(
        f'<text class="{kind}" x="{middle}" y="{first + number * _LINE}">{escape(_cut(said, kind, box[0]))}</text>'
        for number, (kind, said) in enumerate(rows)
    )
    title = f"{stage.description or stage.name}: {_what(stage)}{'; ' if terms else ''}{terms}"
    rectangle = f'<rect x="{x}" y="{y}" width="{box[0]}" height="{box[1]}"/>'
    return f"<g{group}><title>{escape(title)}</title>{rectangle}{told}</g>"


def _cut(said: str, kind: str, width: int) -> str:
    most = int((width - _PAD) / (_SMALL if kind else _CHARACTER))
    return said if len(said) <= most else f"{said[: most - 1]}…"


def _path(arrow: Arrow, points: list[Point]) -> str:
    way = f"M{points[0][0]} {points[0][1]}"
    for number, ((from_x, from_y), (x, y)) in enumerate(itertools.pairwise(points)):
        is_past_a_row = number % 2
        way += f"V{y}" if is_past_a_row else f"C{from_x} {from_y + _BEND} {x} {y - _BEND} {x} {y}"
    group = ' class="goto"' if arrow.is_goto else ""
    return f'<path{group} d="{way}"/>'


def _held(plan: Plan) -> list[str]:
    return [
        f"holds {_line(lock.resource)} {lock.mode}, from its beginning to its end"
        for lock in plan.definition.locks
    ]


def _what(stage: Stage) -> str:
    return f"{stage.action or f'workflow {stage.workflow}'}{' (elsewhere)' if stage.elsewhere else ''}"


def _terms(stage: Stage) -> str:
    terms = []
    if stage.for_each is not None:
        terms.append("forEach" if stage.limit is None else f"forEach, {stage.limit} at once")
    if stage.when is not True:
        terms.append(f"when {_line(str(stage.when))}")
    if stage.locks:
        terms.append("locks " + ", ".join(f"{_line(lock.resource)} {lock.mode}" for lock in stage.locks))
    if stage.retry.attempts > 1:
        terms.append(f"{stage.retry.attempts} attempts")
    if stage.on_timeout != "wait":
        terms.append(f"on timeout: {stage.on_timeout}")
    if stage.on_failure != "fail":
        terms.append(f"on failure: {stage.on_failure}")
    return "; ".join(terms)


def _line(text: str) -> str:
    """A text of several lines in one."""
    return " ".join(text.split())


def _node(name: str) -> str:
    return f"s_{name}"  # `end` is a word of Mermaid's
