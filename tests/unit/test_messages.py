"""The wire: whatever arrives is a request or a refusal with a code; what is told has exactly its keys."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jef_daemon import events, messages, notifications
from jef_daemon.errors import Fate, RequestRefused
from jef_daemon.lifecycle import Execution, Status, apply
from jef_daemon.messages import decode_request

CODES = {
    "body-too-long",
    "not-json",
    "not-an-object",
    "execution-id-missing",
    "execution-id-malformed",
    "field-invalid",
}
HEADING = ["executionId", "workflowId", "progress", "message", "status"]
"""The seed's five, in this order."""
REST = ["action", "attempt", "sequence", "timestamp"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
finite = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
variables = st.dictionaries(texts, finite, max_size=3)
ids = st.text(string.ascii_letters + string.digits + "._:-", min_size=1, max_size=128)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)
seconds = st.none() | st.floats(0.001, 1e8)
instants = st.datetimes(datetime(1980, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
keys = st.sampled_from(
    [
        "executionId",
        "workflowId",
        "configuration",
        "jobContextVariables",
        "workflowContextVariables",
        "locks",
        "workflowLocks",
        "priority",
        "notBefore",
        "timeouts",
        "execution_id",
        "not_before",
        "new",
    ]
)
requests = st.fixed_dictionaries(
    {"executionId": ids},
    optional={
        "workflowId": st.none() | names,
        "configuration": variables,
        "jobContextVariables": variables,
        "workflowContextVariables": variables,
        "locks": st.lists(
            st.fixed_dictionaries({"resource": names, "mode": st.sampled_from(["SHARED", "EXCLUSIVE"])}),
            max_size=3,
        ),
        "workflowLocks": st.lists(
            st.fixed_dictionaries(
                {"resource": names, "mode": st.just("SHARED"), "fencingToken": st.integers(0, 2**40)}
            ),
            max_size=2,
        ),
        "priority": st.integers(-1000, 1000),
        "notBefore": st.none() | instants.map(lambda instant: instant.isoformat()),
        "timeouts": st.fixed_dictionaries(
            {}, optional=dict.fromkeys(["queue", "lock", "update", "execution"], seconds)
        ),
    },
)


def refusal(body: bytes | dict[str, Any], **limits: int) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        decode_request(body if isinstance(body, bytes) else json.dumps(body).encode(), **limits)
    return caught.value


def check_decodes(body: bytes) -> None:
    refused = None
    try:
        decode_request(body)
    except RequestRefused as error:
        refused = error
    if refused is not None:
        assert refused.code in CODES
        assert refused.detail
        assert refused.fate is Fate.DEAD_LETTER


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b'{"executionId": "\\ud800"}')
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b'{"executionId":"1","priority":' + b"9" * 5000 + b"}")
@example(b'{"executionId":"1","timeouts":{"queue":1e999}}')
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    """Nothing else stops: no other exception, whatever came."""
    check_decodes(body)


@given(st.dictionaries(keys, values, max_size=6) | values)
@example({"execution_id": "1", "priority": "high"})
def test_any_json_is_a_request_or_a_refusal(body: object) -> None:
    """The same for what is JSON, NaN and Infinity included."""
    check_decodes(json.dumps(body).encode())


@given(requests, keys, values)
def test_a_request_with_one_wrong_field(request: dict[str, Any], key: str, value: object) -> None:
    """Close to valid is where a decoder goes wrong."""
    check_decodes(json.dumps(request | {key: value}).encode())


@given(requests)
def test_what_was_sent_is_what_is_read(request: dict[str, Any]) -> None:
    """Every field, and the defaults of those that were left out."""
    read = decode_request(json.dumps(request).encode()).model_dump(mode="json", by_alias=True)
    instant = request.get("notBefore")
    assert read.pop("notBefore") == (instant and instant.replace("+00:00", "Z"))
    timeouts = dict.fromkeys(["queue", "lock", "update", "execution"]) | request.get("timeouts", {})
    assert read.pop("timeouts") == timeouts
    defaults: dict[str, Any] = {
        "workflowId": None,
        "stage": None,
        "configuration": {},
        "jobContextVariables": {},
        "workflowContextVariables": {},
        "locks": [],
        "workflowLocks": [],
        "priority": 0,
        "retry": None,
    }
    sent = {key: value for key, value in request.items() if key not in {"notBefore", "timeouts"}}
    assert read == defaults | sent


@given(requests, texts.filter(lambda key: key not in messages.JobRequest.model_json_schema()["properties"]))
@example({"executionId": "1"}, "execution_id")
@example({"executionId": "1"}, "not_before")
def test_unknown_keys_are_ignored(request: dict[str, Any], key: str) -> None:
    """Producers can evolve; only camel case is the wire's."""
    body = json.dumps(request | {key: {"new": 1}}).encode()
    assert decode_request(body) == decode_request(json.dumps(request).encode())


