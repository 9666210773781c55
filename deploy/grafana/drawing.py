"""Draws a dashboard's JSON with matplotlib, in the likeness of Grafana's dark theme. Used by `pictures.py` only."""

from __future__ import annotations

import datetime
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from private_prometheus import PrivatePrometheus

PAGE, CARD, EDGE, TEXT, FAINT = "#111217", "#181B1F", "#2A2D33", "#D0D1D6", "#8E9099"
PALETTE = (
    "#73BF69",
    "#F2CC0C",
    "#8AB8FF",
    "#FF780A",
    "#F2495C",
    "#5794F2",
    "#B877D9",
    "#FFB357",
    "#7EB26D",
    "#6ED0E0",
)
_WIDTH_IN, _ROW_IN, _DPI = 13.0, 0.30, 100
_COLORS = 256
"""Of a picture's palette: a dashboard has few, and the file is small."""


@dataclass(frozen=True)
class Times:
    """From when to when, in seconds since 1970, and how far apart the points are."""

    start: float
    end: float
    step_s: float


@dataclass(frozen=True)
class Series:
    """One line: its name, and its points."""

    name: str
    at: list[float]
    values: list[float]


class _Source:
    """Answers a panel's queries."""

    def __init__(self, prometheus: PrivatePrometheus, chosen: Mapping[str, str], times: Times) -> None:
        self._prometheus, self._chosen, self.times = prometheus, chosen, times

    def series(self, panel: Mapping[str, Any]) -> list[Series]:
        found = []
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in self._chosen.items():
                expression = expression.replace(f"${name}", value)
            times = self.times
            answers = []
            for one in self._prometheus.query_range(expression, times.start, times.end, times.step_s):
                points = [(at, float(value)) for at, value in one["values"] if value != "NaN"]
                if points:
                    name = _legend(target.get("legendFormat") or panel["title"], one["metric"])
                    answers.append(Series(name, [at for at, _ in points], [value for _, value in points]))
            found += sorted(answers, key=lambda each: each.name)
        return found

    def labels(self, panel: Mapping[str, Any]) -> list[Mapping[str, str]]:
        expression = panel["targets"][0]["expr"]
        for name, value in self._chosen.items():
            expression = expression.replace(f"${name}", value)
        return [one["metric"] for one in self._prometheus.query(expression)]


