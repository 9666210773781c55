"""Where a picture of a workflow has its stages and arrows: rows from above to below, and no arrow behind a box. Pure.

Each stage is in the first row below all that it needs. An arrow that passes rows has a lane of its own in each of them,
and what stands in a row is ordered by what it hangs on, so that few arrows cross.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jef_daemon.workflow.definition import Stage
from jef_daemon.workflow.plan import Plan

GAP_X, GAP_Y, EDGE = 36, 44, 20
_LANE = 10
_SWEEPS = 4
_MOST_LANES = 1000
"""With more, arrows that others imply are left out: nobody could follow them."""

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Arrow:
    """From a stage to one behind it."""

    start: str
    end: str
    is_goto: bool = False


@dataclass(frozen=True, slots=True)
class Lane:
    """Where an arrow passes a row."""

    arrow: Arrow
    row: int


Item = str | Lane


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is."""

    places: dict[str, Point]
    """Of each stage's box: its corner above on the left."""
    routes: list[tuple[Arrow, list[Point]]]
    """Of each arrow: an even number of points; from the second on, each pair is a straight way past a row."""
    width: int
    height: int


def layout(plan: Plan, box: Point) -> Layout:
    """Find a place for everything; `box` is how wide and high a stage is."""
    row = _row_numbers(plan)
    ways = _ways(plan, row)
    rows = _ordered_rows(row, ways.values())
    width = max(_width(items, box[0]) for items in rows)
    corners: dict[Item, Point] = {}
    for number, items in enumerate(rows):
        x = EDGE + (width - _width(items, box[0])) // 2
        for item in items:
            corners[item] = (x, EDGE + number * (box[1] + GAP_Y))
            x += _item_width(item, box[0]) + GAP_X
    places = {item: corner for item, corner in corners.items() if isinstance(item, str)}
    height = len(rows) * (box[1] + GAP_Y) - GAP_Y
    return Layout(places, list(_routes(ways, corners, box)), width + 2 * EDGE, height + 2 * EDGE)


def edges(plan: Plan) -> Iterator[Arrow]:
    """Who waits for whom; the `always` stages for all others, then for one another."""
    for name, needs in plan.needs.items():
        yield from (Arrow(need, name) for need in dict.fromkeys(needs))
    ends = [stage.name for stage in plan.ordinary if not plan.after[stage.name]]
    for last in plan.last:
        yield from (Arrow(end, last.name) for end in ends)
        ends = [last.name]


def gotos(plan: Plan) -> Iterator[Arrow]:
    """Where failures go on."""
    return (Arrow(stage.name, stage.goto, True) for stage in plan.stages.values() if stage.goto)


def ordered(plan: Plan) -> Iterator[Stage]:
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


def _ways(plan: Plan, row: Mapping[str, int]) -> dict[Arrow, list[Item]]:
    """What each arrow passes, from where it starts to where it ends."""
    arrows = [*edges(plan), *gotos(plan)]
    if sum(row[arrow.end] - row[arrow.start] - 1 for arrow in arrows) > _MOST_LANES:
        arrows = [arrow for arrow in arrows if arrow.is_goto or not _is_implied(plan, arrow)]
    return {
        arrow: [
            arrow.start,
            *(Lane(arrow, number) for number in range(row[arrow.start] + 1, row[arrow.end])),
            arrow.end,
        ]
        for arrow in arrows
    }


def _is_implied(plan: Plan, arrow: Arrow) -> bool:
    """Whether another arrow to the same stage comes from behind this one's beginning."""
    return any(need in plan.after[arrow.start] for need in plan.needs[arrow.end])


def _ordered_rows(row: Mapping[str, int], ways: Iterable[list[Item]]) -> list[list[Item]]:
    """What stands in each row, beside what it hangs on."""
    rows: list[list[Item]] = [[] for _ in range(max(row.values()) + 1)]
    for name, number in row.items():
        rows[number].append(name)
    above: dict[Item, list[Item]] = {}
    below: dict[Item, list[Item]] = {}
    for way in ways:
        for item in way[1:-1]:
            rows[_row(item, row)].append(item)
        for one, other in itertools.pairwise(way):
            above.setdefault(other, []).append(one)
            below.setdefault(one, []).append(other)
    for sweep in range(_SWEEPS):
        near, order = (below, rows[::-1]) if sweep % 2 else (above, rows)
        for before, items in itertools.pairwise(order):
            places = {item: (place + 0.5) / len(before) for place, item in enumerate(before)}
            means = {
                item: _mean([places[each] for each in near.get(item, ()) if each in places]) for item in items
            }
            items.sort(key=means.__getitem__)
    return rows


def _row(item: Item, row: Mapping[str, int]) -> int:
    return item.row if isinstance(item, Lane) else row[item]


def _mean(places: list[float]) -> float:
    return sum(places) / len(places) if places else 0.5


def _row_numbers(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    needs: dict[str, list[str]] = {}
    for arrow in edges(plan):
        needs.setdefault(arrow.end, []).append(arrow.start)
    for stage in ordered(plan):
        found[stage.name] = 1 + max((found[name] for name in needs.get(stage.name, ())), default=-1)
    return found


def _width(items: Sequence[Item], box: int) -> int:
    return sum(_item_width(item, box) + GAP_X for item in items) - GAP_X


def _item_width(item: Item, box: int) -> int:
    return box if isinstance(item, str) else _LANE


def _routes(
    ways: Mapping[Arrow, list[Item]], corners: Mapping[Item, Point], box: Point
) -> Iterator[tuple[Arrow, list[Point]]]:
    starts = _ports(((arrow.start, arrow, way[1]) for arrow, way in ways.items()), corners, box[0])
    ends = _ports(((arrow.end, arrow, way[-2]) for arrow, way in ways.items()), corners, box[0])
    for arrow, way in ways.items():
        points = [(starts[arrow], corners[arrow.start][1] + box[1])]
        for x, y in (corners[lane] for lane in way[1:-1]):
            points += [(x + _LANE // 2, y), (x + _LANE // 2, y + box[1])]
        yield arrow, [*points, (ends[arrow], corners[arrow.end][1])]


def _ports(
    beside: Iterable[tuple[str, Arrow, Item]], corners: Mapping[Item, Point], width: int
) -> dict[Arrow, int]:
    """Where on a box's side its arrows leave or come, in the order of where they lead: no two at one."""
    of_box: dict[str, list[tuple[Arrow, Item]]] = {}
    for name, arrow, other in beside:
        of_box.setdefault(name, []).append((arrow, other))
    found = {}
    for name, arrows in of_box.items():
        arrows.sort(key=lambda pair: corners[pair[1]][0])
        for number, (arrow, _) in enumerate(arrows, 1):
            found[arrow] = corners[name][0] + width * number // (len(arrows) + 1)
    return found
