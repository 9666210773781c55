"""What a workflow is: the model of `config/workflows/NAME.yaml`. Pure; `jef workflows schema` publishes it.

What the model cannot say of one key alone (needs that form a circle, names that nobody sets) is `plan`'s.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from jef_daemon.lock.state import Mode
from jef_daemon.messages import Timeouts, Variables
from jef_daemon.tables import Table

MOST_STAGES = 200
MOST_AT_ONCE = 100_000
"""Highest `concurrency`."""
MOST_ITEMS = 1000
"""Longest list of a `forEach`."""

WorkflowName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,39}$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
Delay = Annotated[float, Field(ge=0, le=30 * 86400)]


class _Part(Table):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class LockWish(_Part):
    """A lock."""

    resource: str = Field(
        min_length=1, description="What is locked; expressions are possible: `asset/{{ workflow.asset }}`."
    )
    mode: Mode = Field(default=Mode.EXCLUSIVE, description="SHARED with others, or EXCLUSIVE.")


class StageTimeouts(Timeouts):
    """The clocks of a stage's jobs. A request's may have keys that nobody knows yet; here such a key is a mistake."""

    model_config = ConfigDict(extra="forbid")


class StageRetry(_Part):
    """When a stage's job FAILED, and its action's own retries are used up: another job."""

    attempts: int = Field(default=1, ge=1, le=1000, description="Jobs of the stage, the first included.")
    delay: Delay = Field(default=0.0, description="Seconds before each but the first.")


class Stage(_Part):
    """One stage: a job, a job for each item of a list, or another workflow."""

    name: StageName = Field(description="A letter, then letters, digits, `_`; at most 40.")
    description: str = Field(default="", description="For people.")
    action: str | None = Field(
        default=None, min_length=1, max_length=200, description="The action that does it."
    )
    workflow: WorkflowName | None = Field(default=None, description="Or: the workflow that does it.")
    elsewhere: bool = Field(
        default=False,
        description="True: another daemon, or Enterprise, serves the action: `check` does not ask for it.",
    )
    configuration: dict[str, JsonValue] = Field(
        default_factory=dict, description="Of the job; expressions are possible in every text."
    )
    variables: dict[VariableName, JsonValue] = Field(
        default_factory=dict, description="Of the other workflow; expressions are possible in every text."
    )
    needs: list[StageName] | None = Field(
        default=None, description="Stages that must have passed; unset: the stage before; `[]`: none."
    )
    when: str | bool = Field(default=True, description="Condition; false: the stage is SKIPPED.")
    for_each: str | Annotated[list[JsonValue], Field(max_length=MOST_ITEMS)] | None = Field(
        default=None, description="A list, or an expression that gives one: a job for each `item`."
    )
    limit: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="forEach: jobs at the same time; unset: all."
    )
    locks: list[LockWish] = Field(
        default_factory=list, max_length=64, description="Held by each job while it runs."
    )
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Of its jobs; unset: the workflow's."
    )
    timeouts: StageTimeouts = Field(default_factory=StageTimeouts, description="Clocks of each job, seconds.")
    retry: StageRetry = Field(default_factory=StageRetry, description="Further jobs after a failure.")
    on_failure: str = Field(
        default="fail",
        pattern=r"^(fail|continue|goto [A-Za-z][A-Za-z0-9_]{0,39})$",
        description="What a failure does: `fail` the workflow; `continue` as if it had passed; `goto STAGE`: go on "
        "there, what lies between is skipped.",
    )
    on_timeout: Literal["wait", "retry", "fail"] = Field(
        default="wait",
        description="What TIMED_OUT does: `wait` for a late update or a person; `retry`: cancel the job, start "
        "another, as `retry` allows; `fail`: cancel the job, the stage has failed.",
    )
    always: bool = Field(
        default=False,
        description="True: it runs when all others have ended, however they did: for cleaning up.",
    )

    @property
    def goto(self) -> str | None:
        """Where a failure goes on."""
        return self.on_failure.removeprefix("goto ") if self.on_failure.startswith("goto ") else None

    @field_validator("needs", mode="before")
    @classmethod
    def _one_need(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Stage:
        if (self.action is None) == (self.workflow is None):
            raise ValueError("an action or a workflow, one of the two")
        refused = {
            "workflow": ("configuration", "locks", "timeouts", "elsewhere", "on_timeout"),
            "action": ("variables",),
        }["action" if self.workflow is None else "workflow"]
        for key in refused:
            if key in self.model_fields_set:
                what = "an action" if self.workflow is None else "a workflow"
                raise ValueError(f"{to_camel(key)} is nothing that {what} has")
        if self.limit is not None and self.for_each is None:
            raise ValueError("limit is for forEach")
        if self.always and self.needs is not None:
            raise ValueError("needs is nothing that an always stage has: it runs when all others have ended")
        if self.on_timeout == "retry" and self.retry.attempts == 1:
            raise ValueError("onTimeout: retry needs retry.attempts above 1")
        return self


class Definition(_Part):
    """A workflow."""

    name: WorkflowName = Field(description="The file's name without `.yaml`.")
    description: str = Field(default="", description="For people.")
    variables: dict[VariableName, JsonValue] = Field(
        default_factory=dict,
        description="The workflow's context, with what each is where the request does not say: `workflow.NAME`. Every "
        "variable that an expression names is declared here or in `required`.",
    )
    required: list[VariableName] = Field(
        default_factory=list, max_length=200, description="Variables that a request must bring."
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        le=MOST_AT_ONCE,
        description="Workflows of this name that run at the same time; others are QUEUED.",
    )
    locks: list[LockWish] = Field(
        default_factory=list,
        max_length=64,
        description="Held by the workflow, from before its first stage until it is over; expressions see `workflow` "
        "and `workflowId`.",
    )
    lock_timeout: Annotated[float, Field(gt=0, le=365 * 86400)] | None = Field(
        default=None, description="Seconds that it waits for its locks at most; unset: for ever."
    )
    stages: list[Stage] = Field(min_length=1, max_length=MOST_STAGES, description="In order.")

    @model_validator(mode="after")
    def _waits_for_something(self) -> Definition:
        if self.lock_timeout is not None and not self.locks:
            raise ValueError("lockTimeout is for locks; name some, or take it out")
        return self

    @property
    def revision(self) -> str:
        """Names exactly this definition: what a workflow is pinned to."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:12]

    def canonical(self) -> str:
        """As JSON, the same for the same definition."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)

    def initial(self, given: Variables) -> Variables:
        """The context that a workflow begins with."""
        return {**self.variables, **given}


def json_schema() -> dict[str, Any]:
    """For editors: `# yaml-language-server: $schema=workflow.schema.json` at the top of a definition."""
    found = Definition.model_json_schema(by_alias=True)
    stage = found["$defs"]["Stage"]
    stage["properties"]["needs"]["anyOf"].insert(0, {"type": "string"})  # one may stand without a list
    stage["oneOf"] = [
        {"required": [key], "properties": {key: {"type": "string"}}} for key in ("action", "workflow")
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "jef workflow"}
