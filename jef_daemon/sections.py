"""The tables of the configuration: each key with its meaning, unit, default and range. Pure models.

A part of the daemon is given the table that is about it, where it needs no more; `settings` holds them together.
Durations are seconds and end in `_s`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jef_daemon.tables import Table

Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(Table):
    """Keys of one table; others are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class Bus(Section):
    """RabbitMQ: queues, flow control."""

    queue_type: Literal["quorum", "classic"] = Field(
        default="quorum",
        description="Type of the queues that are declared. An existing queue keeps its type.",
    )
    prefetch: int = Field(
        default=250, ge=1, le=2000, description="Deliveries on their way to us per queue, not yet persisted."
    )
    publish_window: int = Field(
        default=1000, ge=1, le=10_000, description="Published messages not yet confirmed."
    )
    max_body_bytes: int = Field(
        default=1024 * 1024,
        ge=1024,
        le=128 * 1024 * 1024,
        description="Longest request body; longer: dead letter.",
    )
    heartbeat_s: int = Field(
        default=30, ge=1, le=600, description="AMQP heartbeat: how soon a dead broker is seen."
    )
    reconnect_max_s: Seconds = Field(default=15.0, description="Longest pause between two tries to connect.")
    connect_for_s: float = Field(
        default=0.0, ge=0, description="Give up (exit code 4) when the broker stays away longer; 0: never."
    )


class Slots(Section):
    """How much runs at the same time, and how much is taken in."""

    total: int = Field(default=64, ge=1, le=10_000, description="Jobs that run at the same time.")
    blocking_processes: int = Field(
        default_factory=lambda: max(2, os.cpu_count() or 2),
        ge=1,
        le=1000,
        examples=[4],
        description="Processes for blocking executors; so many of their jobs run at the same time. "
        "Default: the processors, at least 2.",
    )
    warm_processes: int = Field(default=1, ge=0, le=1000, description="How many of them are started ahead.")
    backlog: int = Field(
        default=1000,
        ge=1,
        le=10_000_000,
        description="Queued jobs taken in per action before its queue is left to other daemons. "
        "Large: jobs are told QUEUED early and priorities count. Small: daemons share a queue evenly.",
    )


class Jobs(Section):
    """How jobs run, where their action does not say otherwise."""

    execution_timeout_s: Seconds | None = Field(
        default=None, examples=[7200], description="Longest run of one attempt; unset: none."
    )
    progress_interval_s: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="At most one progress notification per execution in this time.",
    )
    kill_grace_s: float = Field(
        default=10.0,
        ge=0,
        le=3600,
        description="Between asking a job to stop (SIGTERM) and killing it (SIGKILL).",
    )
    tell_tracebacks: bool = Field(
        default=True,
        description="Whether FAILED notifications carry the stack trace. The history always does.",
    )
    remember_cancels_s: Seconds = Field(
        default=86400.0, description="How long a cancel of something not known yet is remembered."
    )
    max_variables_bytes: int = Field(
        default=256 * 1024, ge=1024, description="Longest JSON of a response's two variable maps together."
    )


class Locks(Section):
    """Locks: how jobs hold them, and the lock service where this daemon is it."""

    lease_s: float = Field(
        default=120.0,
        ge=5,
        le=86400,
        description="Lease of a running job's locks, renewed long before. A broker that is away for longer "
        "ends them; a daemon that dies keeps others waiting for so long at most.",
    )
    start_within_s: float = Field(
        default=30.0,
        ge=1,
        le=86400,
        description="A job whose locks are granted starts so soon, or gives them back and asks again.",
    )
    wait_lease_s: float = Field(
        default=1800.0,
        ge=60,
        le=7 * 86400,
        description="Lease of a waiting job's place in the queue; a daemon that stays away longer loses it.",
    )
    workflow_lease_s: float = Field(
        default=1800.0,
        ge=5,
        le=7 * 86400,
        description="Lease of the locks that a workflow holds across its stages, renewed long before; a coordinator "
        "that stays away longer loses them.",
    )
    on_lost: Literal["cancel", "tell"] = Field(
        default="cancel",
        description="What a running job that lost its locks does: it is stopped and FAILED, or only told "
        "(`context.lock_lost`). Likewise a workflow: its jobs are stopped, or it goes on.",
    )
    max_per_request: int = Field(default=64, ge=1, le=1000, description="Service: locks in one request.")
    max_name_length: int = Field(
        default=255, ge=8, le=4096, description="Service: characters in a resource's or an owner's name."
    )
    max_waiters: int = Field(
        default=1_000_000, ge=1, le=100_000_000, description="Service: waiters for one resource."
    )
    max_lease_s: Seconds = Field(default=7 * 86400.0, description="Service: longest lease that is given.")
    patience_s: Seconds = Field(
        default=60.0,
        description="Service: whoever waited longer for several resources is not overtaken any more on the free ones.",
    )
    takeover_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Service: no lease ends so soon after it came back, as nobody could renew meanwhile.",
    )
    tell_places_every_s: float = Field(
        default=5.0, ge=0.1, le=3600, description="Service: how often waiting jobs hear that the queue moved."
    )
    tell_places_to: int = Field(
        default=20, ge=0, le=10_000, description="Service: how many of a queue's first hear it."
    )


