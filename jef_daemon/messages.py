"""Every message on the wire (wire protocol, version 1), and how those that come in are read. Pure.

Part in the flow: `intake`, `updates` and the coordinator decode here what came, and `jef schema` publishes these very
models. What is told of a job is encoded in `notifications`. Keys are camelCase on the wire. Unknown keys of inbound
messages are ignored here and preserved in the record, so that producers can evolve.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from jef_daemon.errors import RequestRefused
from jef_daemon.lifecycle import Status
from jef_daemon.lock.state import Mode

MAX_BODY_BYTES = 1024 * 1024
"""Default limit of a request's body; configurable."""
MOST_NESTED = 100
"""How deep lists and objects may lie within one another in variables; readers of JSON take 200 and fewer."""

# ^ and $, not \A and \z: the published schema is read by validators of other languages, which know no others.
ExecutionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]
Variables = dict[str, JsonValue]
M = TypeVar("M", bound=BaseModel)


def _rfc3339(value: Any) -> Any:
    if not isinstance(value, str) or value[4:5] != "-":  # a text of digits would be taken for an epoch
        raise ValueError("should be an RFC 3339 instant, for example 2026-11-24T03:06:00Z")
    return value


Instant = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_rfc3339)]


class Wire(BaseModel):
    """Camel case outside, snake case inside; strict about types, lenient about keys it does not know."""

    model_config = ConfigDict(alias_generator=to_camel, strict=True, extra="ignore")


class LockDemand(Wire):
    """A lock that a job or a client wants."""

    resource: Name = Field(description="What is locked, e.g. `asset/42`.")
    mode: Mode = Field(description="SHARED with others, or EXCLUSIVE.")


class HeldLock(Wire):
    """A lock that a workflow holds while its jobs run."""

    resource: Name = Field(description="What is locked.")
    mode: Mode
    fencing_token: int = Field(ge=0, description="Rises with each grant of the resource.")


class RetryDemand(Wire):
    """How often a request may be tried: less than its action allows, never more."""

    attempts: int = Field(ge=1, le=1000, description="Attempts, the first included.")


class Timeouts(Wire):
    """Four clocks, each its own, in seconds; null: the action's setting."""

    queue: Seconds | None = Field(default=None, description="Longest wait for a slot.")
    lock: Seconds | None = Field(default=None, description="Longest wait for locks.")
    update: Seconds | None = Field(
        default=None, description="Longest silence between updates of an async job."
    )
    execution: Seconds | None = Field(default=None, description="Longest run of one attempt.")


class JobRequest(Wire):
    """A request for one job, published to `jef.jobs` with the action's name as routing key."""

    execution_id: ExecutionId = Field(description="The idempotency key: 1 to 128 of A-Z a-z 0-9 . _ : -")
    workflow_id: Name | None = Field(default=None, description="The workflow it belongs to.")
    stage: Name | None = Field(
        default=None,
        description="The workflow's stage, where a coordinator asks: it decides on cancel and retry.",
    )
    configuration: Variables = Field(default_factory=dict, description="What the executor's model validates.")
    job_context_variables: Variables = Field(default_factory=dict, description="From the previous stage.")
    workflow_context_variables: Variables = Field(default_factory=dict, description="The workflow's context.")
    locks: list[LockDemand] = Field(default_factory=list, description="Granted together before it starts.")
    workflow_locks: list[HeldLock] = Field(
        default_factory=list,
        description="What the workflow holds for it: told to the executor, not asked for.",
    )
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher starts earlier.")
    not_before: Instant | None = Field(default=None, description="RFC 3339 instant; it starts no earlier.")
    timeouts: Timeouts = Field(default_factory=Timeouts)
    retry: RetryDemand | None = Field(default=None, description="Fewer attempts than the action allows.")


class ErrorInfo(Wire):
    """Why a job FAILED."""

    type: str = Field(description="The exception's class, or a name of ours such as `Interrupted`.")
    message: str = ""
    traceback: str | None = Field(default=None, description="Where the operator allows it.")