def draw(
    board: Path,
    file: Path,
    prometheus: PrivatePrometheus,
    chosen: Mapping[str, str],
    times: Times,
    headings: Sequence[str],
) -> None:
    """Draw the rows of a dashboard under these headings; none: all."""
    mpl.rcParams.update({"font.family": ["DejaVu Sans"], "font.size": 8})
    mpl.rcParams.update(
        {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": FAINT, "ytick.color": FAINT}
    )
    panels = _of_rows(json.loads(board.read_text(encoding="utf-8"))["panels"], headings)
    top = min(panel["gridPos"]["y"] for panel in panels)
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    figure = Figure(figsize=(_WIDTH_IN, lines * _ROW_IN), dpi=_DPI, facecolor=PAGE)
    source = _Source(prometheus, chosen, times)
    for panel in panels:
        place = panel["gridPos"]
        height = place["h"] / lines
        box = (place["x"] / 24, 1 - (place["y"] - top) / lines - height, place["w"] / 24, height)
        if panel["type"] == "row":
            figure.text(box[0] + 0.006, box[1] + height * 0.3, panel["title"], fontsize=10, weight="bold")
        else:
            _panel(figure, box, panel, source)
    _save(figure, file)


def _of_rows(panels: list[Any], headings: Sequence[str]) -> list[Any]:
    found, taken = [], not headings
    for panel in panels:
        if panel["type"] == "row" and headings:
            taken = panel["title"] in headings
        found += [panel] if taken else []
    return found


def _save(figure: Figure, file: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=PAGE)
    image = Image.open(drawn).convert("RGB")
    file.parent.mkdir(exist_ok=True)
    image.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


def _panel(
    figure: Figure, box: tuple[float, float, float, float], panel: Mapping[str, Any], source: _Source
) -> None:
    width, height = _WIDTH_IN, figure.get_figheight()
    gap_x, gap_y = 0.05 / width, 0.05 / height
    left, low, right, high = box[0] + gap_x, box[1] + gap_y, box[0] + box[2] - gap_x, box[1] + box[3] - gap_y
    figure.patches.append(
        FancyBboxPatch(
            (left, low),
            right - left,
            high - low,
            boxstyle="square,pad=0",
            facecolor=CARD,
            edgecolor=EDGE,
            linewidth=0.7,
            transform=figure.transFigure,
            zorder=-1,
        )
    )
    figure.text(left + 0.10 / width, high - 0.20 / height, panel["title"], fontsize=8.5, weight="bold")
    # Left of the axes are values, or the longer names of states.
    margin = 0.90 if panel["type"] == "state-timeline" else 0.60
    inner = (
        left + margin / width,
        low + 0.60 / height,
        right - left - (margin + 0.15) / width,
        high - low - 0.95 / height,
    )
    if panel["type"] == "stat":
        inner = (left, low, right - left, high - low)
    kinds: Mapping[str, Callable[[Axes, Mapping[str, Any], _Source], None]] = {
        "stat": _number,
        "timeseries": _lines,
        "heatmap": _heat,
        "state-timeline": _states,
        "table": _table,
    }
    axes = figure.add_axes(inner, facecolor=CARD)
    for side in axes.spines.values():
        side.set_visible(False)
    kinds[panel["type"]](axes, panel, source)


# --- kinds of panels -------------------------------------------------------------------------------------


def _number(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    axes.set_axis_off()
    found = source.series(panel)
    defaults = panel["fieldConfig"]["defaults"]
    value = found[0].values[-1] if found else 0.0
    color = PALETTE[5]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    text = f"{value:.0f}" if defaults.get("decimals") == 0 else _told(value, defaults.get("unit", "none"))
    for mapping in defaults.get("mappings") or []:
        if said := mapping["options"].get(f"{value:g}"):
            text, color = said["text"], said["color"]
    axes.text(
        0.5,
        0.42,
        text,
        ha="center",
        va="center",
        fontsize=19 if len(text) < 8 else 13,
        color=color,
        weight="bold",
        transform=axes.transAxes,
    )
    if found and panel["options"].get("graphMode") == "area" and len(set(found[0].values)) > 1:
        spark = axes.inset_axes((0.0, 0.0, 1.0, 0.24))
        spark.set_axis_off()
        spark.fill_between(found[0].at, found[0].values, color=color, alpha=0.25, linewidth=0)
        spark.plot(found[0].at, found[0].values, color=color, linewidth=0.8)
        spark.margins(x=0)


def _lines(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    found = source.series(panel)
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    colors = _colors(panel, found)
    _frame(axes, source.times, defaults.get("unit", "none"))
    is_stacked = custom.get("stacking", {}).get("mode") == "normal"
    count = int((source.times.end - source.times.start) / source.times.step_s) + 1
    at = [source.times.start + place * source.times.step_s for place in range(count)]
    below = dict.fromkeys(at, 0.0)
    for one, color in zip(found, colors, strict=True):
        values = dict(zip(one.at, one.values, strict=True))
        heights = [values.get(moment, 0.0) for moment in at]
        base = [below[moment] for moment in at] if is_stacked else [0.0] * len(at)
        tops = [low + height for low, height in zip(base, heights, strict=True)]
        if custom.get("drawStyle") == "bars":
            axes.bar(at, heights, source.times.step_s * 0.8, base, color=color, alpha=0.85, linewidth=0)
        elif is_stacked:
            axes.fill_between(at, base, tops, color=color, alpha=0.4, linewidth=0)
            axes.plot(at, _without_nothing(tops, heights), color=color, linewidth=1.1)
        else:
            line = [values.get(moment, math.nan) for moment in at]
            axes.fill_between(at, line, color=color, alpha=0.07, linewidth=0)
            axes.plot(at, line, color=color, linewidth=1.2)
        if is_stacked:
            below = dict(zip(at, tops, strict=True))
    axes.set_ylim(bottom=0)
    if not any(value for one in found for value in one.values):
        axes.set_ylim(0, 1)
    if not found:
        axes.text(
            0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=10
        )
    if defaults.get("unit") == "bytes":
        axes.set_yticks(
            [each * 2**20 for each in MaxNLocator(4).tick_values(0, axes.get_ylim()[1] / 2**20)][:-1]
        )
    _legends(axes, [one.name for one in found], colors)


def _without_nothing(tops: Sequence[float], heights: Sequence[float]) -> list[float]:
    """No line where there is none of it for some time: it would cover that of the one below."""
    about = zip([0.0, *heights[:-1]], heights, [*heights[1:], 0.0], strict=True)
    return [top if any(three) else math.nan for top, three in zip(tops, about, strict=True)]


def _heat(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    found = sorted(source.series(panel), key=lambda one: float(one.name))
    at = sorted({moment for one in found for moment in one.at})
    rows, before = [], dict.fromkeys(at, 0.0)
    for one in found:
        values = dict(zip(one.at, one.values, strict=True))
        rows.append([max(0.0, values.get(moment, 0.0) - before[moment]) for moment in at])
        before = {moment: values.get(moment, 0.0) for moment in at}
    _frame(axes, source.times, "none")
    axes.grid(visible=False)
    shades = LinearSegmentedColormap.from_list("heat", [CARD, "#7A3B10", "#FF9830", "#FFE0A8"])
    edges = [moment - source.times.step_s / 2 for moment in at] + [at[-1] + source.times.step_s / 2]
    axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap=shades, shading="flat")
    axes.set_yticks([place + 1 for place in range(len(found))])
    axes.set_yticklabels([_told(float(one.name), "s") for one in found])


def _states(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    found = sorted(source.series(panel), key=lambda one: one.name, reverse=True)
    words = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    _frame(axes, source.times, "none")
    axes.grid(visible=False)
    for place, one in enumerate(found):
        for moment, value in zip(one.at, one.values, strict=True):
            axes.barh(
                place,
                source.times.step_s,
                0.7,
                moment,
                color=words[f"{value:g}"]["color"],
                alpha=0.8,
                linewidth=0,
            )
    axes.set_yticks(range(len(found)))
    axes.set_yticklabels([one.name for one in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    _legends(axes, [word["text"] for word in words.values()], [word["color"] for word in words.values()])


def _table(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    axes.set_axis_off()
    order = panel["transformations"][0]["options"]["indexByName"]
    columns = sorted(order, key=lambda name: int(order[name]))
    rows = [[one.get(name, "") for name in columns] for one in source.labels(panel)]
    for line, cells in enumerate([columns, *rows]):
        for place, cell in enumerate(cells):
            axes.text(
                (place + 0.9 * (place > 0)) / (len(columns) + 1) - 0.1,
                0.95 - line * 0.14,
                cell,
                transform=axes.transAxes,
                color=PALETTE[2] if line == 0 else TEXT,
                fontsize=8,
                va="top",
            )


# --- what they share -------------------------------------------------------------------------------------


def _frame(axes: Axes, times: Times, unit: str) -> None:
    axes.set_xlim(times.start, times.end)
    axes.grid(color=EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=7)
    axes.set_xticks([at for at in range(int(times.start), int(times.end)) if at % 60 == 0])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _clock(at)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _told(value, unit)))


def _clock(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%H:%M")


def _legends(axes: Axes, names: Sequence[str], colors: Sequence[str]) -> None:
    handles = [mpl.lines.Line2D([], [], color=color, linewidth=3) for color in colors]
    width_in = axes.get_position().width * _WIDTH_IN
    longest = max((len(name) for name in names), default=10)
    axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(-0.45 / width_in, -0.11),
        ncols=max(1, min(len(names), int(width_in / 0.052) // (longest + 6))),
        frameon=False,
        fontsize=7,
        handlelength=1.2,
        columnspacing=1.2,
        labelspacing=0.25,
        borderaxespad=0.2,
    )


def _colors(panel: Mapping[str, Any], found: Sequence[Series]) -> list[str]:
    fixed = {
        each["matcher"]["options"]: each["properties"][0]["value"]["fixedColor"]
        for each in panel["fieldConfig"].get("overrides") or []
    }
    free = iter(PALETTE * 3)
    return [fixed.get(one.name) or next(free) for one in found]


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        pattern = pattern.replace(f"{{{{{name}}}}}", value)
    return pattern


def _told(value: float, unit: str) -> str:
    """A value with its unit, as Grafana writes it."""
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit == "s":
        if value in {0, math.inf}:
            return "0 s" if value == 0 else "+Inf"
        for least, one, name in (
            (3600, 3600, "h"),
            (60, 60, "min"),
            (1, 1, "s"),
            (1e-3, 1e-3, "ms"),
            (0, 1e-6, "µs"),
        ):
            if value >= least:
                return f"{value / one:.3g} {name}"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    return f"{value:.3g}{ {'reqps': ' req/s', 'ops': ' /s'}.get(unit, '') }"
