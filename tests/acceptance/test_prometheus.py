"""A real Prometheus, with the configuration and rules as shipped, looks at a daemon under load."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeVar

import pytest
from private_prometheus import PrivatePrometheus, running

from tests.support.load import under_load
from tests.support.panels import DASHBOARDS, asked, metrics_in, rules
from tests.support.process import DaemonProcess

T = TypeVar("T")

pytestmark = pytest.mark.timeout(240)

_WITHIN_S = 90
ALWAYS_ZERO = {
    ("overview", "Ledger"): "the disk is not full",
    ("overview", "Connections lost"): "the broker stays",
}
"""Panels of what does not happen here, each with the reason: their queries return 0."""


async def left(items: Iterable[T], is_done: Callable[[T], bool]) -> list[T]:
    """Those of which something does not become true, however long one looks."""
    waiting, until = list(items), time.monotonic() + _WITHIN_S
    while waiting and time.monotonic() < until:
        waiting = [one for one in waiting if not await asyncio.to_thread(is_done, one)]
        await asyncio.sleep(0.3 if waiting else 0)
    return waiting


@pytest.fixture
async def watched(daemon: DaemonProcess) -> AsyncIterator[tuple[PrivatePrometheus, str]]:
    """A Prometheus, and the address of the daemon that it scrapes each second."""
    async with under_load(daemon, itertools.repeat(0.5)) as port:
        with running([f"127.0.0.1:{port}"]) as prometheus:
            yield prometheus, f"127.0.0.1:{port}"


async def test_panels_have_data_and_rules_are_healthy(
    watched: tuple[PrivatePrometheus, str], prefix: str
) -> None:
    """Every query of every panel, variables replaced by what they offer; every rule; every metric that they name."""
    prometheus, instance = watched
    offered = {"prefix": prefix, "daemon": instance, "action": "watchful"}

    def is_offered(query: str) -> bool:
        return offered[query_label(query)] in choices(prometheus, filled(query, offered))

    assert await left(variables(), is_offered) == []

    def has_data(one: Any) -> bool:
        is_zero = (one.dashboard, one.panel) in ALWAYS_ZERO
        expression = filled(one.expression, offered | {"__rate_interval": "10s"})
        if is_zero:
            expression = expression.removesuffix(" > 0")
        values = [float(value) for series in recent(prometheus, expression) for _, value in series["values"]]
        numbers = [value for value in values if not math.isnan(value)]  # the quotient of nothing
        return bool(numbers) and (any(numbers) != is_zero)

    assert await left(asked(), has_data) == []
    assert (
        await left([rule["alert"] for rule in rules("alerts.yml")], lambda name: health(prometheus, name))
        == []
    )
    recorded = [rule["record"] for rule in rules("recording.yml")]
    # Nobody may be QUEUED at this moment.
    assert await left(recorded, lambda name: bool(prometheus.query(f"last_over_time({name}[1m])"))) == []
    assert await left(["JefDeadLetters"], lambda name: fires(prometheus, name)) == []
    there = set(prometheus.get("label/__name__/values"))
    expressions = [one.expression for one in asked()] + [rule["expr"] for rule in rules("alerts.yml")]
    named = {name for text in expressions for name in metrics_in(text)}
    assert {name for name in named if not {name, f"{name}_bucket"} & there} == set()


def recent(prometheus: PrivatePrometheus, expression: str) -> list[Any]:
    """What a panel would have shown in the last half minute: what lasts a second only is there too."""
    now = time.time()
    return prometheus.query_range(expression, now - 30, now, 1)


def variables() -> list[str]:
    """The queries of all dashboards' variables."""
    boards = [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS]
    lists = [board["templating"]["list"] for board in boards]
    return sorted({one["query"] for found in lists for one in found if one["type"] == "query"})


def filled(text: str, chosen: Mapping[str, str]) -> str:
    """A query with its variables replaced."""
    for name, value in chosen.items():
        text = text.replace(f"${name}", value)
    return text


def query_label(query: str) -> str:
    """Which variable a query is for: `label_values(series, label)`, where `instance` is a daemon."""
    label = query.rpartition(", ")[2].rstrip(")")
    return "daemon" if label == "instance" else label


def choices(prometheus: PrivatePrometheus, query: str) -> list[str]:
    """What Grafana would offer."""
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert found
    return list(prometheus.get(f"label/{found[2]}/values", **{"match[]": found[1]}))


def health(prometheus: PrivatePrometheus, alert: str) -> bool:
    """Whether a rule was evaluated, without an error."""
    for group in prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            assert rule["health"] in {"ok", "unknown"}, rule
            if rule["name"] == alert:
                return bool(rule["health"] == "ok")
    raise AssertionError(f"{alert} is not there")


def fires(prometheus: PrivatePrometheus, name: str) -> bool:
    """Whether an alert fires, with the runbook's paragraph."""
    found = [alert for alert in prometheus.get("alerts")["alerts"] if alert["labels"]["alertname"] == name]
    return any(
        alert["state"] == "firing" and alert["annotations"]["runbook_url"].endswith(f"#{name.lower()}")
        for alert in found
    )