class WaitingFor(Wire):
    """What a job in WAITING_FOR_LOCK waits for."""

    resource: str
    mode: Mode
    position: int = Field(ge=1, description="1: next.")
    holders: list[str] = Field(default_factory=list, description="Owners, at most ten.")


class StatusNotification(Wire):
    """A status notification on `jef.status`, routing key `<action>.<status in lower case>`."""

    execution_id: str
    workflow_id: str | None
    progress: int = Field(ge=0, le=100)
    message: str
    status: Status
    action: str
    attempt: int = Field(ge=1)
    sequence: int = Field(
        ge=0, description="Rises with each notification of an execution; drop what you saw."
    )
    timestamp: AwareDatetime
    external_id: str | None = Field(
        default=None, description="The executor's own identifier of the work elsewhere."
    )
    result: str | None = Field(default=None, description="COMPLETED only.")
    job_context_variables: Variables | None = Field(default=None, description="COMPLETED only.")
    workflow_context_variables: Variables | None = Field(default=None, description="COMPLETED only.")
    error: ErrorInfo | None = Field(default=None, description="FAILED only.")
    waiting_for: WaitingFor | None = Field(default=None, description="WAITING_FOR_LOCK only.")
    cancel_requested: bool | None = None
    by: str | None = Field(
        default=None,
        description="Who cancelled: `operator:NAME`, `executor`; with cancelRequested and CANCELLED.",
    )
    reason: str | None = Field(default=None, description="Why, in their words.")
    retried: bool | None = Field(
        default=None, description="FAILED only: true when the action's policy lets another attempt follow."
    )
    late: bool | None = Field(default=None, description="True when a late update caused it.")
    update_deadline: AwareDatetime | None = Field(
        default=None, description="RUNNING only: without an update until then it is TIMED_OUT."
    )


class Update(Wire):
    """An update of an async job, to `jef.updates`, by whoever runs it."""

    execution_id: ExecutionId
    token: str = Field(description="What the executor was given for this attempt.")
    status: Literal[Status.RUNNING, Status.COMPLETED, Status.FAILED, Status.CANCELLED]
    progress: int | None = Field(default=None, ge=0, le=100)
    message: str | None = None
    result: str = ""
    job_context_variables: Variables = Field(default_factory=dict)
    workflow_context_variables: Variables = Field(default_factory=dict)
    error: ErrorInfo | None = None
    external_id: Annotated[str, Field(max_length=255)] | None = Field(
        default=None, description="The identifier of the work elsewhere, where it is known only now."
    )


class UpdateReply(Wire):
    """The answer to an update, when it named a `reply_to`."""

    accepted: bool
    cancel_requested: bool | None = None
    reason: str | None = None


class Control(Wire):
    """A command to `jef.control`, for one execution or for all of a workflow."""

    command: Literal["cancel", "retry", "resume"]
    execution_id: ExecutionId | None = None
    workflow_id: Name | None = None
    reason: Annotated[str, Field(max_length=1000)] = Field(default="", description="Told and kept: why.")
    force: bool = Field(default=False, description="cancel: do not wait for whoever runs it.")
    by: Name = Field(default="operator", description="Who asks: told and kept.")
    configuration: dict[str, Variables] = Field(
        default_factory=dict,
        description="retry of a workflow: by stage, values that take the place of those in its configuration; null: as "
        "before an earlier retry changed it.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Control:
        if (self.execution_id is None) == (self.workflow_id is None):
            raise ValueError("executionId or workflowId, one of them")
        return self


class ControlReply(Wire):
    """The answer to a command."""

    accepted: bool
    status: Status | None = None
    reason: str | None = None


class WorkflowRequest(Wire):
    """A request for a workflow, to `jef.workflows`."""

    workflow_id: Name = Field(description="The idempotency key: 1 to 255 characters.")
    workflow: Name = Field(description="The name of its definition.")
    variables: Variables = Field(default_factory=dict, description="Over those of the definition.")
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="Of its jobs, and among its queued likes."
    )


