"""The published contract: what the daemon sends and takes is what its schemas say."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from jef_daemon import events
from jef_daemon.errors import RequestRefused, TransitionRefused
from jef_daemon.events import Event
from jef_daemon.lifecycle import Execution, Status, accept, apply
from jef_daemon.messages import decode_request
from jef_daemon.notifications import notification, refused_notification
from jef_daemon.schemas import WIRE_MODELS, asyncapi, json_schemas

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
UNDERSTOOD = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "format"),
    *("type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items"),
    *("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "pattern"),
}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> Iterator[str]:
    """What a validator of JSON Schema would say; only of the words that our schemas use."""
    assert set(schema) <= UNDERSTOOD, f"{at}: teach the test {set(schema) - UNDERSTOOD}"
    if "$ref" in schema:
        yield from problems(value, found(schema["$ref"], root), root, at)
    if "anyOf" in schema and not any(not list(problems(value, one, root)) for one in schema["anyOf"]):
        yield f"{at}: {value!r} fits none"
    kind = schema.get("type")
    is_bool = isinstance(value, bool)
    if kind and (not isinstance(value, TYPES[kind]) or (is_bool and kind != "boolean")):
        yield f"{at}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, root, at)
    if isinstance(value, list) and "items" in schema:
        for number, inner in enumerate(value):
            yield from problems(inner, schema["items"], root, f"{at}[{number}]")
    yield from _of_scalar(value, schema, at)


def _of_scalar(value: Any, schema: dict[str, Any], at: str) -> Iterator[str]:
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 2**30):
            yield f"{at}: its length"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{at}: {value!r} is not like {schema['pattern']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield f"{at}: {value} is beyond"
        if value <= schema.get("exclusiveMinimum", value - 1):
            yield f"{at}: {value} is too small"


def _of_object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{at}: {key} is missing" for key in schema.get("required", []) if key not in value)
    for key, inner in value.items():
        further = schema.get("additionalProperties", True)
        one = known.get(key, further)
        if isinstance(one, dict):
            yield from problems(inner, one, root, f"{at}.{key}")
        elif one is False:
            yield f"{at}: {key} is not allowed"


def found(reference: str, root: dict[str, Any]) -> Any:
    """What a reference leads to, counted from the document's root."""
    assert reference.startswith("#/")
    inner: Any = root
    for part in reference.removeprefix("#/").split("/"):
        inner = inner[part]
    return inner


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from parts(inner)


schemas = functools.cache(json_schemas)
"""They take a while to make, and are looked at hundreds of times."""


def check(name: str, value: Any) -> list[str]:
    schema = schemas()[name]
    return list(problems(value, schema, schema))


# --- what is sent ----------------------------------------------------------------------------------------

EVENTS: list[Event] = [
    events.LockAwaited(
        waiting_for={"resource": "asset/42", "mode": "SHARED", "position": 2, "holders": ["623"]}
    ),
    events.Started(),
    events.Progressed(progress=40, message="pass 1", external_id="x-1"),
    events.Completed(result="ok", job_context_variables={"a": [1, None, {"b": 0.5}]}),
    events.Failed(error_type="E", error_message="m", traceback="File …"),
    events.Failed(error_type="E", error_message=""),
    events.CancelRequested(),
    events.Stopped(),
    events.FellSilent(),
    events.Resumed(),
    events.Retried(token="t"),
    events.Interrupted(token="t"),
]


def notifications() -> Iterator[dict[str, Any]]:
    """One of each transition that is told."""
    yield json.loads(notification(accept(Execution("624", "copy"), 0.0)))
    for status in Status:
        for event in EVENTS:
            try:
                move = apply(Execution("624", "copy", status=status, workflow_id="w"), event, 1795489560.0)
            except TransitionRefused:
                continue
            yield json.loads(notification(move))
    refused = RequestRefused("field-invalid", "priority: …", "624")
    yield json.loads(refused_notification("copy", refused, 0.0))


def test_every_notification_fits() -> None:
    told = list(notifications())
    assert {one["status"] for one in told} == {status.value for status in Status}
    assert [found_ for one in told for found_ in check("StatusNotification", one)] == []


def test_the_schema_knows_every_key_that_is_told() -> None:
    """A reader that takes only what is published misses nothing."""
    known = set(json_schemas()["StatusNotification"]["properties"])
    assert {key for one in notifications() for key in one} <= known


def test_the_keys_that_are_always_there_are_required() -> None:
    always = set.intersection(*(set(one) for one in notifications()))
    assert set(json_schemas()["StatusNotification"]["required"]) == always


MODELS = {model.__name__: model for model in WIRE_MODELS}


@pytest.mark.parametrize(
    "wrong",
    [
        {"progress": 101},
        {"progress": 0.5},
        {"status": "DONE"},
        {"attempt": 0},
        {"sequence": None},
        {"error": {}},
        {"waitingFor": {"resource": "a", "mode": "BOTH", "position": 1}},
    ],
)
def test_the_schema_says_no_too(wrong: dict[str, Any]) -> None:
    """One that accepts everything would prove nothing."""
    told = next(notifications())
    assert check("StatusNotification", told) == []
    assert check("StatusNotification", told | wrong) != []


