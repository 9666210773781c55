"""Configuration and rules, checked and tested by the program that comes with Prometheus."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from private_prometheus import SHIPPED, program

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
