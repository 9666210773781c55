"""Services that the action `http` talks to: the example as a process, and one that does as it is told."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.process import ROOT


class RenderService:
    """`examples/render_service.py`, a process of its own.

    Args:
        arguments: of its command line.
        port: 0 for any.
    """

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._arguments = [*arguments, "--port", str(port)]
        self.port = port
        self.requests: list[str] = []
        self.process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "examples/render_service.py", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.fullmatch(r"rendering at port (\d+)\n", self.process.stdout.readline())
        assert found, "the service did not start"
        self.port = int(found[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def url(self) -> str:
        """Where jobs are posted."""
        return f"http://127.0.0.1:{self.port}/renders"


class Request:
    """One that came."""

    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode().split("\r\n")
        self.method, self.path = lines[0].split(" ")[:2]
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
        }
        self.body: dict[str, Any] = json.loads(body) if body else {}


class Scripted:
    """Answers each request with the next of some raw responses, and the last one again and again.

    Args:
        responses: whole, with status line; empty: the connection is closed without a word.
    """

    def __init__(self, responses: Sequence[bytes]) -> None:
        self._responses = list(responses)
        self.requests: list[Request] = []
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    @property
    def url(self) -> str:
        """Where jobs are posted."""
        return f"http://127.0.0.1:{self.port}/jobs"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).strip()
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            self.requests.append(Request(head, body))
            response = self._responses[min(len(self.requests), len(self._responses)) - 1]
            writer.write(response)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def response(status: int, body: Any = None, **headers: str) -> bytes:
    """A whole response."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content


def certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that only whoever is given its file trusts, with its key."""
    key, made = folder / "key.pem", folder / "certificate.pem"
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    arguments += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {made}"
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text(made.read_text() + key.read_text())
    return both