def test_the_longest_body() -> None:
    """The limit itself is allowed; what is longer is not even parsed."""
    body = b'{"executionId":"1"}'
    assert decode_request(body, len(body)).execution_id == "1"
    assert refusal(body, limit=len(body) - 1).code == "body-too-long"
    assert refusal(b" " * (2**20 + 1)).code == "body-too-long"
    assert refusal(b" " * 2**20).code == "not-json"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"executionId":"1"} x', b'{"priority":NaN}'])
def test_not_json(body: bytes) -> None:
    assert refusal(body).code == "not-json"


@pytest.mark.parametrize(
    "number",
    [
        "1e999",
        "-1E+400",
        "1.5e309",
        f"1{'0' * 310}.0",
        f"[1, [-{'9' * 400}.5]]",
        f"1{'0' * 215}e99",
        f"9{'0' * 305}.0e3",
    ],
)
def test_a_number_that_is_infinite_to_most_readers_is_not_json(number: str) -> None:
    """They would be told of `Infinity`, which is no JSON."""
    said = refusal(f'{{"executionId":"1","configuration":{{"x":{number}}}}}'.encode())
    assert (said.code, "beyond 1.8e308" in said.detail) == ("not-json", True)


@pytest.mark.parametrize(
    "value", ["1e308", "1e-999", f"1{'0' * 400}", '"1e999"', '":1e999"', '"a1e999"', "1.0"]
)
def test_a_number_is_taken_that_is_finite(value: str) -> None:
    body = f'{{"executionId":"1","configuration":{{"x":{value}}}}}'
    assert decode_request(body.encode()).configuration["x"] == json.loads(body)["configuration"]["x"]


@pytest.mark.parametrize(
    ("decode", "body"),
    [
        (messages.decode_workflow_request, {"workflowId": "w", "workflow": "w", "variables": {}}),
        (
            messages.decode_update,
            {"executionId": "1", "status": "COMPLETED", "token": "t", "jobContextVariables": {}},
        ),
        (messages.decode_control, {"command": "retry", "workflowId": "w", "configuration": {"a": {}}}),
    ],
    ids=["workflow", "update", "command"],
)
def test_variables_nest_so_deep_and_no_deeper(decode: Callable[[bytes], Any], body: dict[str, Any]) -> None:
    """What is made of them is read again, within more: readers of JSON have their limits."""
    key = list(body)[-1]
    inner, room = (body[key]["a"], 98) if key == "configuration" else (body[key], 99)
    value: Any = '}]"[{' * 50
    for number in range(room):
        value = {"k": value} if number % 2 else [value]
    inner["x"] = value
    decode(json.dumps(body).encode())
    inner["x"] = [value]
    with pytest.raises(RequestRefused, match="the variables nest deeper than 100 levels"):
        decode(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[]", "array"), (b'"1"', "string"), (b"1", "number"), (b"null", "null")]
)
def test_not_an_object(body: bytes, kind: str) -> None:
    error = refusal(body)
    assert error.code == "not-an-object"
    assert kind in error.detail


@pytest.mark.parametrize("body", [{}, {"executionId": None}, {"execution_id": "1"}])
def test_no_execution_id(body: dict[str, Any]) -> None:
    error = refusal(body)
    assert (error.code, error.execution_id) == ("execution-id-missing", None)
    assert "executionId" in error.detail


@pytest.mark.parametrize("value", ["", "a b", "a\n", "é", "x" * 129, 624, ["1"], "1/2"])
def test_a_malformed_execution_id(value: object) -> None:
    """No id could be read, so nobody is told."""
    error = refusal({"executionId": value, "priority": "x"})
    assert (error.code, error.execution_id) == ("execution-id-malformed", None)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("locks", [{"resource": "a", "mode": "shared"}], "locks.0.mode"),
        ("locks", [{"mode": "SHARED"}], "locks.0.resource"),
        ("locks", {}, "locks"),
        ("priority", "5", "priority"),
        ("priority", True, "priority"),
        ("configuration", [], "configuration"),
        ("jobContextVariables", None, "jobContextVariables"),
        ("workflowId", 9, "workflowId"),
        ("notBefore", "tomorrow", "notBefore"),
        ("notBefore", "2026-11-24T03:06:00", "notBefore"),
        ("notBefore", 1_764_000_000, "notBefore"),
        ("notBefore", "1764000000", "notBefore"),
        ("timeouts", {"update": -1}, "timeouts.update"),
        ("timeouts", {"update": "300"}, "timeouts.update"),
    ],
)
def test_a_wrong_field_is_named(key: str, value: object, field: str) -> None:
    """The id could be read, so that a FAILED notification can be told."""
    error = refusal({"executionId": "624", key: value})
    assert (error.code, error.execution_id) == ("field-invalid", "624")
    assert f"{field}: " in error.detail


