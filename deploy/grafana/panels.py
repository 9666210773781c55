"""What the dashboards are built of: variables, and the few kinds of panels that they use, all in one style.

Every query asks for the daemons that the variable `daemon` names. That variable offers those of the chosen `prefix`:
metrics are a daemon's, a daemon serves one prefix, and `jef_build_info` tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as build
from grafana_foundation_sdk.builders import dashboard as build_dashboard
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel | table.Panel

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
DAEMON = 'instance=~"$daemon"'
ACTION = f'{DAEMON}, action=~"$action"'
RATE = "$__rate_interval"
"""Grafana's: long enough for the scrape interval, short enough for the picture."""

GREEN, RED, ORANGE, YELLOW, BLUE, PURPLE, GREY = (
    *("#73BF69", "#F2495C", "#FF9830", "#FADE2A", "#5794F2", "#B877D9", "#8E8E8E"),
)
COLORS = {
    "COMPLETED": GREEN,
    "FAILED": RED,
    "TIMED_OUT": ORANGE,
    "CANCELLED": GREY,
    "RUNNING": BLUE,
    "QUEUED": YELLOW,
    "WAITING_FOR_LOCK": PURPLE,
    "median": GREEN,
    "95 of 100": YELLOW,
    "99 of 100": RED,
}
"""The same colour for the same word, on every panel."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a panel asks."""

    expression: str
    legend: str = ""
    """Of each series, with {{label}}."""


# --- variables -------------------------------------------------------------------------------------------


def variables(*, action: bool = False, one_action: bool = False) -> list[Builder[dashboard.VariableModel]]:
    """The choices at the top of a dashboard."""
    found: list[Builder[dashboard.VariableModel]] = [
        build_dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
        _choice("prefix", "Prefix", "label_values(jef_build_info, prefix)"),
        _choice("daemon", "Daemon", 'label_values(jef_build_info{prefix=~"$prefix"}, instance)'),
    ]
    if action or one_action:
        values = f"label_values(jef_jobs_received_total{{{DAEMON}}}, action)"
        found.append(_choice("action", "Action", values, several=not one_action))
    return found


