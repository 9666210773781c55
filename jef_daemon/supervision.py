"""Tells systemd how the daemon is: READY, RELOADING, STOPPING, STATUS, and WATCHDOG only while everything answers.

The protocol of sd_notify(3) is one datagram to the socket that `NOTIFY_SOCKET` names; without it nothing is sent.
The watchdog is fed from the event loop after every part that could hang has answered. A broker that is away or a
full disk is no hang: the daemon waits for them as it should, says so, and a restart would not bring them back; it
would interrupt what runs.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

log = structlog.get_logger()

_STATUS_EVERY_S = 1.0
_ASK_EVERY_S = 5.0
_PATIENCE_S = 15.0
"""A part that takes longer to answer hangs. Shorter where the watchdog's time is short."""
_EXTEND_EVERY_S = 20.0
_STARTING_LIMIT_S = 60.0
"""Asked of systemd again and again while the broker is waited for at the start."""


Answers = Callable[[float], Awaitable[bool]]
"""Asks a part, for so many seconds at most: True, it works, or waits for something outside as it should."""


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
        self._silent: list[str] = []
        """Parts that did not answer when they were asked last."""

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

    def stopping(self, status: str) -> None:
        """SIGTERM came."""
        self._told = status
        self._notify(f"STOPPING=1\nSTATUS={status}")

    def starting(self) -> None:
        """Still on the way up (or reloading), and alive: it may take its time."""
        self._notify(f"EXTEND_TIMEOUT_USEC={int(_STARTING_LIMIT_S * 1e6)}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; told where it is another one."""
        text = text.replace("\n", "; ")
        if text != self._told:
            self._told = text
            self._notify(f"STATUS={text}")

    async def run(
        self, status: Callable[[], str], parts: Mapping[str, Answers], is_steady: Callable[[], bool]
    ) -> None:
        """Tell the status, feed the watchdog, until cancelled.

        Args:
            status: what the daemon does, in a line; asked once a second.
            parts: those that could hang, by name.
            is_steady: False while it starts or reloads: systemd is asked for time.
        """
        if not self.is_supervised:
            return
        async with asyncio.TaskGroup() as lines:
            lines.create_task(self._tell(status, is_steady), name="status")
            lines.create_task(self._watch(parts), name="watchdog")

    async def feed(self, parts: Mapping[str, Answers]) -> bool:
        """Ask every part; feed the watchdog if all answer. Returns whether they did."""
        patience_s = min(_PATIENCE_S, self._watchdog_s / 4) if self._watchdog_s else _PATIENCE_S
        answers = await asyncio.gather(*(_ask(part, patience_s) for part in parts.values()))
        silent = [name for name, answered in zip(parts, answers, strict=True) if not answered]
        if silent and silent != self._silent:
            log.error("hangs", parts=silent, consequence="the watchdog is not fed")
        elif self._silent and not silent:
            log.info("answers_again", parts=self._silent)
        self._silent = silent
        if not silent and self._watchdog_s:
            self._notify("WATCHDOG=1")
        return not silent

    async def _tell(self, status: Callable[[], str], is_steady: Callable[[], bool]) -> None:
        extended_at = -_EXTEND_EVERY_S
        while True:
            self.status(status())
            now = time.monotonic()
            if not is_steady() and now - extended_at >= _EXTEND_EVERY_S:
                extended_at = now
                self.starting()
            await asyncio.sleep(_STATUS_EVERY_S)

    async def _watch(self, parts: Mapping[str, Answers]) -> None:
        # systemd advises half of the interval; a third leaves room for one late answer.
        pause_s = min(_ASK_EVERY_S, self._watchdog_s / 3) if self._watchdog_s else _ASK_EVERY_S
        while True:
            await self.feed(parts)
            await asyncio.sleep(pause_s)

    def _notify(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            log.debug("systemd_not_told", message=message, reason=str(error))


async def _ask(part: Answers, patience_s: float) -> bool:
    try:
        async with asyncio.timeout(2 * patience_s):  # of one that does not keep to its time
            return await part(patience_s)
    except TimeoutError:
        return False
