"""`http`: a job is done by a service elsewhere that speaks HTTP.

The job is POSTed to the service, which answers at once (200 with the result), or takes it (202) and is polled at the
address of its header `Location`, or reports itself to the callback that it was given. docs/http-action.md tells
services what comes and what is understood.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError, field_validator
from pydantic.alias_generators import to_camel
from pydantic_core import to_json

from jef_daemon.actions.exchange import Exchange, Limits, Reply, ServiceFailure, load_library, trusted
from jef_daemon.actions.hosts import Hosts, shown
from jef_daemon.errors import ConfigurationRefused
from jef_daemon.messages import ErrorInfo, explain
from jef_daemon.sdk import (
    ActionExecutorResponse,
    AsyncActionExecutor,
    ExecutionContext,
    ExternalCancelled,
    ExternalFailure,
    NothingToPoll,
)
from jef_daemon.tables import Table

_HOST = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?$"
_HEADER = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"
_OURS = frozenset(
    {"accept-encoding", "content-length", "content-type", "host", "idempotency-key", "traceparent"}
)
_GONE = frozenset({404, 410})
_SAID_CHARACTERS = 300


class HttpSettings(Table):
    """The operator's keys of `[actions.http]`."""

    model_config = ConfigDict(extra="forbid")

    allowed_hosts: list[Annotated[str, Field(pattern=_HOST)]] = Field(
        default_factory=list,
        description="Hosts that jobs may talk to: `host`, or `host:port` where it is not 443 (80). Unset: none.",
    )
    url: str | None = Field(default=None, description="Where jobs are posted that name no `url` themselves.")
    plain_http: bool = Field(
        default=False, description="Whether http:// is taken too: tokens and headers go unencrypted."
    )
    ca_file: Path | None = Field(
        default=None, description="Authorities that are trusted (PEM), instead of the system's."
    )
    headers: dict[Annotated[str, Field(pattern=_HEADER)], Path] = Field(
        default_factory=dict,
        description="Headers sent with every request, each with a file that holds its value "
        "(`Authorization` and such).",
    )
    callback_base_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$",
        description="How services reach this daemon's HTTP port, https://host[:port]; unset: no callback is offered.",
    )
    cancel_url: str | None = Field(
        default=None,
        description="Asked to stop the work, with {externalId} and {executionId}; unset: the status address.",
    )
    cancel_method: Literal["DELETE", "POST"] = Field(default="DELETE", description="How it is asked.")
    timeout_s: float = Field(default=30.0, gt=0, le=3600, description="Longest exchange.")
    connect_timeout_s: float = Field(default=5.0, gt=0, le=300, description="Longest wait for a connection.")
    send_attempts: int = Field(
        default=4, ge=1, le=100, description="Tries of one exchange, where repeating it is safe."
    )
    max_response_bytes: int = Field(
        default=1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Longest answer."
    )

    @field_validator("headers")
    @classmethod
    def _not_ours(cls, value: dict[str, Path]) -> dict[str, Path]:
        if ours := [name for name in value if name.lower() in _OURS]:
            raise ValueError(f"{ours[0]} is set by the action itself")
        return value


