"""Configuration, rules and what the daemon tells, checked and tested by the program that comes with Prometheus."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from private_prometheus import SHIPPED, program

from jef_daemon.metrics import DEFINITIONS, Metrics, Values
from tests.support.panels import RULES


@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", SHIPPED / "prometheus.yml"),
        ("check", "rules", RULES / "recording.yml", RULES / "alerts.yml"),
        ("test", "rules", SHIPPED / "tests" / "alerts.yml"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_promtool_is_content(words: tuple[str | Path, ...]) -> None:
    """Configuration and rules are well-formed; each alert does as its tests say."""
    done = subprocess.run([program("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


async def test_prometheus_finds_nothing_to_complain_of() -> None:
    """Its own promtool reads what is told: names, units, types, help."""

    async def everything() -> Mapping[str, Values]:
        return {one.name: {one.labels: 1.0} for one in DEFINITIONS if one.kind != "histogram"}

    metrics = Metrics(["render"], everything)
    for one in DEFINITIONS:
        if one.kind == "histogram":
            metrics.observe(one.name, 1.0, *one.labels)
    body, _ = await metrics.exposition()
    assert all(f"\n# TYPE {one.name} ".encode() in b"\n" + body for one in DEFINITIONS)
    command = [program("promtool"), "check", "metrics"]
    done = await asyncio.to_thread(
        subprocess.run, command, input=body, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")