class Retention(Section):
    """How long finished executions are kept."""

    finished_s: Seconds = Field(
        default=30 * 86400.0, description="Age at which a finished execution is purged."
    )
    interval_s: Seconds = Field(default=300.0, description="Time between two purges.")
    step: int = Field(default=500, ge=1, le=10_000, description="Executions per transaction of a purge.")


class Shutdown(Section):
    """What SIGTERM does."""

    drain_s: float = Field(
        default=30.0,
        ge=0,
        le=7 * 86400,
        description="Time for running jobs to finish; then they are interrupted.",
    )
    flush_s: float = Field(
        default=10.0, ge=0, le=3600, description="Time for the last notifications to be confirmed."
    )


class Tracing(Section):
    """OpenTelemetry: spans of each job, to a collector. Needs the extra `tracing`; docs/tracing.md tells more."""

    enabled: bool = Field(
        default=False,
        description="Whether spans are made and sent. `OTEL_SDK_DISABLED=true` in the environment turns it off.",
    )
    endpoint: str | None = Field(
        default=None,
        pattern=r"\Ahttps?://\S+\z",
        examples=["http://127.0.0.1:4318"],
        description="The collector (OTLP over HTTP); `/v1/traces` is added. Unset: `OTEL_EXPORTER_OTLP_ENDPOINT`, "
        "else http://localhost:4318.",
    )
    service_name: str | None = Field(
        default=None,
        min_length=1,
        examples=["jef-daemon"],
        description="What the daemon is called in traces. Unset: `OTEL_SERVICE_NAME`, else jef-daemon.",
    )
    sampling_ratio: Fraction | None = Field(
        default=None,
        examples=[0.1],
        description="Share of the jobs without a `traceparent` that are recorded; the others' producers decide. "
        "Unset: `OTEL_TRACES_SAMPLER`, else all.",
    )

    @property
    def is_wanted(self) -> bool:
        """Whether this daemon traces."""
        return self.enabled and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"


class Logging(Section):
    """Logs go to standard error, or to systemd's journal."""

    format: Literal["auto", "json", "console", "journal"] = Field(
        default="auto",
        description="auto: the journal where systemd has connected standard error to it, console on a terminal, else "
        "JSON lines.",
    )
    journal_socket: Path = Field(
        default=Path("/run/systemd/journal/socket"), description="Where the journal listens."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe told."
    )


class Retry(Section):
    """What follows a failure: `[actions.NAME.retry]`. Unset keys are the executor's."""

    attempts: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Attempts of a job, the first included; unset: the executor's.",
    )
    first_s: float = Field(default=1.0, ge=0, le=86400, description="Delay before the second attempt.")
    factor: float = Field(default=2.0, ge=1, le=100, description="Growth of the delay per attempt.")
    most_s: Seconds = Field(default=300.0, description="Longest delay.")
    jitter: Fraction = Field(
        default=0.2, description="Share by which a delay is shortened at random: jobs come back apart."
    )
    not_on: list[str] = Field(
        default_factory=list, description="Types of errors (`error.type`) that are not retried."
    )
    on_timeout: bool = Field(
        default=False, description="Whether a TIMED_OUT attempt is retried when its grace is over."
    )


class Action(Table):
    """One action: `[actions.NAME]`. Keys that are not listed here are the executor's own settings."""

    model_config = ConfigDict(extra="allow")

    executor: str | None = Field(
        default=None,
        description='Where its executor is: "module:Class". Unset: the one that is installed under this name.',
    )
    command: list[str] | None = Field(
        default=None,
        description="Or: a program and its arguments, with {configuration.x} placeholders; no shell.",
    )
    enabled: bool = Field(default=True, description="False: the daemon does not serve it.")
    concurrency: int | None = Field(
        default=None, ge=1, description="Jobs of it at the same time; unset: the slots."
    )
    execution_timeout_s: Seconds | None = Field(
        default=None, description="Longest run of one attempt; unset: that of `[jobs]`."
    )
    may_run_again: bool | None = Field(
        default=None,
        description="Whether an interrupted attempt may simply be run again; unset: the executor says.",
    )
    cancellable: bool | None = Field(
        default=None,
        description="False: a running attempt is cancelled only by force; unset: the executor says.",
    )
    update_timeout_s: Seconds | None = Field(
        default=None,
        description="Silence after which a running job is TIMED_OUT; unset: the executor's, for async ones 300.",
    )
    timeout_grace_s: float = Field(
        default=300.0,
        ge=0,
        le=365 * 86400,
        description="How long a TIMED_OUT job may still be brought back by a late update.",
    )
    queue_timeout_s: Seconds | None = Field(
        default=None, description="Longest wait for a slot; then the job is FAILED."
    )
    lock_timeout_s: Seconds | None = Field(
        default=None, description="Longest wait for locks; then the job is FAILED."
    )
    retry: Retry = Field(default_factory=Retry, description="What follows a failure.")
    isolation: Literal["auto", "process"] = Field(
        default="auto",
        description="process: a coroutine runs in a process of its own too, as blocking code does.",
    )

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        if self.executor is not None and self.command is not None:
            raise ValueError("has an executor and a command: leave one of them out")
        return self

    @property
    def executor_settings(self) -> dict[str, Any]:
        """The keys that belong to the executor."""
        return dict(self.model_extra or {})