# --- decoding --------------------------------------------------------------------------------------------


def decode_request(body: bytes, limit: int = MAX_BODY_BYTES) -> JobRequest:
    """Decode and validate a job request.

    Args:
        body: the message's body.
        limit: longest body taken, in bytes.

    Raises:
        RequestRefused: with one of the codes `body-too-long`, `not-json`, `not-an-object`,
            `execution-id-missing`, `execution-id-malformed`, `field-invalid`.
    """
    raw = decode_object(body, limit)
    try:
        return JobRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(raw, error) from None


def decode_update(body: bytes, limit: int = MAX_BODY_BYTES) -> Update:
    """Decode and validate an update.

    Raises:
        RequestRefused: it is none; with the codes of job requests.
    """
    return _decode(Update, body, limit)


def decode_control(body: bytes, limit: int = MAX_BODY_BYTES) -> Control:
    """Decode and validate a command.

    Raises:
        RequestRefused: it is none; with the codes of job requests.
    """
    return _decode(Control, body, limit)


def decode_workflow_request(body: bytes, limit: int = MAX_BODY_BYTES) -> WorkflowRequest:
    """Decode and validate a request for a workflow.

    Raises:
        RequestRefused: it is none; with the codes of job requests.
    """
    return _decode(WorkflowRequest, body, limit)


def decode_object(body: bytes, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RequestRefused: it is none, or longer than the limit.
    """
    if len(body) > limit:
        raise RequestRefused("body-too-long", f"the body has {len(body)} bytes; {limit} are allowed")
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestRefused("not-json", f"the body is no JSON: {error}") from None
    if _MAYBE_INFINITE.search(body) and not _is_finite(raw):
        raise RequestRefused(
            "not-json", "the body has a number beyond 1.8e308: to most readers it is infinite"
        )
    if not isinstance(raw, dict):
        raise RequestRefused("not-an-object", f"the body is a JSON {_kind(raw)}, not an object")
    return raw


def is_nested_deeper(encoded: bytes, most: int) -> bool:
    """Whether lists and objects lie within one another deeper than that: `[{}]` has 2 levels.

    Args:
        encoded: JSON.
        most: levels that are allowed.
    """
    if encoded.count(b"[") + encoded.count(b"{") <= most:
        return False
    depth = 0
    for bracket in _BRACKET.findall(_TEXT.sub(b"", encoded)):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            return True
    return False


_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_MAYBE_INFINITE = re.compile(rb"[\s:,\[]-?\d(?:[\d.]*[eE]\+?\d{3}|[\d.]{200})")
"""Numbers that may be too large for a float, and texts that look like them."""


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _decode(model: type[M], body: bytes, limit: int) -> M:
    decode_object(body, limit)
    if is_nested_deeper(body, MOST_NESTED + 1):  # with the message around the variables
        raise RequestRefused("field-invalid", f"the variables nest deeper than {MOST_NESTED} levels")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused("field-invalid", explain(error)) from None


def _refusal(raw: Mapping[str, Any], error: ValidationError) -> RequestRefused:
    found = {str(problem["loc"][0]): problem for problem in reversed(error.errors()) if problem["loc"]}
    if "executionId" in found:
        missing = raw.get("executionId") is None
        code = "execution-id-missing" if missing else "execution-id-malformed"
        return RequestRefused(code, "executionId is required: 1 to 128 of A-Z a-z 0-9 . _ : -")
    return RequestRefused("field-invalid", explain(error), str(raw["executionId"]))


def explain(error: ValidationError) -> str:
    """All problems of a validation in one sentence that names each field."""
    problems = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "the value"
        problems.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
    }
    return names.get(type(value), type(value).__name__)


@functools.lru_cache(maxsize=64)  # all of a transaction happens at one instant
def timestamp(instant: float) -> str:
    """RFC 3339 in UTC with milliseconds, as notifications carry it."""
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
