"""One exchange with an HTTP service: limited in time and size, redirects only within the host, safe retries.

Safe to send again: what was never sent, as there was no connection; and what the service itself turned away for the
moment (429, 502, 503, 504), as it can tell repetitions by their Idempotency-Key. Not safe: what was sent and never
answered.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import tenacity

from jef_daemon.actions.hosts import Hosts, origin, shown

if TYPE_CHECKING:
    import httpx

_TURNED_AWAY = frozenset({429, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOPS = 3
"""Redirects in a row."""
_FIRST_S, _MOST_S = 0.5, 10.0
"""Pauses between two tries."""


class ServiceFailure(Exception):
    """The service does not do its part: it cannot be reached, answers nonsense, or says no."""


class _Again(ServiceFailure):
    """It may be sent again.

    Attributes:
        after_s: how long the service asks us to wait; None: it does not say.
    """

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every exchange."""

    timeout_s: float
    """From the connection to the end of the answer."""
    connect_s: float
    max_bytes: int
    """Longest answer."""
    attempts: int
    """Of what is safe to repeat."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the service answered, as far as it is used."""

    status: int
    url: str
    """Where it came from: relative addresses count from here."""
    location: str | None
    kind: str
    """Content type."""
    body: bytes


class Exchange:
    """Talks to services.

    Args:
        hosts: those that may be talked to.
        limits: of every exchange.
        trust: certificates that are trusted.
    """

    def __init__(self, hosts: Hosts, limits: Limits, trust: ssl.SSLContext) -> None:
        self._hosts = hosts
        self._limits = limits
        self._trust = trust

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Reply:
        """Send a request; again where that is safe.

        Args:
            method: GET, POST or DELETE.
            url: checked against the list of hosts, as every address that a redirect names.
            headers: may hold secrets; they are never told.
            body: JSON.

        Raises:
            ServiceFailure: there is no answer that is one.
            ConfigurationRefused: the host is not allowed.
        """
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(self._limits.attempts),
            wait=_pause,
            reraise=True,
        ):
            with attempt:
                return await self._through_redirects(method, url, headers, body)
        raise AssertionError("tenacity returned without an attempt")

    async def _through_redirects(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Reply:
        for _ in range(_HOPS + 1):
            reply = await self._once(method, self._hosts.check(url), headers, body)
            if reply.status not in _REDIRECTS or reply.location is None:
                return reply
            further = urljoin(url, reply.location)
            if origin(further) != origin(url):
                raise ServiceFailure(f"{shown(url)} redirects to another host, which is not followed")
            if method != "GET" and reply.status not in {307, 308}:
                raise ServiceFailure(f"{shown(url)} answers {method} with a redirect {reply.status}")
            url = further
        raise ServiceFailure(f"{shown(url)}: more than {_HOPS} redirects")

    async def _once(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Reply:
        import httpx  # takes time and memory: only where jobs need it; `http.Http` loads it beside the event loop

        limits = self._limits
        # Neither proxies nor passwords from the environment: what is not configured is not used.
        client = httpx.AsyncClient(
            verify=self._trust,
            trust_env=False,
            timeout=httpx.Timeout(limits.timeout_s, connect=limits.connect_s),
        )
        where = shown(url)
        try:
            async with (
                asyncio.timeout(limits.timeout_s),
                client,
                client.stream(method, url, headers=dict(headers), content=body) as response,
            ):
                return await self._read(response, url)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Again(f"{where} cannot be reached: {error or type(error).__name__}") from None
        except TimeoutError:
            raise ServiceFailure(f"{where} did not answer within {limits.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceFailure(
                f"the exchange with {where} broke: {error or type(error).__name__}"
            ) from None

    async def _read(self, response: httpx.Response, url: str) -> Reply:
        status = response.status_code
        if status in _TURNED_AWAY:
            raise _Again(f"{shown(url)} answered {status}", _seconds(response.headers.get("retry-after")))
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise ServiceFailure(f"{shown(url)} answers compressed, which was not asked for")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._limits.max_bytes:
                raise ServiceFailure(
                    f"the answer of {shown(url)} is longer than {self._limits.max_bytes} bytes"
                )
        headers = response.headers
        return Reply(status, url, headers.get("location"), headers.get("content-type", ""), bytes(body))


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.after_s if isinstance(error, _Again) else None
    if asked is not None:
        return min(asked, _MOST_S)
    return float(min(_MOST_S, _FIRST_S * 2 ** (state.attempt_number - 1)) * random.uniform(0.5, 1))  # noqa: S311


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is taken as none."""
    return float(text) if text is not None and text.isdecimal() else None


def trusted(ca_file: Any = None) -> ssl.SSLContext:
    """Certificates are verified: against the system's authorities, or those of a file alone."""
    return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


load_library = partial(__import__, "httpx")
"""Imports what exchanges need; to be called in a thread before the first."""
