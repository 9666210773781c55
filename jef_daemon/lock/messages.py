"""The messages of `jef.locks` and their answers, as they are on the wire. `wire` takes them to the protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from jef_daemon.lock.state import Mode
from jef_daemon.messages import Wire


class LockName(Wire):
    """A resource, and how it is wanted. Lengths are the lock service's to refuse, in an answer."""

    resource: str = Field(description="What is locked, e.g. `asset/42`.")
    mode: Mode = Field(default=Mode.EXCLUSIVE, description="SHARED with others, or EXCLUSIVE (the default).")


class LockRequest(Wire):
    """An operation on locks, to `jef.locks`, always with `reply_to` and `correlation_id`."""

    operation: Literal["acquire", "renew", "release", "cancel", "inspect", "force-release"]
    owner: str = Field(
        default="", description="Who holds or waits: an execution's id, or any name. Required."
    )
    owners: list[str] = Field(
        default_factory=list,
        description="renew, instead of owner: all these, each with all it holds or its place in the queue.",
    )
    locks: list[LockName] = Field(
        default_factory=list,
        description="acquire: what is wanted. renew, release: only these; empty: all. inspect: empty: all.",
    )
    lease_seconds: float = Field(default=60.0, description="How long the grants live unless renewed.")
    wait_lease_seconds: float | None = Field(
        default=None,
        description="How long the place in the queue lives unless asked again; null: as the lease.",
    )
    wait: bool = Field(default=True, description="False: be refused rather than wait.")
    after: str = Field(default="", description="inspect: only resources with later names.")
    sole: bool = Field(
        default=False,
        description="The owner counts only together with `reply_to`, and an older `correlation_id` never undoes a "
        "newer one. For daemons, whose messages may come twice.",
    )
    reason: str = Field(default="", description="force-release: why; told to the holder.")
    by: str = Field(default="", description="force-release: who asks for it.")


class GrantInfo(Wire):
    """A granted lock."""

    resource: str
    mode: Mode
    fencing_token: int = Field(description="Rises with each grant of the resource, for ever.")
    lease_until: AwareDatetime


class WaiterInfo(Wire):
    """One who waits."""

    owner: str
    mode: Mode
    asked_at: AwareDatetime


class HolderInfo(GrantInfo):
    """One who holds."""

    owner: str
    granted_at: AwareDatetime


class ResourceInfo(Wire):
    """A resource as `inspect` tells it."""

    resource: str
    fencing_token: int = Field(description="The last one given out.")
    holders: list[HolderInfo]
    waiters: list[WaiterInfo] = Field(description="The first hundred, in order.")
    waiting: int = Field(description="How many there are.")


class LockReply(Wire):
    """An answer of the lock service, with the request's `correlation_id`."""

    status: str = Field(
        description="GRANTED, WAITING, REFUSED, RENEWED, LOST, KEPT, RELEASED, CANCELLED, STATE; "
        "unasked EXPIRED, REVOKED."
    )
    owner: str = Field(default="", description="Whom it is about; empty with KEPT and STATE.")
    grants: list[GrantInfo] | None = None
    resource: str | None = Field(default=None, description="WAITING: the one that is waited for.")
    mode: Mode | None = None
    position: int | None = Field(default=None, description="Among all that wait for the resource; 1: next.")
    holders: list[str] | None = Field(default=None, description="Owners, at most ten.")
    lost: list[str] | None = Field(
        default=None,
        description="Resources that are not held any more; KEPT: owners that hold or wait no more.",
    )
    held: list[str] | None = Field(default=None, description="KEPT: owners that hold what they were granted.")
    code: str | None = Field(default=None, description="REFUSED: why, for machines.")
    reason: str | None = Field(default=None, description="Why, for people.")
    resources: list[ResourceInfo] | None = Field(default=None, description="STATE only.")
