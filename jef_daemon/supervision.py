"""Tells systemd how the daemon is: READY, STATUS, STOPPING, and WATCHDOG only while everything truly answers.

The protocol of sd_notify(3) is one datagram to the socket that `NOTIFY_SOCKET` names; without it nothing is sent.
The watchdog is fed from the event loop after the ledger's writer has answered: a loop that hangs, or a writer that
does, is restarted. A broker that is away or a full disk is neither: the daemon waits for them, and a restart would
not bring them back.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

log = structlog.get_logger()

_STATUS_EVERY_S = 5.0
_ANSWER_WITHIN_S = 10.0
"""A ledger that takes longer to answer hangs; a stalled one says so and answers."""
_STARTING_LIMIT_S = 60.0
"""Asked of systemd again and again while the broker is waited for at the start."""


class Supervision:
    """The line to systemd.

    Args:
        environ: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ is Linux's abstract namespace, written as a null byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)  # a listener that does not listen must not stop the event loop
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "") if mine else ""
        self._watchdog_s = int(usec) / 1e6 if usec.isdigit() else 0.0
        self._told = ""

    @property
    def is_supervised(self) -> bool:
        """Whether systemd listens."""
        return self._socket is not None

    def ready(self) -> None:
        """Requests are consumed."""
        self._notify("READY=1")

    def reloading(self) -> None:
        """SIGHUP came; `ready` follows, whatever comes of it."""
        # Of the same clock as systemd's own: it drops the READY of an earlier reload by that.
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """SIGTERM came."""
        self._notify("STOPPING=1")

    def starting(self) -> None:
        """Still on the way up, and alive: the broker may take its time."""
        self._notify(f"EXTEND_TIMEOUT_USEC={int(_STARTING_LIMIT_S * 1e6)}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        if text != self._told:
            self._told = text
            self._notify(f"STATUS={text}")

    async def run(
        self, status: Callable[[], str], answers: Callable[[], Awaitable[object]], ready: asyncio.Event
    ) -> None:
        """Tell the status, feed the watchdog, until cancelled.

        Args:
            status: what the daemon does, in a line.
            answers: done when the parts that could hang have answered.
            ready: set once requests are consumed.
        """
        if not self.is_supervised:
            return
        # systemd advises half of the interval; a third leaves room for one late answer.
        pause_s = min(_STATUS_EVERY_S, self._watchdog_s / 3) if self._watchdog_s else _STATUS_EVERY_S
        while True:
            self.status(status())
            if not ready.is_set():
                self.starting()
            try:
                async with asyncio.timeout(_ANSWER_WITHIN_S):
                    await answers()
            except TimeoutError:
                log.error("ledger_hangs", consequence="the watchdog is not fed")
            else:
                if self._watchdog_s:
                    self._notify("WATCHDOG=1")
            await asyncio.sleep(pause_s)

    def _notify(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            log.debug("systemd_not_told", message=message, reason=str(error))