# --- what is taken ---------------------------------------------------------------------------------------

EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    (
        "JobRequest",
        {
            "executionId": "624",
            "workflowId": None,
            "configuration": {"source": "/in/a.mov"},
            "jobContextVariables": {},
            "workflowContextVariables": {},
            "locks": [{"resource": "asset/42", "mode": "EXCLUSIVE"}],
            "priority": 0,
            "notBefore": None,
            "timeouts": {"queue": None, "lock": None, "update": 300, "execution": None},
        },
    ),
    ("JobRequest", {"executionId": "A.b_c:d-9", "notBefore": "2026-11-24T03:06:00Z", "new": 1}),
    (
        "Update",
        {"executionId": "624", "status": "RUNNING", "progress": 40, "message": "pass 1", "token": "…"},
    ),
    ("UpdateReply", {"accepted": True, "cancelRequested": False}),
    ("UpdateReply", {"accepted": False, "reason": "…"}),
    ("Control", {"command": "cancel", "executionId": "624", "reason": "…", "force": False}),
    ("Control", {"command": "retry", "workflowId": "w-9"}),
    ("ControlReply", {"accepted": True, "status": "CANCELLED", "reason": None}),
    (
        "LockRequest",
        {
            "operation": "acquire",
            "owner": "624",
            "locks": [{"resource": "asset/42", "mode": "EXCLUSIVE"}],
            "leaseSeconds": 60,
            "wait": True,
        },
    ),
    (
        "WorkflowRequest",
        {"workflowId": "w-9", "workflow": "ingest", "variables": {"asset": "42"}, "priority": 0},
    ),
]
"""The messages of the wire protocol's document."""


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_documents_examples_fit(name: str, example: dict[str, Any]) -> None:
    """The schema and the model that reads them agree with the document."""
    assert check(name, example) == []
    assert MODELS[name].model_validate_json(json.dumps(example))


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"executionId": ""},
        {"executionId": "a b"},
        {"executionId": "x" * 129},
        {"executionId": 1},
        {"executionId": "1", "priority": "high"},
        {"executionId": "1", "priority": 1001},
        {"executionId": "1", "locks": [{"resource": "a", "mode": "BOTH"}]},
        {"executionId": "1", "timeouts": {"update": 0}},
        {"executionId": "1", "configuration": []},
    ],
)
def test_schema_and_daemon_refuse_the_same(request_: dict[str, Any]) -> None:
    """A producer that validates before it publishes is not surprised."""
    assert check("JobRequest", request_) != []
    with pytest.raises(RequestRefused):
        decode_request(json.dumps(request_).encode())


# --- the documents ---------------------------------------------------------------------------------------


def test_patterns_are_javascripts_too() -> None:
    r"""JSON Schema takes ECMA's regular expressions: no \A, \z, named groups or flags of Python's."""
    patterns = [part["pattern"] for part in parts(json_schemas()) if isinstance(part.get("pattern"), str)]
    assert patterns
    for pattern in patterns:
        assert re.search(r"\\[AzZ]|\(\?P|\(\?[a-z]", pattern) is None
        assert pattern.startswith("^")
        assert pattern.endswith("$")


def test_keys_are_camel_case() -> None:
    for part in parts(json_schemas()):
        for key in part.get("properties", {}):
            assert "_" not in key


@pytest.mark.parametrize("name", sorted(schemas()))
def test_a_schemas_references_lead_somewhere(name: str) -> None:
    schema = json_schemas()[name]
    for part in parts(schema):
        if isinstance(part.get("$ref"), str):
            assert isinstance(found(part["$ref"], schema), dict)  # each is a document of its own


def test_asyncapis_references_lead_somewhere() -> None:
    """They count from the document's root, also within a message's schema."""
    document = asyncapi()
    references = [part["$ref"] for part in parts(document) if isinstance(part.get("$ref"), str)]
    assert references
    for reference in references:
        assert found(reference, document) is not None


def test_asyncapi_has_every_message_and_every_name() -> None:
    """With the prefix that the operator chose."""
    document = asyncapi("media")
    assert set(document["components"]["messages"]) == set(json_schemas())
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert {
        f"media.{name}" for name in ("jobs", "status", "updates", "control", "locks", "dead")
    } <= addresses
    assert all(address.startswith("media.") for address in addresses)
    acts = {
        operation["channel"]["$ref"]: operation["action"] for operation in document["operations"].values()
    }
    assert acts["#/channels/status"] == "send"
    assert acts["#/channels/jobs"] == "receive"


def test_the_documents_are_json() -> None:
    for document in (json_schemas(), asyncapi()):
        assert json.loads(json.dumps(document, allow_nan=False)) == json.loads(json.dumps(document))
