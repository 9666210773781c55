"""Lock messages on the wire: every request and answer against the published schemas, and whatever is no request."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.errors import RequestRefused
from jef_daemon.lock import wire
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Cancel,
    ForceRelease,
    Inspect,
    Keep,
    Place,
    Refused,
    Release,
    Renew,
    Reply,
    Request,
    ResourceState,
)
from jef_daemon.lock.state import Grant, Mode, Waiter
from tests.unit.test_schemas import check

X = {"resource": "asset/42", "mode": "EXCLUSIVE"}
S = {"resource": "asset/43", "mode": "SHARED"}
WHERE: dict[str, Any] = {"reply_to": "me", "correlation_id": "c"}


def decode(message: Any, limit: int = 10_000) -> Request:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return wire.decode(body, limit, "me", "c")


# --- requests ----------------------------------------------------------------------------------------------

REQUESTS: list[tuple[dict[str, Any], Request]] = [
    (
        {"operation": "acquire", "owner": "624", "locks": [X], "leaseSeconds": 60, "wait": True},
        Acquire(owner="624", locks=(("asset/42", Mode.EXCLUSIVE),), lease_s=60.0, **WHERE),
    ),
    (
        {"operation": "acquire", "owner": "o", "locks": [S, X], "wait": False, "waitLeaseSeconds": 9},
        Acquire(
            owner="o",
            locks=(("asset/43", Mode.SHARED), ("asset/42", Mode.EXCLUSIVE)),
            wait=False,
            wait_lease_s=9.0,
            **WHERE,
        ),
    ),
    (
        {"operation": "acquire", "owner": "o", "locks": [{"resource": "x"}], "sole": True},
        Acquire(owner="o", locks=(("x", Mode.EXCLUSIVE),), sole=True, **WHERE),
    ),
    ({"operation": "acquire", "owner": "o"}, Acquire(owner="o", locks=(), **WHERE)),
    ({"operation": "renew", "owner": "o"}, Renew(owner="o", **WHERE)),
    (
        {"operation": "renew", "owner": "o", "locks": [X, S], "leaseSeconds": 1.5},
        Renew(owner="o", resources=("asset/42", "asset/43"), lease_s=1.5, **WHERE),
    ),
    (
        {
            "operation": "renew",
            "owners": ["a", "b"],
            "leaseSeconds": 20,
            "waitLeaseSeconds": 90,
            "sole": True,
        },
        Keep(owner="", owners=("a", "b"), lease_s=20.0, wait_lease_s=90.0, sole=True, **WHERE),
    ),
    (
        {"operation": "renew", "owners": [], "leaseSeconds": 20},
        Keep(owner="", owners=(), lease_s=20.0, wait_lease_s=20.0, **WHERE),
    ),
    ({"operation": "release", "owner": "o"}, Release(owner="o", **WHERE)),
    (
        {"operation": "release", "owner": "o", "locks": [{"resource": "x"}], "sole": True},
        Release(owner="o", resources=("x",), sole=True, **WHERE),
    ),
    ({"operation": "cancel", "owner": "o"}, Cancel(owner="o", **WHERE)),
    ({"operation": "inspect"}, Inspect(owner="", **WHERE)),
    (
        {"operation": "inspect", "locks": [{"resource": "x"}], "after": "w", "owner": "me"},
        Inspect(owner="me", resources=("x",), after="w", **WHERE),
    ),
    (
        {"operation": "force-release", "locks": [X], "reason": "stuck", "by": "ann", "owner": "o"},
        ForceRelease(resource="asset/42", owner="o", reason="stuck", by="ann", **WHERE),
    ),
    (
        {"operation": "force-release", "locks": [X]},
        ForceRelease(resource="asset/42", owner=None, reason="", by="an operator", **WHERE),
    ),
]


@pytest.mark.parametrize(("message", "request_"), REQUESTS)
def test_every_request_is_read(message: dict[str, Any], request_: Request) -> None:
    """Unknown keys change nothing; the schema takes it too."""
    assert check("LockRequest", message) == []
    assert decode(message) == request_
    assert decode({**message, "madeUp": [1], "x": None}) == request_


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        (
            wire.acquire("1", [("x", "SHARED")], 60.0, 600.0),
            Acquire(
                owner="1",
                locks=(("x", Mode.SHARED),),
                lease_s=60.0,
                wait_lease_s=600.0,
                sole=True,
                **WHERE,
            ),
        ),
        (wire.release("1"), Release(owner="1", sole=True, **WHERE)),
        (
            wire.keep(["1", "2"], 120.0, 600.0),
            Keep(owner="", owners=("1", "2"), lease_s=120.0, wait_lease_s=600.0, sole=True, **WHERE),
        ),
    ],
)
def test_what_a_daemon_says_is_understood(body: bytes, request_: Request) -> None:
    assert decode(body) == request_
    assert check("LockRequest", json.loads(body)) == []


WRONG: list[tuple[Any, str, str]] = [
    (b"", "not-json", ""),
    (b"nonsense", "not-json", ""),
    (b"\xff\xfe", "not-json", ""),
    (b'{"operation": "inspect"', "not-json", ""),
    (b'{"operation": "inspect"} {}', "not-json", ""),
    (b'{"operation": "renew", "owner": "o", "leaseSeconds": NaN}', "not-json", ""),
    (b'{"operation": "renew", "owner": "o", "leaseSeconds": Infinity}', "not-json", ""),
    (b'{"operation": "renew", "owner": "\\ud800"}', "not-json", ""),
    (b"[" * 5000, "not-json", ""),
    (b"x" * 10_001, "body-too-long", "10001"),
    ([], "not-an-object", ""),
    ("acquire", "not-an-object", ""),
    (None, "not-an-object", ""),
    (42, "not-an-object", ""),
    ({}, "field-invalid", "operation"),
    ({"operation": "steal", "owner": "o"}, "field-invalid", "operation"),
    ({"operation": "ACQUIRE", "owner": "o"}, "field-invalid", "operation"),
    ({"operation": None, "owner": "o"}, "field-invalid", "operation"),
    ({"operation": "acquire", "locks": [X]}, "field-invalid", "owner"),
    ({"operation": "release", "owner": ""}, "field-invalid", "owner"),
    ({"operation": "cancel"}, "field-invalid", "owner"),
    ({"operation": "acquire", "owner": 624, "locks": [X]}, "field-invalid", "owner"),
    ({"operation": "acquire", "owner": None, "locks": [X]}, "field-invalid", "owner"),
    ({"operation": "acquire", "owner": "o", "locks": X}, "field-invalid", "locks"),
    ({"operation": "acquire", "owner": "o", "locks": ["x"]}, "field-invalid", "locks"),
    ({"operation": "acquire", "owner": "o", "locks": [{"mode": "SHARED"}]}, "field-invalid", "resource"),
    ({"operation": "acquire", "owner": "o", "locks": [{"resource": 1}]}, "field-invalid", "resource"),
    (
        {"operation": "acquire", "owner": "o", "locks": [{"resource": "x", "mode": "shared"}]},
        "field-invalid",
        "mode",
    ),
    ({"operation": "acquire", "owner": "o", "locks": [{**X, "mode": None}]}, "field-invalid", "mode"),
    ({"operation": "acquire", "owner": "o", "leaseSeconds": "60"}, "field-invalid", "leaseSeconds"),
    ({"operation": "acquire", "owner": "o", "leaseSeconds": None}, "field-invalid", "leaseSeconds"),
    ({"operation": "acquire", "owner": "o", "waitLeaseSeconds": []}, "field-invalid", "waitLeaseSeconds"),
    ({"operation": "acquire", "owner": "o", "wait": "yes"}, "field-invalid", "wait"),
    ({"operation": "acquire", "owner": "o", "wait": 1}, "field-invalid", "wait"),
    ({"operation": "acquire", "owner": "o", "sole": "no"}, "field-invalid", "sole"),
    ({"operation": "renew", "owners": "o"}, "field-invalid", "owners"),
    ({"operation": "renew", "owners": [1]}, "field-invalid", "owners"),
    ({"operation": "inspect", "after": 1}, "field-invalid", "after"),
    ({"operation": "force-release", "reason": "r"}, "field-invalid", "locks"),
    ({"operation": "force-release", "locks": [X, S], "reason": "r"}, "field-invalid", "locks"),
    ({"operation": "force-release", "locks": [X], "reason": 1}, "field-invalid", "reason"),
    ({"operation": "force-release", "locks": [X], "reason": "r", "by": {}}, "field-invalid", "by"),
]

BY_OPERATION = (
    {"operation": "acquire", "locks": [X]},
    {"operation": "release", "owner": ""},
    {"operation": "cancel"},
    {"operation": "force-release", "reason": "r"},
    {"operation": "force-release", "locks": [X, S], "reason": "r"},
)
"""Right in form; what is missing depends on the operation."""


@pytest.mark.parametrize(("message", "code", "named"), WRONG, ids=[str(one[0])[:70] for one in WRONG])
def test_what_is_no_request_is_refused_with_a_code(message: Any, code: str, named: str) -> None:
    """And a sentence that names the field. The schema refuses it too, where a schema can say so."""
    with pytest.raises(RequestRefused) as refused:
        decode(message)
    assert refused.value.code == code
    assert named in refused.value.detail
    assert refused.value.detail
    if code == "field-invalid" and message not in BY_OPERATION:
        assert check("LockRequest", message) != []


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["operation", "owner", "owners", "locks", "leaseSeconds", "sole"]),
                inner,
                max_size=4,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_comes_is_a_request_or_refused(body: bytes) -> None:
    """Nothing else is raised, so nothing stops the service."""
    with contextlib.suppress(RequestRefused):
        wire.decode(body, 1000, None, None)


# --- answers -----------------------------------------------------------------------------------------------

GRANT = Grant("asset/42", Mode.EXCLUSIVE, "624", 17, 1_795_489_560.0, 1_795_489_500.5)
WAITER = Waiter(3, "625", (("asset/42", Mode.SHARED),), "q", "c", 1_795_489_501.0, 2e9, 60.0, "asset/42")
TOLD_GRANT = {
    "resource": "asset/42",
    "mode": "EXCLUSIVE",
    "fencingToken": 17,
    "leaseUntil": "2026-11-24T03:06:00.000Z",
}
ANSWERS: list[tuple[Reply, dict[str, Any]]] = [
    (
        Reply(Answer.GRANTED, "624", "q", "c", grants=(GRANT,)),
        {"status": "GRANTED", "owner": "624", "grants": [TOLD_GRANT]},
    ),
    (
        Reply(Answer.WAITING, "625", "q", "c", place=Place("asset/42", Mode.SHARED, 2, ("624",))),
        {
            "status": "WAITING",
            "owner": "625",
            "resource": "asset/42",
            "mode": "SHARED",
            "position": 2,
            "holders": ["624"],
        },
    ),
    (Reply(Answer.WAITING, "625", "q", "c"), {"status": "WAITING", "owner": "625"}),
    (
        Reply(Answer.REFUSED, "625", "q", "c", reason="too many", code=Refused.LIMIT),
        {"status": "REFUSED", "owner": "625", "code": "limit", "reason": "too many"},
    ),
    (
        Reply(Answer.RENEWED, "624", "q", "c", grants=(GRANT,)),
        {"status": "RENEWED", "owner": "624", "grants": [TOLD_GRANT]},
    ),
    (
        Reply(Answer.LOST, "624", "q", "c", lost=("asset/43",), reason="not held"),
        {"status": "LOST", "owner": "624", "lost": ["asset/43"], "reason": "not held"},
    ),
    (
        Reply(Answer.KEPT, "", "q", "c", held=("1",), lost=("2", "3")),
        {"status": "KEPT", "owner": "", "held": ["1"], "lost": ["2", "3"]},
    ),
    (Reply(Answer.KEPT, "", "q", "c"), {"status": "KEPT", "owner": "", "held": [], "lost": []}),
    (Reply(Answer.RELEASED, "624", "q", "c"), {"status": "RELEASED", "owner": "624"}),
    (Reply(Answer.CANCELLED, "624", "q", "c"), {"status": "CANCELLED", "owner": "624"}),
    (
        Reply(Answer.EXPIRED, "624", "q", "c", grants=(GRANT,), lost=("asset/42",), reason="the lease ended"),
        {
            "status": "EXPIRED",
            "owner": "624",
            "grants": [TOLD_GRANT],
            "lost": ["asset/42"],
            "reason": "the lease ended",
        },
    ),
    (
        Reply(Answer.REVOKED, "624", "q", "c", grants=(GRANT,), lost=("asset/42",), reason="by ann: stuck"),
        {
            "status": "REVOKED",
            "owner": "624",
            "grants": [TOLD_GRANT],
            "lost": ["asset/42"],
            "reason": "by ann: stuck",
        },
    ),
    (
        Reply(Answer.STATE, "", "q", "c", states=(ResourceState("asset/42", 17, (GRANT,), (WAITER,), 1),)),
        {
            "status": "STATE",
            "owner": "",
            "resources": [
                {
                    "resource": "asset/42",
                    "fencingToken": 17,
                    "holders": [TOLD_GRANT | {"owner": "624", "grantedAt": "2026-11-24T03:05:00.500Z"}],
                    "waiters": [{"owner": "625", "mode": "SHARED", "askedAt": "2026-11-24T03:05:01.000Z"}],
                    "waiting": 1,
                }
            ],
        },
    ),
    (Reply(Answer.STATE, "", "q", "c"), {"status": "STATE", "owner": "", "resources": []}),
]


@pytest.mark.parametrize(("reply", "told"), ANSWERS)
def test_every_answer_is_sent_as_published(reply: Reply, told: dict[str, Any]) -> None:
    """Key by key; the schema and the daemon's own client take it."""
    sent = json.loads(wire.encode(reply))
    assert sent == told
    assert check("LockReply", sent) == []
    read = wire.decode_reply(wire.encode(reply))
    assert (read.status, read.owner) == (reply.status, reply.owner)


def test_every_answer_is_looked_at() -> None:
    assert {reply.status for reply, _ in ANSWERS} == set(Answer)


@pytest.mark.parametrize(
    "wrong", [{"status": "GRANTED", "grants": [{}]}, {"grants": []}, {"status": "WAITING", "mode": "BOTH"}]
)
def test_the_schema_of_answers_says_no_too(wrong: dict[str, Any]) -> None:
    assert check("LockReply", wrong) != []
