"""The listener: uvicorn inside the daemon's event loop, without signal handlers and access log of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import structlog
import uvicorn
from starlette.applications import Starlette

from jef_daemon.errors import SettingsError

log = structlog.get_logger()

_BACKLOG = 128
_KEEP_ALIVE_S = 15
_AT_ONCE = 500
"""Connections; more are answered with 503."""
_LAST_ANSWERS_S = 3
"""For requests under way when it ends."""


class HttpPort:
    """Serves an application until it is closed.

    Args:
        application: what is served.
        host: address to listen on.
        port: 1 to 65535.

    Raises:
        SettingsError: from the constructor: it cannot listen there.
    """

    def __init__(self, application: Starlette, host: str, port: int) -> None:
        self._socket = _listen(host, port)
        self._server = _Quiet(
            uvicorn.Config(
                application,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_AT_ONCE,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_ANSWERS_S,
            )
        )
        self._served = asyncio.Event()
        log.info("http_listening", host=host, port=port)

    async def run(self) -> None:
        """Serve until closed or cancelled."""
        # A task of its own: cancelled in the middle, the server would leave its connections open.
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http server")
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            self._server.should_exit = True
            await asyncio.wait({serving}, timeout=2 * _LAST_ANSWERS_S)
            serving.cancel()
            raise
        finally:
            self._socket.close()
            self._served.set()

    async def finish(self) -> None:
        """Take no more requests, answer those under way."""
        self._server.should_exit = True
        await self._served.wait()


class _Quiet(uvicorn.Server):
    """Signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"http_host {host} is no address here: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"the HTTP port {host}:{port} cannot be had ({error.strerror}); set http_port, or http_host, to another"
        ) from None
    return listening