# --- what is told ----------------------------------------------------------------------------------------


def tell(status: Status, event: events.Event, **fields: Any) -> dict[str, Any]:
    execution = Execution("624", "transcode", status=status, sequence=2, progress=25, **fields)
    return dict(json.loads(notifications.notification(apply(execution, event, 1795489560.1239))))


def test_the_heading() -> None:
    """The seed's five keys are always there, first and in their order."""
    told = tell(Status.RUNNING, events.Progressed(message="In Progress"))
    assert list(told) == HEADING + REST
    assert told == {
        "executionId": "624",
        "workflowId": None,
        "progress": 25,
        "message": "In Progress",
        "status": "RUNNING",
        "action": "transcode",
        "attempt": 1,
        "sequence": 3,
        "timestamp": "2026-11-24T03:06:00.123Z",
    }


def test_completed() -> None:
    """It adds the result and both maps, also empty ones."""
    told = tell(Status.RUNNING, events.Completed(result="ok", job_context_variables={"a": [1]}))
    assert list(told) == [*HEADING, *REST, "result", "jobContextVariables", "workflowContextVariables"]
    assert (told["result"], told["progress"]) == ("ok", 100)
    assert (told["jobContextVariables"], told["workflowContextVariables"]) == ({"a": [1]}, {})


@pytest.mark.parametrize("allowed", [True, False])
def test_failed(allowed: bool) -> None:
    """The traceback is told where the operator allows it."""
    event = events.Failed(error_type="E", error_message="m", traceback="File …")
    move = apply(Execution("624", "a", status=Status.RUNNING), event, 0.0)
    told = json.loads(notifications.notification(move, tracebacks=allowed))
    assert list(told) == [*HEADING, *REST, "error"]
    assert told["error"] == {"type": "E", "message": "m"} | ({"traceback": "File …"} if allowed else {})


def test_waiting() -> None:
    waiting = {"resource": "asset/42", "mode": "EXCLUSIVE", "position": 1, "holders": ["623"]}
    told = tell(Status.QUEUED, events.LockAwaited(waiting_for=waiting))
    assert list(told) == [*HEADING, *REST, "waitingFor"]
    assert told["waitingFor"] == waiting


def test_late_and_cancel_requested() -> None:
    """Flags are there only where they are true."""
    assert tell(Status.TIMED_OUT, events.Progressed())["late"] is True
    assert tell(Status.RUNNING, events.CancelRequested())["cancelRequested"] is True
    assert "late" not in tell(Status.TIMED_OUT, events.Resumed())
    assert "cancelRequested" not in tell(Status.RUNNING, events.Stopped(), cancel_requested=True)


def test_a_refused_request_is_told_as_failed() -> None:
    """The same heading, so that no reader needs another case."""
    error = RequestRefused("field-invalid", "priority: …", "624")
    told = json.loads(notifications.refused_notification("copy", error, 0.0))
    assert list(told) == [*HEADING, *REST, "error"]
    assert (told["executionId"], told["status"], told["action"]) == ("624", "FAILED", "copy")
    assert told["error"] == {"type": "RequestRefused", "message": "field-invalid: priority: …"}


@pytest.mark.parametrize("status", Status)
def test_routing_keys(status: Status) -> None:
    assert notifications.routing_key("copy", status) == f"copy.{status.name.lower()}"


@given(st.floats(0, 4e9))
def test_timestamps_are_utc_with_milliseconds(instant: float) -> None:
    text = messages.timestamp(instant)
    assert len(text) == len("2026-11-24T03:06:00.123Z")
    assert abs(datetime.fromisoformat(text).timestamp() - instant) <= 0.001


@pytest.mark.parametrize("action", ["a" * 255, "é" * 127, "€" * 85, "a" * 247])
def test_a_notification_s_key_is_never_longer_than_amqp_allows(action: str) -> None:
    """Of an action that nobody serves: any routing key may come."""
    key = notifications.routing_key(action, Status.WAITING_FOR_LOCK)
    assert len(key.encode()) <= 255
    assert key.endswith(".waiting_for_lock")
    assert action.startswith(key.removesuffix(".waiting_for_lock"))
    assert notifications.routing_key("a" * 238, Status.WAITING_FOR_LOCK) == "a" * 238 + ".waiting_for_lock"
