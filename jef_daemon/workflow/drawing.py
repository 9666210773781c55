"""A workflow as a picture: text, Mermaid, SVG. Pure, and without programs of others."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from jef_daemon.workflow.definition import Stage
from jef_daemon.workflow.plan import Plan

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _EDGE = 190, 54, 40, 44, 20
_STYLE = (
    "text{font:13px sans-serif;text-anchor:middle}.s{font-size:11px;fill:#555}"
    "rect{fill:#eef4fb;stroke:#3b6ea5;rx:6}.always rect{fill:#f6f1e7;stroke:#9a7b3c}"
    "path{fill:none;stroke:#555;marker-end:url(#a)}.goto{stroke:#b3372f;stroke-dasharray:5 4}"
)

_ARROW = (
    '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill:#555;stroke:none;marker-end:none"/></marker></defs>'
)


def text(plan: Plan) -> str:
    """Lines for a terminal: a stage each, in an order in which they may run."""
    width = max(len(name) for name in plan.stages)
    lines = [f"{plan.definition.name} ({plan.definition.revision})"]
    lines += [
        f"  holds {lock.resource} {lock.mode}, from its beginning to its end"
        for lock in plan.definition.locks
    ]
    for stage in _ordered(plan):
        needs = plan.needs[stage.name]
        behind = "at the end" if stage.always else f"after {', '.join(needs)}" if needs else "at once"
        lines.append(f"  {stage.name:<{width}}  {_what(stage)}  {behind}{_terms(stage)}")
    return "\n".join(lines) + "\n"


def mermaid(plan: Plan) -> str:
    """A Mermaid flowchart, which GitHub and many editors draw."""
    lines = ["flowchart TD"]
    for stage in plan.stages.values():
        label = f"{stage.name}<br/>{_what(stage)}{_terms(stage)}".replace('"', "#quot;")
        opening, closing = ('(["', '"])') if stage.always else ('["', '"]')
        lines.append(f"  {_node(stage.name)}{opening}{label}{closing}")
    lines += [f"  {_node(one)} --> {_node(other)}" for one, other in _edges(plan)]
    lines += [f"  {_node(one)} -. failed .-> {_node(other)}" for one, other in _gotos(plan)]
    return "\n".join(lines) + "\n"


def svg(plan: Plan) -> str:
    """A picture of its own: stages in rows, each below all that it needs."""
    rows = _rows(plan)
    places = {
        name: (_EDGE + column * (_BOX_WIDTH + _GAP_X), _EDGE + row * (_BOX_HEIGHT + _GAP_Y))
        for row, names in enumerate(rows)
        for column, name in enumerate(names)
    }
    width = 2 * _EDGE + max(map(len, rows)) * (_BOX_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _EDGE + len(rows) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>{escape(plan.definition.name)}</title><style>{_STYLE}</style>",
        _ARROW,
    ]
    parts += [_line(places[one], places[other], "") for one, other in _edges(plan)]
    parts += [_line(places[one], places[other], ' class="goto"') for one, other in _gotos(plan)]
    parts += [_box(plan.stages[name], *place) for name, place in places.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(stage: Stage, x: int, y: int) -> str:
    middle = x + _BOX_WIDTH // 2
    group = ' class="always"' if stage.always else ""
    terms = _terms(stage).strip()
    told = f"{_what(stage)} {terms}"
    told = told if len(told) <= 34 else told[:33] + "…"
    return (
        f"<g{group}><title>{escape(stage.description or stage.name)} {escape(terms)}</title>"
        f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}"/>'
        f'<text x="{middle}" y="{y + 23}">{escape(stage.name)}</text>'
        f'<text class="s" x="{middle}" y="{y + 41}">{escape(told)}</text></g>'
    )


def _line(one: tuple[int, int], other: tuple[int, int], group: str) -> str:
    from_x, from_y = one[0] + _BOX_WIDTH // 2, one[1] + _BOX_HEIGHT
    to_x, to_y = other[0] + _BOX_WIDTH // 2, other[1]
    bend = _GAP_Y // 2 + 4
    return (
        f'<path{group} d="M{from_x} {from_y}C{from_x} {from_y + bend} {to_x} {to_y - bend} {to_x} {to_y}"/>'
    )


def _what(stage: Stage) -> str:
    return stage.action or f"workflow {stage.workflow}"


def _terms(stage: Stage) -> str:
    terms = []
    if stage.for_each is not None:
        terms.append("forEach" if stage.limit is None else f"forEach, {stage.limit} at once")
    if stage.when is not True:
        terms.append(f"when {stage.when}")
    if stage.locks:
        terms.append("locks " + ", ".join(f"{lock.resource} {lock.mode}" for lock in stage.locks))
    return f"  [{'; '.join(terms)}]" if terms else ""


def _edges(plan: Plan) -> Iterator[tuple[str, str]]:
    for name, needs in plan.needs.items():
        yield from ((need, name) for need in needs)
    ends = [stage.name for stage in plan.ordinary if not plan.after[stage.name]]
    for last in plan.last:
        yield from ((end, last.name) for end in ends)
        ends = [last.name]


def _gotos(plan: Plan) -> Iterator[tuple[str, str]]:
    return ((stage.name, stage.goto) for stage in plan.stages.values() if stage.goto)


def _rows(plan: Plan) -> list[list[str]]:
    """Each stage in the first row below all that it needs."""
    row: dict[str, int] = {}
    for stage in _ordered(plan):
        above = [one for one, other in _edges(plan) if other == stage.name]
        row[stage.name] = 1 + max((row[name] for name in above), default=-1)
    return [[name for name in row if row[name] == number] for number in range(max(row.values()) + 1)]


def _ordered(plan: Plan) -> Iterator[Stage]:
    """In the order of the file, but behind what they need."""
    done: set[str] = set()
    waiting = [*plan.ordinary]
    while waiting:
        for stage in list(waiting):
            if done.issuperset(plan.needs[stage.name]):
                waiting.remove(stage)
                done.add(stage.name)
                yield stage
    yield from plan.last


def _node(name: str) -> str:
    return f"s_{name}"  # `end` is a word of Mermaid's
