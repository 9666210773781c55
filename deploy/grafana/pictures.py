#!/usr/bin/env python3
"""Draws the dashboards into docs/images/, from what a real Prometheus has seen of a daemon under load.

Grafana itself is not asked: matplotlib draws what the dashboards' JSON says, with the queries, the colours and the
layout that are written there. It is no part of the development group; what CI runs does not need it.

    .venv/bin/pip install matplotlib
    .venv/bin/python deploy/grafana/pictures.py [--minutes 6]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local")]

from broker import PrivateBroker  # noqa: E402  the checkout's own, wherever this is called
from private_prometheus import PrivatePrometheus, running  # noqa: E402

from deploy.grafana.drawing import Times, draw  # noqa: E402
from tests.support.load import under_load  # noqa: E402
from tests.support.process import DaemonProcess  # noqa: E402

IMAGES = ROOT / "docs" / "images"
PICTURES = {
    "grafana-overview": ("overview", ("Now", "From request to end", "What is told")),
    "grafana-overview-further": ("overview", ("Work outside", "Silence", "Workflows", "Inside")),
    "grafana-locks": ("locks", ()),
    "grafana-one-action": ("one-action", ()),
}
"""A file's name: the dashboard, and which of its rows; none: all."""
_ACTION = "watchful"


def waves() -> Iterator[float]:
    """Pauses between the rounds of the load: it comes and goes, as work does."""
    for step in itertools.count():
        yield 1.6 + 1.2 * math.sin(step / 9) + 0.3 * math.sin(step / 2)


async def main() -> None:
    """Make load, wait, draw."""
    parser = argparse.ArgumentParser(description="Draw the dashboards into docs/images/.")
    parser.add_argument("--minutes", type=float, default=6, help="how long the load goes on (default: 6)")
    minutes: float = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="jef-pictures-", ignore_cleanup_errors=True) as name:
        broker = PrivateBroker(Path(name) / "broker")
        broker.start()
        daemon = DaemonProcess(broker.url, "media", Path(name) / secrets.token_hex(2))
        try:
            async with under_load(daemon, waves()) as port:
                with running([f"127.0.0.1:{port}"], every="2s") as prometheus:
                    await asyncio.sleep(minutes * 60)
                    draw_all(prometheus, f"127.0.0.1:{port}", minutes)
        finally:
            daemon.kill()
            broker.remove()


def draw_all(prometheus: PrivatePrometheus, daemon: str, minutes: float) -> None:
    """Every picture."""
    end = float(int(time.time()) - 2)  # whole seconds, as Prometheus rounds: its points are to be found again
    times = Times(end - int(minutes * 60) + 15, end, 5.0)
    chosen = {"daemon": daemon, "action": _ACTION, "__rate_interval": "20s"}
    for name, (board, headings) in PICTURES.items():
        file = IMAGES / f"{name}.png"
        path = ROOT / "deploy" / "grafana" / "dashboards" / f"{board}.json"
        draw(path, file, prometheus, chosen, times, headings)
        print(f"written: {file.relative_to(ROOT)}, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    asyncio.run(main())
