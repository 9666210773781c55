"""The tracing of a daemon: what observes, and what sends."""

from __future__ import annotations

from collections.abc import Sequence

from jef_daemon.errors import SettingsError
from jef_daemon.names import Names
from jef_daemon.settings import Settings
from jef_daemon.tracing.recorded import load
from jef_daemon.tracing.spans import Spans

try:
    from jef_daemon.tracing.export import Export
except ModuleNotFoundError as missing:
    _missing: str | None = missing.name
else:
    _missing = None


class Tracing:
    """The tracing of a daemon: `spans` observes, `export` sends.

    Args:
        settings: the operator's.
        identity: the ledger's own name.

    Raises:
        SettingsError: the packages of the extra are not installed.
    """

    def __init__(self, settings: Settings, identity: str) -> None:
        if _missing is not None:
            raise SettingsError(
                f"tracing.enabled: there is no module {_missing}; install the extra: "
                "pip install 'jef-daemon[tracing]'"
            )
        self.export = Export(settings.tracing, identity)
        names, tracebacks = Names(settings.prefix), settings.jobs.tell_tracebacks
        self.spans = Spans(self.export.emit, self.export.samples, names, tracebacks=tracebacks)

    def take(self, dumped: Sequence[str]) -> None:
        """Take spans that an executor made in another process."""
        for one in dumped:
            self.export.emit(load(one))
