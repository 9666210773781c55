"""What an operator can set: every key, with its meaning, unit, default and range. Pure models.

`config` fills them from the file, the environment and the command line; `docs/configuration.md` is
generated from them. Durations are seconds and end in `_s`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def default_data_dir() -> Path:
    """Where a daemon keeps its own: systemd's StateDirectory, /var/lib for root, else the user's state folder."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/jef-daemon")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "jef-daemon"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Bus(_Section):
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


class Slots(_Section):
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


class Jobs(_Section):
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


class Locks(_Section):
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


class Retention(_Section):
    """How long finished executions are kept."""

    finished_s: Seconds = Field(
        default=30 * 86400.0, description="Age at which a finished execution is purged."
    )
    interval_s: Seconds = Field(default=300.0, description="Time between two purges.")
    step: int = Field(default=500, ge=1, le=10_000, description="Executions per transaction of a purge.")


class Shutdown(_Section):
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


class Tracing(_Section):
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


class Logging(_Section):
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


class Retry(_Section):
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


class Action(BaseModel):
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

    @property
    def executor_settings(self) -> dict[str, Any]:
        """The keys that belong to the executor."""
        return dict(self.model_extra or {})


class Settings(_Section):
    """Everything. Top-level keys can be set by `JEF_NAME`, others by `JEF_SECTION__NAME`.

    Relative paths in the file count from the file's folder.
    """

    amqp_url: SecretStr = Field(
        default=SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        description="The broker: amqp://user:password@host:port/vhost, or amqps:// with TLS.",
    )
    amqp_url_file: Path | None = Field(
        default=None,
        examples=["/etc/jef-daemon/amqp-url"],
        description="A file that holds the broker's URL (a systemd credential, say); it wins.",
    )
    amqp_password_file: Path | None = Field(
        default=None,
        examples=["/etc/jef-daemon/amqp-password"],
        description="A file that holds the password for `amqp_url`.",
    )
    ledger_url: str = Field(
        default="", description="The ledger: sqlite:///absolute/path; empty: `ledger.db` in the data folder."
    )
    prefix: str = Field(
        default="jef",
        pattern=r"\A[A-Za-z0-9_-]{1,64}\z",
        description="Beginning of every exchange and queue name.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        examples=["/var/lib/jef-daemon"],
        description="The daemon's own folder: ledger, scratch, default root. Default: systemd's "
        "StateDirectory, /var/lib/jef-daemon for root, else ~/.local/state/jef-daemon.",
    )
    roles: list[Literal["worker", "locks", "watcher", "workflows"]] = Field(
        default=["worker", "locks", "watcher", "workflows"],
        min_length=1,
        description="What this daemon does: run jobs, be the lock service, flag jobs that fell silent, carry workflows "
        "out. The watcher watches the jobs of its own ledger.",
    )
    workflows_dir: Path | None = Field(
        default=None,
        examples=["workflows"],
        description="Folder of workflow definitions, NAME.yaml. Default: `workflows` in the data folder.",
    )
    http_host: str = Field(default="127.0.0.1", description="Address of the HTTP port.")
    http_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port for health (/livez, /readyz), /metrics, updates of async jobs and commands; 0: none.",
    )
    http_token_file: Path | None = Field(
        default=None,
        examples=["/etc/jef-daemon/http-token"],
        description="A file that holds the token of operators on the HTTP port, at least 16 characters; unset: "
        "nobody may look at executions or cancel them there.",
    )
    python_path: list[Path] = Field(
        default_factory=list, description="Folders where executors are looked for too."
    )
    bus: Bus = Field(default_factory=Bus)
    slots: Slots = Field(default_factory=Slots)
    jobs: Jobs = Field(default_factory=Jobs)
    locks: Locks = Field(default_factory=Locks)
    retention: Retention = Field(default_factory=Retention)
    shutdown: Shutdown = Field(default_factory=Shutdown)
    logging: Logging = Field(default_factory=Logging)
    tracing: Tracing = Field(default_factory=Tracing)
    actions: dict[str, Action] = Field(default_factory=dict)

    def become(self, new: Settings) -> None:
        """Have another's values: whoever holds these settings reads them from now on."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(new, name))

    @property
    def ledger(self) -> str:
        """The ledger's URL, the default filled in."""
        return self.ledger_url or f"sqlite:///{(self.data_dir / 'ledger.db').absolute()}"

    @property
    def workflow_folder(self) -> Path:
        """Where workflow definitions are."""
        return self.workflows_dir or self.data_dir / "workflows"

    @property
    def scratch_dir(self) -> Path:
        """Parent of the scratch folders."""
        return self.data_dir / "scratch"

    @property
    def default_root(self) -> Path:
        """The folder that `checksum` and `copy` may touch where no `roots` are set."""
        return self.data_dir / "files"


NEEDS_RESTART = (
    *("amqp_url", "amqp_url_file", "amqp_password_file", "ledger_url", "prefix", "data_dir", "roles"),
    *("http_host", "http_port", "http_token_file"),
    *("bus.queue_type", "bus.prefetch", "bus.publish_window", "bus.heartbeat_s"),
    *("locks.lease_s", "locks.start_within_s", "locks.wait_lease_s"),
    *("tracing.enabled", "tracing.endpoint", "tracing.service_name", "tracing.sampling_ratio"),
)
"""Keys that a reload leaves as they are: the daemon, or what it has promised to others, is built on them."""
