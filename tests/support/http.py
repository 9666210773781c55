"""Ports and a client for tests of HTTP, on loopback."""

from __future__ import annotations

import socket

import httpx


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def client_of(port: int, token: str | None = None) -> httpx.AsyncClient:
    """A client of a daemon's HTTP port."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=10
    )
