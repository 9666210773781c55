"""What comes in by HTTP: bodies of limited length, tokens compared in constant time, refusals as JSON."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

_BODY_S = 30.0
"""Whoever sends slower than this is not waited for."""
_DISCARDED_BYTES = 16 * 1024 * 1024
"""Read beyond the limit and thrown away: whoever is cut off while sending never reads why."""
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Refused(Exception):
    """A request that is answered with its status and a sentence, and does nothing.

    Attributes:
        status: of HTTP.
        reason: a sentence.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def answer(told: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, never cached."""
    kept = {"Cache-Control": "no-store", **(headers or {})}
    return Response(to_json(told), status, kept, "application/json")


def refusal(request: Request, error: Exception) -> Response:
    """What is told of a `Refused`: the shape of every answer to an update or a command."""
    if not isinstance(error, Refused):
        raise error
    headers = _CHALLENGE if error.status == 401 else {}
    if error.status in {408, 413}:
        headers = {"Connection": "close"}  # the rest of the body is not read
    return answer({"accepted": False, "reason": error.reason}, error.status, headers)


async def body_of(request: Request, limit: int) -> bytes:
    """The body.

    Raises:
        Refused: it is longer than the limit, or does not come.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    body += chunk
                elif size > limit + _DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not come within {_BODY_S:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    if size > limit:
        raise Refused(413, f"body-too-long: {limit} bytes are allowed")
    return bytes(body)


def bearer(request: Request) -> str | None:
    """The token of the header `Authorization`; None: there is none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def check_operator(request: Request, token: str | None) -> None:
    """Let only operators pass.

    Raises:
        Refused: no token is configured, or the request carries another or none.
    """
    if token is None:
        raise Refused(403, "no operator may do this here: http_token_file is not set")
    given = bearer(request)
    if given is None:
        raise Refused(401, "this needs the operators' token: Authorization: Bearer …")
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise Refused(401, "the token is not the operators'")


def object_of(raw: Any) -> dict[str, Any]:
    """A decoded body, which must be a JSON object.

    Raises:
        Refused: it is something else.
    """
    if not isinstance(raw, dict):
        raise Refused(422, "not-an-object: the body should be a JSON object")
    return raw
