"""Where the processes come from that look at executors and run them: a fork server, started once.

It has imported what they need, so that a new one costs milliseconds; of executors it has imported nothing.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOAD = ("jef_daemon.run.isolation", "jef_daemon.run.probe")
_TRACED = "jef_daemon.tracing.executor"
"""Its library takes time and memory: only where tracing is on."""


def context(is_traced: bool) -> ForkServerContext:
    """The way to processes.

    Args:
        is_traced: whether executors' spans are wanted; the first to ask decides for the daemon's life.
    """
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*_PRELOAD, *([_TRACED] if is_traced else [])])
    return found
