"""What the dashboards' files ask Prometheus, and which metrics an expression names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jef_daemon.metrics import DEFINITIONS
from tests.support.process import ROOT

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
RULES = ROOT / "deploy" / "prometheus" / "rules"
FOREIGN = {
    "up",
    "process_start_time_seconds",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
}
"""Those that are not ours: Prometheus' own, and prometheus_client's of the process."""
_WORD = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")


@dataclass(frozen=True)
class Asked:
    """A query of a panel."""

    dashboard: str
    panel: str
    expression: str

    def filled(self, chosen: Mapping[str, str]) -> str:
        """With the variables replaced."""
        text = self.expression
        for name, value in chosen.items():
            text = text.replace(f"${name}", value)
        return text


def panels(path: Path) -> Iterator[Mapping[str, Any]]:
    """All panels of a dashboard, also those within rows."""
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        yield from [panel, *(panel.get("panels") or [])]


def asked() -> list[Asked]:
    """All queries of all panels."""
    return [
        Asked(path.stem, panel["title"], target["expr"])
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel.get("targets") or []
    ]


def rules(file: str) -> list[Mapping[str, Any]]:
    """The rules of a file, in order."""
    groups = yaml.safe_load((RULES / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression names; a series of a histogram is its metric."""
    known = {one.name: one for one in DEFINITIONS}
    found = set()
    for word in _WORD.findall(re.sub(r'"[^"]*"', "", expression)):
        if ":" in word or word.startswith(("jef_", "process_")) or word in FOREIGN:
            base = re.sub(r"_(bucket|count|sum)$", "", word)
            is_series = base in known and known[base].kind == "histogram" and base != word
            found.add(base if is_series else word)
    return found
