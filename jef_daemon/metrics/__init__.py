"""What Prometheus is told. One table names every metric; `docs/metrics.md` is generated from it.

    definitions     the table: names, kinds, labels, buckets, what they mean
    counting        counts and measures what happens, tells it with what is read at a scrape

Imported only where the HTTP port is open.
"""

from jef_daemon.metrics.counting import Metrics, Read, Values, build
from jef_daemon.metrics.definitions import DEFINITIONS, FAMILIES, Definition

__all__ = ["DEFINITIONS", "FAMILIES", "Definition", "Metrics", "Read", "Values", "build"]
