"""Rules, dashboards, runbook and metrics hold together. What promtool says of them: tests/integration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from private_prometheus import SHIPPED

from deploy.grafana import export
from jef_daemon.lifecycle import Status
from jef_daemon.metrics import DEFINITIONS
from tests.support.panels import DASHBOARDS, FOREIGN, Asked, asked, metrics_in, panels, rules
from tests.support.process import ROOT

ALERTS = rules("alerts.yml")
RECORDED = {rule["record"]: rule["expr"] for rule in rules("recording.yml")}
TESTS = yaml.safe_load((SHIPPED / "tests" / "alerts.yml").read_text(encoding="utf-8"))["tests"]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
EXPRESSIONS = [one.expression for one in asked()] + [rule["expr"] for rule in ALERTS] + [*RECORDED.values()]

NOT_DRAWN: Mapping[str, str] = {}
"""Metrics that neither a panel nor a rule asks for, each with the reason."""


# --- alerts ----------------------------------------------------------------------------------------------


def about(alert: str) -> list[tuple[Mapping[str, Any], bool]]:
    """An alert's tests, and whether it is to fire in them."""
    return [
        (test, bool(wanted["exp_alerts"]))
        for test in TESTS
        for wanted in test["alert_rule_test"]
        if wanted["alertname"] == alert
    ]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_is_tested_both_ways(alert: Mapping[str, Any]) -> None:
    """It fires, and it is silent on a series of a metric that it looks at: on nothing, anything is silent."""
    found = about(alert["alert"])
    assert {fires for _, fires in found} == {True, False}
    looked_at = expanded(alert["expr"])
    for test, fires in found:
        given = {name for series in test["input_series"] for name in metrics_in(series["series"])}
        assert given & looked_at
        assert test["name"].startswith(f"{alert['alert']} {'fires' if fires else 'is silent'}: ")


def expanded(expression: str) -> set[str]:
    """The metrics that an expression looks at, recorded ones resolved."""
    found: set[str] = set()
    for name in metrics_in(expression):
        found |= expanded(RECORDED[name]) if name in RECORDED else {name}
    return found


# --- the runbook -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_is_explained(alert: Mapping[str, Any]) -> None:
    """What it means, where to look first, the remedy; its annotations are sentences that name the daemon."""
    name, told = alert["alert"], alert["annotations"]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(told) == {"summary", "description", "runbook_url"}
    assert told["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert told["description"].endswith(".")
    assert "$labels.instance" in told["summary"] or "absent(" in alert["expr"]
    paragraph = RUNBOOK.partition(f"\n### {name}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    parts = re.findall(r"^\*\*(What it means|First look|Remedy)\.\*\* .{40,}", paragraph, re.MULTILINE)
    assert parts == ["What it means", "First look", "Remedy"]


def test_the_runbook_explains_no_other() -> None:
    """In the order of the rules."""
    assert re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


# --- metrics ---------------------------------------------------------------------------------------------


def test_no_rule_and_no_panel_names_what_does_not_exist() -> None:
    """Metrics of ours, of the process, and what the rules record."""
    known = {one.name for one in DEFINITIONS} | FOREIGN | set(RECORDED)
    unknown = {name: text for text in EXPRESSIONS for name in metrics_in(text) if name not in known}
    assert unknown == {}


def test_each_metric_is_looked_at() -> None:
    """By a panel or a rule, or it is said why not; what is recorded is used."""
    used = {name for text in EXPRESSIONS for name in metrics_in(text)}
    assert {one.name for one in DEFINITIONS} - used == set(NOT_DRAWN)
    assert set(RECORDED) <= used


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS)))
def test_labels_exist(expression: str) -> None:
    """An expression that names one metric of ours groups and filters by labels that the metric has."""
    labels = {one.name: {*one.labels, "instance", "job", "le"} for one in DEFINITIONS}
    found = expanded(expression) & set(labels)
    if not found:
        return
    grouped = re.findall(r"(?:by|without|on|ignoring) \(([^)]*)\)", expression)
    named = {label.strip() for group in grouped for label in group.split(",")}
    named |= set(re.findall(r"(\w+)=~?\"", expression))
    assert named <= set.union(*(labels[name] for name in found))


_SELECTOR = re.compile(r"(jef_\w+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


@pytest.mark.parametrize("expression", sorted({text for text in EXPRESSIONS if _SELECTOR.search(text)}))
def test_values_exist(expression: str) -> None:
    """What a label is asked for is one of the words that it can have, where they are fixed; a status is a status."""
    statuses = {status.value for status in Status}
    fixed = {one.name: {one.labels[-1]: set(one.values)} for one in DEFINITIONS if one.values}
    for name, matchers in _SELECTOR.findall(expression):
        for label, how, wanted in _MATCHER.findall(matchers):
            values = fixed.get(name, {}).get(label) or (statuses if label == "status" else set[str]())
            if values and "$" not in wanted:
                assert any(
                    re.fullmatch(wanted, value) if how == "=~" else wanted == value for value in values
                )


# --- dashboards ------------------------------------------------------------------------------------------


def test_code_and_files_are_the_same() -> None:
    """`make docs` writes them."""
    assert {path.stem for path in DASHBOARDS} == set(export.BOARDS)
    for path in DASHBOARDS:
        assert path.read_text(encoding="utf-8") == export.exported(export.BOARDS[path.stem]())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show(path: Path) -> None:
    """Title and sentence, once each; every variable that is asked for is offered, every one offered is asked for."""
    shown = [panel for panel in panels(path) if panel["type"] != "row"]
    assert len({panel["title"] for panel in shown}) == len(shown)
    assert [panel["id"] for panel in panels(path)] == list(range(1, len(list(panels(path))) + 1))
    assert not overlapping([panel["gridPos"] for panel in panels(path)])
    for panel in shown:
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
    board = json.loads(path.read_text(encoding="utf-8"))
    offered = {each["name"]: str(each["query"]) for each in board["templating"]["list"]}
    texts = [one.expression for one in asked() if one.dashboard == path.stem] + list(offered.values())
    wanted = {name for text in texts for name in re.findall(r"\$\{?(\w+)", text)}
    assert wanted - {"__rate_interval"} == set(offered) - {"datasource"}
    assert {"prefix", "daemon"} <= set(offered)


def overlapping(places: list[Mapping[str, int]]) -> bool:
    """Whether two panels are drawn over each other, or one over the edge."""
    cells = [
        (column, line)
        for place in places
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    return len(set(cells)) < len(cells) or max(column for column, _ in cells) >= 24


def test_variables_are_told_apart() -> None:
    """Every query asks for the chosen daemons only."""
    assert [one for one in asked() if "$daemon" not in one.expression] == list[Asked]()


def test_what_is_provisioned_is_there() -> None:
    """Grafana finds the folder of the dashboards, and the datasource is Prometheus."""
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "jef.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    [provider] = yaml.safe_load((folder / "dashboards" / "jef.yml").read_text())["providers"]
    assert Path(provider["options"]["path"]).name == export.FOLDER.name
