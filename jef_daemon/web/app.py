"""Which address does what. Every answer is JSON, except the metrics'.

GET  /livez                       whether the event loop answers
GET  /readyz                      whether the parts work, each with its word
GET  /metrics                     for Prometheus
POST /executions/{id}/updates     an update of an async job, with its attempt's token
POST /executions/{id}/cancel      operators: cancel it
GET  /executions/{id}             operators: all about it, as `jef show --json` has it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic_core import from_json, to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jef_daemon.elsewhere import GONE
from jef_daemon.errors import RequestRefused
from jef_daemon.messages import Control, Update, decode_control, decode_update
from jef_daemon.ports import Consequences
from jef_daemon.web.health import Ask, ask_all
from jef_daemon.web.receiving import Refused, answer, bearer, body_of, check_operator, object_of, refusal

T = TypeVar("T")

_PATIENCE_S = 20.0
"""A ledger or a broker that takes longer is not waited for: whoever asked should ask again."""


class Takes(Protocol):
    """Whoever takes updates and commands (`updates.Updates`)."""

    async def report(self, update: Update) -> dict[str, object]:
        """See `Updates.report`."""
        ...

    async def pass_on(self, update: Update) -> bool | None:
        """See `Updates.pass_on`."""
        ...

    async def command(self, control: Control, actor: str) -> Consequences:
        """See `Updates.command`."""
        ...

    async def knows(self, execution_id: str) -> bool:
        """See `Updates.knows`."""
        ...

    def note_unread(self, reason: str) -> None:
        """See `Updates.note_unread`."""
        ...


@dataclass
class Doors:
    """What the HTTP port sees of the daemon."""

    updates: Takes
    show: Callable[[str], Awaitable[dict[str, Any] | None]]
    """All about an execution; None: it is not known."""
    parts: Mapping[str, Ask]
    """Who is asked for readiness, by name."""
    exposition: Callable[[str], Awaitable[tuple[bytes, str]]]
    """The metrics and their content type, for a header `Accept`."""
    token: str | None
    """The operators'; None: there are none."""
    max_body_bytes: int
    """Longest message; may change."""


def application(doors: Doors) -> Starlette:
    """The addresses, behind which the doors are."""
    web = _Web(doors)
    return Starlette(
        routes=[
            Route("/livez", web.live),
            Route("/readyz", web.ready),
            Route("/metrics", web.metrics),
            Route("/executions/{id}/updates", web.update, methods=["POST"]),
            Route("/executions/{id}/cancel", web.cancel, methods=["POST"]),
            Route("/executions/{id}", web.show),
        ],
        exception_handlers={Refused: refusal},
    )


_PASSED_ON: dict[bool, tuple[dict[str, object], int]] = {
    True: ({"accepted": True, "reason": "passed on to the daemon of its token, which decides"}, 202),
    False: ({"accepted": False, "reason": GONE}, 404),
}
"""What is answered to an update for another daemon, by whether there is one."""


class _Web:
    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def live(self, request: Request) -> Response:
        """Whether the process answers at all; asks nobody."""
        return answer({"alive": True})

    async def ready(self, request: Request) -> Response:
        """Whether every part works, and what each says; 503 where one does not."""
        words = await ask_all(self._doors.parts)
        works = all(word.works for word in words.values())
        parts = {name: {"works": word.works, "word": word.word} for name, word in words.items()}
        return answer({"ready": works, "parts": parts}, 200 if works else 503)

    async def metrics(self, request: Request) -> Response:
        """The metrics, in the format that is asked for."""
        body, kind = await self._doors.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Cache-Control": "no-store", "Content-Type": kind})

    async def update(self, request: Request) -> Response:
        """An update of an async job, taken here or passed on to the daemon of its token."""
        try:
            update = await self._update_of(request)
        except Refused as refused:
            self._doors.updates.note_unread("no-token" if refused.status == 401 else "malformed")
            raise
        async with _in_time():
            passed_on = await self._doors.updates.pass_on(update)
            if passed_on is not None:
                return answer(*_PASSED_ON[passed_on])
            told = await self._doors.updates.report(update)
            if told["accepted"]:
                return answer(told)
            known = await self._doors.updates.knows(update.execution_id)
            return answer(told, 409 if known else 404)

    async def _update_of(self, request: Request) -> Update:
        raw = await self._body(request)
        given, sent = bearer(request), raw.get("token")
        if given is None and sent is None:
            raise Refused(401, "an update needs its attempt's token: in the body, or Authorization: Bearer …")
        if given is not None and sent not in {None, given}:
            raise Refused(422, "field-invalid: token: the body's is not that of the header Authorization")
        raw["token"] = sent if sent is not None else given
        return _decoded(decode_update, raw)

    async def cancel(self, request: Request) -> Response:
        """An operator cancels; 202 where it is asked of who runs it, 200 where it is done."""
        check_operator(request, self._doors.token)
        raw = await self._body(request, may_be_empty=True)
        control = _decoded(decode_control, raw | {"command": "cancel", "workflowId": None})
        async with _in_time():
            told = (await self._doors.updates.command(control, f"operator:{control.by}")).answers[-1]
        if not told["accepted"]:
            return answer(told, 409)
        return answer(told, 200 if told["status"] == "CANCELLED" else 202)

    async def show(self, request: Request) -> Response:
        """All about an execution, for operators."""
        check_operator(request, self._doors.token)
        found = await self._doors.show(request.path_params["id"])
        if found is None:
            return answer({"reason": f"no execution {request.path_params['id']} is in this ledger"}, 404)
        return answer(found)

    async def _body(self, request: Request, *, may_be_empty: bool = False) -> dict[str, Any]:
        """The JSON object of the body, with the execution that the address names."""
        body = await body_of(request, self._doors.max_body_bytes)
        try:
            raw = object_of(from_json(b"{}" if may_be_empty and not body else body, allow_inf_nan=False))
        except ValueError as error:
            raise Refused(422, f"not-json: {error}") from None
        named = request.path_params["id"]
        if raw.setdefault("executionId", named) != named:
            raise Refused(422, "field-invalid: executionId: the body's is not that of the address")
        return raw


def _decoded(decode: Callable[[bytes, int], T], raw: dict[str, Any]) -> T:
    body = to_json(raw)
    try:
        return decode(body, len(body))
    except RequestRefused as error:
        raise Refused(422, f"{error.code}: {error.detail}") from None


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield
    except TimeoutError:
        raise Refused(503, "the daemon does not answer now; ask again") from None
    except ConnectionError as error:
        raise Refused(503, f"the broker does not answer now ({error}); ask again") from None
