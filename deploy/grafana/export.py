#!/usr/bin/env python3
"""Writes the dashboards as the JSON that Grafana reads: `make docs` runs it, a test holds code and files together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: E402
from grafana_foundation_sdk.models.dashboard import Dashboard  # noqa: E402

from deploy.grafana.locks import locks  # noqa: E402  the checkout's own, wherever this is called
from deploy.grafana.one_action import one_action  # noqa: E402
from deploy.grafana.overview import overview  # noqa: E402

FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
BOARDS = {"overview": overview, "locks": locks, "one-action": one_action}
"""The dashboards, by the name of their file."""


def exported(board: Dashboard) -> str:
    """A dashboard as a file holds it."""
    return json.dumps(board, cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every file anew."""
    for name, make in BOARDS.items():
        file, text = FOLDER / f"{name}.json", exported(make())
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
