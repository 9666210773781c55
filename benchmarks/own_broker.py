"""The broker of a measurement and the folder of its data: they go with it, also where it is asked to end (SIGTERM).

Where `JEF_AMQP_URL` is set that broker is meant: it is neither started nor stopped.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy" / "local"))

from broker import PrivateBroker

__all__ = ["PrivateBroker", "own_broker"]


@contextlib.contextmanager
def own_broker() -> Iterator[tuple[PrivateBroker, Path]]:
    """A broker that answers, and a folder, for a while."""
    # Who runs in a script's background is told to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="jef-bench-"))
    broker = PrivateBroker(folder / "broker")
    try:
        broker.start()
        yield broker, folder
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _kill_all()
        broker.remove()
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: object) -> None:
    """End as by Ctrl-C, which event loops know how to do; once, as a second one would leave things undone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)


def _kill_all() -> None:
    """Leave nothing of ours running: something may just have been started. The broker's data are thrown away."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