class Answer(BaseModel):
    """What a service says of the work: the keys of an update, all optional."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore")

    status: Literal["RUNNING", "COMPLETED", "FAILED", "CANCELLED"] | None = None
    progress: float | None = None
    message: str | None = None
    result: str | None = None
    job_context_variables: dict[str, JsonValue] = Field(default_factory=dict)
    workflow_context_variables: dict[str, JsonValue] = Field(default_factory=dict)
    error: ErrorInfo | None = None
    external_id: Annotated[str, Field(min_length=1, max_length=255)] | None = None

    @classmethod
    def of(cls, reply: Reply) -> Answer:
        """Read an answer; one without a body says nothing.

        Raises:
            ServiceFailure: it is no such object.
        """
        if not reply.body.strip():
            return cls()
        try:
            return cls.model_validate_json(reply.body)
        except ValidationError as error:
            raise ServiceFailure(f"{shown(reply.url)} answers what is no answer: {explain(error)}") from None

    def response(self) -> ActionExecutorResponse:
        """What it means for the job, once the work is done."""
        return ActionExecutorResponse(
            result=self.result or self.message or "",
            execution_id=self.external_id,
            job_context_variables=self.job_context_variables,
            workflow_context_variables=self.workflow_context_variables,
        )

    def failure(self) -> Exception | None:
        """How the work ended without a result; None: it did not."""
        if self.status == "CANCELLED":
            return ExternalCancelled(self.message or "stopped by the service")
        if self.status != "FAILED":
            return None
        if self.error is not None:
            return ExternalFailure(f"{self.error.type}: {self.error.message}")
        return ExternalFailure(self.message or "the service says FAILED")


class Http(AsyncActionExecutor):
    """A job that a service elsewhere does, over HTTP."""

    action = "http"
    Settings = HttpSettings

    class Configuration(BaseModel):
        """Where to, and whatever else the service is to know."""

        model_config = ConfigDict(extra="allow")

        url: str | None = Field(
            default=None, description="Where the job is posted; unset: the operator's `url`."
        )

    def __init__(self, settings: BaseModel | None = None) -> None:
        super().__init__(settings)
        self._trust = None if self.settings.ca_file is None else trusted(self.settings.ca_file)

    async def start(self, context: ExecutionContext[Configuration]) -> Any:
        """POST the job; returns what the service calls it, or the response where it is done already."""
        settings: HttpSettings = self.settings
        url = context.configuration.url or settings.url
        if url is None:
            raise ConfigurationRefused(f"there is no url, in the job or in [actions.{context.action}]")
        headers = self._headers(context) | {"Content-Type": "application/json"}
        reply = await (await self._exchange(context)).send("POST", url, headers, self._job(context))
        _check(reply)
        answer = Answer.of(reply)
        if failure := answer.failure():
            raise failure
        if reply.status != 202 and answer.status != "RUNNING":
            return answer.response()
        context.checkpoint({"status_url": self._status_url(context, reply)})
        context.progress(answer.progress, answer.message)
        return answer.external_id or _last_part(reply.location)

    async def poll(self, context: ExecutionContext[Configuration]) -> Any:
        """Look at the status address."""
        url = (context.saved or {}).get("status_url")
        if url is None:
            raise NothingToPoll
        reply = await (await self._exchange(context)).send("GET", url, self._headers(context))
        if reply.status in _GONE:
            raise ExternalFailure(f"the service does not know the work any more: {reply.status}")
        _check(reply)
        answer = Answer.of(reply)
        if failure := answer.failure():
            raise failure
        if answer.status == "COMPLETED":
            return answer.response()
        if answer.status is None and reply.status != 202:
            raise ServiceFailure(f"{shown(reply.url)} does not say how the work is: there is no status")
        context.progress(answer.progress, answer.message)
        return None

    async def cancel(self, context: ExecutionContext[Configuration]) -> bool:
        """Ask the service to stop; True where it says that nothing runs any more."""
        url = self._cancel_url(context)
        if url is None:
            return False  # the next update's answer says so
        headers = self._headers(context)
        reply = await (await self._exchange(context)).send(self.settings.cancel_method, url, headers)
        if reply.status in _GONE:
            return True
        _check(reply)
        return reply.status == 204 or (reply.status != 202 and Answer.of(reply).status in {None, "CANCELLED"})

    # --- what is sent ------------------------------------------------------------------------------------

    async def _exchange(self, context: ExecutionContext[Any]) -> Exchange:
        settings: HttpSettings = self.settings
        if self._trust is None:
            self._trust = await asyncio.to_thread(trusted)
        await asyncio.to_thread(load_library)
        hosts = Hosts(settings.allowed_hosts, context.action, plain_http=settings.plain_http)
        limits = Limits(
            settings.timeout_s,
            settings.connect_timeout_s,
            settings.max_response_bytes,
            settings.send_attempts,
        )
        return Exchange(hosts, limits, self._trust)

    def _headers(self, context: ExecutionContext[Any]) -> dict[str, str]:
        secret = {name: _value(name, path) for name, path in self.settings.headers.items()}
        traced = {"traceparent": context.traceparent} if context.traceparent else {}
        return {name: value.get_secret_value() for name, value in secret.items()} | {
            **traced,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Idempotency-Key": f"{context.execution_id}-{context.attempt}",
        }

    def _job(self, context: ExecutionContext[Any]) -> bytes:
        told: dict[str, Any] = {
            "executionId": context.execution_id,
            "workflowId": context.workflow_id,
            "action": context.action,
            "attempt": context.attempt,
            "configuration": context.configuration.model_extra or {},
            "jobContextVariables": dict(context.job_context_variables),
            "workflowContextVariables": dict(context.workflow_context_variables),
        }
        if base := self.settings.callback_base_url:
            address = f"{base.rstrip('/')}/executions/{quote(context.execution_id, safe='')}/updates"
            told["callback"] = {"url": address, "token": context.token}
        return to_json(told)

    def _status_url(self, context: ExecutionContext[Any], reply: Reply) -> str | None:
        """Where it is polled; it must be allowed, too."""
        if reply.location is None:
            if not self.settings.callback_base_url:
                raise ServiceFailure(
                    f"{shown(reply.url)} takes the job and gives no address to look at (Location); "
                    f"set callback_base_url in [actions.{context.action}] for services that report themselves"
                )
            return None
        hosts = Hosts(self.settings.allowed_hosts, context.action, plain_http=self.settings.plain_http)
        return hosts.check(urljoin(reply.url, reply.location))

    def _cancel_url(self, context: ExecutionContext[Any]) -> str | None:
        template: str | None = self.settings.cancel_url
        if template is None:
            url: str | None = (context.saved or {}).get("status_url")
            return url
        if "{externalId}" in template and not context.external_id:
            return None
        named = {"externalId": context.external_id or "", "executionId": context.execution_id}
        for name, value in named.items():
            # A dot or a slash in a foreign identifier must not lead to another address.
            template = template.replace(f"{{{name}}}", quote(value, safe="").replace(".", "%2E"))
        return template


def _check(reply: Reply) -> None:
    """Let only an answer pass that says yes.

    Raises:
        ServiceFailure: with the beginning of what it says, where that is text.
    """
    if 200 <= reply.status < 300:
        return
    said = ""
    if reply.kind.startswith(("text/plain", "application/json", "application/problem+json")):
        said = " ".join(reply.body.decode("utf-8", "replace").split())[:_SAID_CHARACTERS]
    raise ServiceFailure(f"{shown(reply.url)} answered {reply.status}" + (f": {said}" if said else ""))


def _last_part(location: str | None) -> str | None:
    """What the service calls the work, as far as its address tells."""
    path = urlsplit(location or "").path.rstrip("/")
    return path.rpartition("/")[2][:255] or None


def _value(name: str, path: Path) -> SecretStr:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceFailure(
            f"the file for the header {name} cannot be read: {type(error).__name__}"
        ) from None
    if not text.isascii() or not text.isprintable():
        raise ServiceFailure(f"the file for the header {name} holds what is no header")
    return SecretStr(text)
