"""For tests, of executors and of the daemon itself. Production never imports it.

from jef_daemon.testing import run
job = run(Thumbnail, {"source": "/in/a.mov"})
"""

from jef_daemon.testing.runner import TestRun, arun, run

__all__ = ["TestRun", "arun", "run"]