def _choice(name: str, label: str, values: str, *, several: bool = True) -> build_dashboard.QueryVariable:
    variable = (
        build_dashboard.QueryVariable(name)
        .label(label)
        .query(values)
        .datasource(SOURCE)
        # A daemon that is down now was there in the time that is looked at.
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    if several:
        variable.multi(True).include_all(True).current(dashboard.VariableOption(True, "All", "$__all"))
    return variable


# --- queries ---------------------------------------------------------------------------------------------


def rates(metric: str, by: str, labels: str = DAEMON) -> Query:
    """Events per second, by a label."""
    return Query(f"sum by ({by}) (rate({metric}{{{labels}}}[{RATE}]))", f"{{{{{by}}}}}")


def events(metric: str, by: str, labels: str = DAEMON) -> Query:
    """How many events there were between two points of the picture, by a label, for what is rare; none: no bar."""
    return Query(f"sum by ({by}) (increase({metric}{{{labels}}}[{RATE}])) > 0", f"{{{{{by}}}}}")


def quantile(metric: str, share: float, by: str = "", labels: str = DAEMON) -> str:
    """What so many of all observations stay below."""
    kept = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({kept}) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def quantiles(metric: str, labels: str = DAEMON) -> list[Query]:
    """The median, and what the slow ones take."""
    named = {"median": 0.5, "95 of 100": 0.95, "99 of 100": 0.99}
    return [Query(quantile(metric, share, labels=labels), name) for name, share in named.items()]


def buckets(metric: str, labels: str = DAEMON) -> Query:
    """All of a histogram, for a heat map."""
    return Query(f"sum by (le) (increase({metric}_bucket{{{labels}}}[{RATE}]))", "{{le}}")


# --- panels ----------------------------------------------------------------------------------------------


def lines(title: str, meaning: str, unit: str, *queries: Query, stacked: bool = False) -> timeseries.Panel:
    """Series over time; stacked, where their sum says something."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .unit(unit)
        .min(0)
        .height(8)
        .datasource(SOURCE)
        .targets(_targets(queries))
        .line_width(2)
        .fill_opacity(40 if stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            build.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            build.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )
    for name, color in COLORS.items():
        if any(query.legend in {name, "{{status}}"} for query in queries):
            panel.override_by_name(name, [_fixed(color)])
    if stacked:
        panel.stacking(build.StackingConfig().mode(common.StackingMode.NORMAL))
    return panel


def bars(title: str, meaning: str, *queries: Query) -> Panel:
    """How often something happened: for what is rare and never nothing to be looked at."""
    panel = lines(title, meaning, "short", *queries, stacked=True)
    return panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(80).no_value("none")


def number(
    title: str,
    meaning: str,
    unit: str,
    expression: str,
    steps: Mapping[float, str] | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
) -> Panel:
    """One value, large. `steps`: its colour from a value on; `words`: a word and a colour for a value."""
    thresholds = [dashboard.Threshold(None, BLUE if steps is None else GREEN)]
    thresholds += [dashboard.Threshold(value, color) for value, color in (steps or {}).items()]
    panel = (
        stat.Panel()
        .title(title)
        .description(meaning)
        .unit(unit)
        .height(4)
        .datasource(SOURCE)
        .targets(_targets([Query(expression, title)]))
        .thresholds(build_dashboard.ThresholdsConfig().steps(thresholds))
        .reduce_options(build.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common.BigValueGraphMode.NONE if words else common.BigValueGraphMode.AREA)
    )
    if unit == "none":
        panel.decimals(0)  # an increase is estimated, and would be told with digits behind the point
    if words:
        panel.mappings([_mapping(words)])
    return panel


def states(title: str, meaning: str, query: Query, words: Mapping[str, tuple[str, str]]) -> Panel:
    """Whether something was so, over time: a band for each series, with a word and a colour for each value."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(meaning)
        .height(8)
        .datasource(SOURCE)
        .targets(_targets([query]))
        .mappings([_mapping(words)])
        .show_value(common.VisibilityMode.NEVER)
        .row_height(0.8)
        .legend(
            build.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )


def heat(title: str, meaning: str, query: Query) -> Panel:
    """A histogram over time: where most are, and whether there are two humps."""
    return (
        heatmap.Panel()
        .title(title)
        .description(meaning)
        .height(8)
        .datasource(SOURCE)
        .targets([_target(query, "A").format(PromQueryFormat.HEATMAP)])
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges"))
    )


def rows(title: str, meaning: str, query: Query, shown: Sequence[str]) -> Panel:
    """The labels of some series, as a table."""
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    order = {name: place for place, name in enumerate(shown)}
    return (
        table.Panel()
        .title(title)
        .description(meaning)
        .height(8)
        .datasource(SOURCE)
        .targets([_target(query, "A").instant().format(PromQueryFormat.TABLE)])
        .transformations(
            [
                dashboard.DataTransformerConfig(
                    "organize", options={"excludeByName": hidden, "indexByName": order}
                )
            ]
        )
    )


def _targets(queries: Sequence[Query]) -> list[Builder[Dataquery]]:
    return [_target(query, chr(ord("A") + place)) for place, query in enumerate(queries)]


def _target(query: Query, ref: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .datasource(SOURCE)
        .range()
        .ref_id(ref)
    )


def _mapping(words: Mapping[str, tuple[str, str]]) -> dashboard.ValueMap:
    return dashboard.ValueMap(
        {value: dashboard.ValueMappingResult(text, color) for value, (text, color) in words.items()}
    )


def _fixed(color: str) -> dashboard.DynamicConfigValue:
    return dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})


# --- a dashboard -----------------------------------------------------------------------------------------


def board(
    title: str,
    about: str,
    choices: Sequence[Builder[dashboard.VariableModel]],
    panels: Mapping[str, Sequence[Panel]],
) -> dashboard.Dashboard:
    """A dashboard: rows of panels under headings. The others are linked at its top."""
    made = (
        build_dashboard.Dashboard(f"jef_daemon: {title}")
        .uid("jef-" + title.lower().replace(" ", "-"))
        .description(about)
        .tags(["jef-daemon"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .variables(list(choices))
        .link(
            build_dashboard.DashboardLink("Dashboards")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["jef-daemon"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for heading, found in panels.items():
        made.with_row(build_dashboard.Row(heading))
        for panel, width in zip(
            found, widths(len(found), 8 if isinstance(found[0], stat.Panel) else 3), strict=True
        ):
            made.with_panel(panel.span(width))
    built = made.build()
    for number, each in enumerate(built.panels or [], 1):
        each.id_val = number  # links to one panel stay right
    return built


def widths(count: int, most: int) -> list[int]:
    """Of so many panels, at most so many beside each other: full lines of equal panels, the fuller ones first."""
    lines_of_them = -(-count // most)
    fewest, more = divmod(count, lines_of_them)
    in_lines = [fewest + (line < more) for line in range(lines_of_them)]
    return [24 // in_line for in_line in in_lines for _ in range(in_line)]
