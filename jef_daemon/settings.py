"""What an operator can set, as a whole: the keys at the top, and the tables of `sections`. Pure models.

`config` fills them from the file, the environment and the command line; `docs/configuration.md` is
generated from them. Durations are seconds and end in `_s`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from jef_daemon.sections import (
    Action,
    Bus,
    Jobs,
    Locks,
    Logging,
    Retention,
    Section,
    Shutdown,
    Slots,
    Tracing,
)


def default_data_dir() -> Path:
    """Where a daemon keeps its own: systemd's StateDirectory, /var/lib for root, else the user's state folder."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/jef-daemon")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "jef-daemon"


class Settings(Section):
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
