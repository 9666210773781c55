"""structlog, without the pretty tracebacks that it makes where rich is installed.

Those print the variables of each frame, secrets among them; and merely to have them ready costs each of our processes
a fifth of its start, and memory. So structlog is to find no rich: whoever comes first to import it does so here.
"""

from __future__ import annotations

import sys

_is_there = "rich" in sys.modules
if not _is_there:
    sys.modules["rich"] = None  # type: ignore[assignment]  # how Python is told that there is no such module
try:
    import structlog
finally:
    if not _is_there:
        del sys.modules["rich"]

__all__ = ["structlog"]
