"""A way to the broker that a test can make silent, or cut."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Hands bytes on, in both directions, while it may.

    Args:
        url: the broker's.
        certificate: TLS on our side, with a file of certificate and key.
    """

    def __init__(self, url: str, certificate: Path | None = None) -> None:
        self._certificate = certificate
        self._parts = urlsplit(url)
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        tls = None
        if self._certificate is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificate)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    @property
    def url(self) -> str:
        """Where the broker seems to be."""
        port = self._server.sockets[0].getsockname()[1]
        user, _, _ = self._parts.netloc.rpartition("@")
        scheme = "amqps" if self._certificate else self._parts.scheme
        return urlunsplit(self._parts._replace(scheme=scheme, netloc=f"{user}@127.0.0.1:{port}"))

    def freeze(self) -> None:
        """Everything stays open, connections are taken, and nothing moves."""
        self._flows.clear()

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        self._is_cut = True
        for writer in list(self._open):
            writer.close()

    def mend(self) -> None:
        """Be as at the beginning."""
        self._is_cut = False
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.close()
            return
        there, back = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._open |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        self._open.discard(writer)
        writer.close()
