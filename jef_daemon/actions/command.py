"""`command`: a program that the operator configures, its arguments filled from the job's configuration.

    [actions.nap]
    command = ["sleep", "{configuration.seconds}"]

Never a shell. The process leads a group of its own, which dies with the job: SIGTERM, grace, SIGKILL, for
a cancellation, a time limit, a shutdown; whatever it left behind when it ended by itself is killed too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator

from jef_daemon.actions import placeholders
from jef_daemon.actions.output import Output, Patterns
from jef_daemon.errors import ExecutorError
from jef_daemon.sdk import ActionExecutor, ActionExecutorResponse, AnyConfiguration, ExecutionContext
from jef_daemon.tables import Table

_READ_BYTES = 65_536
_PIPES_S = 2.0
"""How long output is still read after the program ended: something it started may hold the pipe open."""
_GROUPS = {
    "progress_pattern": ({"percent"}, {"done", "total"}, {"time"}),
    "duration_pattern": ({"duration"},),
}
"""What a pattern must name to tell anything."""
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME", "JEF_CUSTODY")
"""What of the daemon's environment a program gets: never its secrets."""


class CommandFailed(ExecutorError):
    """The program ended with an exit code that does not mean success."""


class CommandSettings(Table):
    """The operator's keys of `[actions.NAME]` with a `command`."""

    model_config = ConfigDict(extra="forbid")

    argv: list[str] = Field(min_length=1, description="Program and arguments: the key `command`.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Variables added; placeholders are filled."
    )
    inherit_environment: list[str] = Field(
        default_factory=list,
        description="Names of the daemon's own variables that are passed on besides the usual.",
    )
    working_directory: str | None = Field(default=None, description="Unset: the job's scratch folder.")
    success_exit_codes: list[int] = Field(
        default=[0], min_length=1, description="Exit codes that mean success."
    )
    progress_pattern: str | None = Field(
        default=None,
        description="Regular expression over output lines: a group `percent`, or `done` and `total`, "
        "or `time` (H:MM:SS) beside `duration_pattern`.",
    )
    duration_pattern: str | None = Field(
        default=None, description="Its group `duration` (H:MM:SS) is the whole."
    )
    message_pattern: str | None = Field(
        default=None, description="Its first group, or the whole match, is the message."
    )
    output_tail_bytes: int = Field(
        default=8192, ge=0, le=262_144, description="End of the output kept with the result."
    )
    kill_grace_s: float = Field(
        default=10.0, ge=0, le=3600, description="Between SIGTERM and SIGKILL. Default: `jobs.kill_grace_s`."
    )

    @field_validator("argv")
    @classmethod
    def _well_formed(cls, value: list[str]) -> list[str]:
        return [placeholders.check(argument) for argument in value]

    @field_validator("environment")
    @classmethod
    def _well_formed_values(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: placeholders.check(text) for name, text in value.items()}

    @field_validator("progress_pattern", "duration_pattern", "message_pattern")
    @classmethod
    def _compiles(cls, value: str | None, info: ValidationInfo) -> str | None:
        try:
            groups = set(re.compile(value or "").groupindex)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        needed = _GROUPS.get(str(info.field_name), ())
        if value and needed and not any(alternative <= groups for alternative in needed):
            named = ", or ".join(" and ".join(sorted(alternative)) for alternative in needed)
            raise ValueError(f"{value!r} lacks a named group: {named}, as in (?P<{min(needed[0])}>…)")
        return value


class Command(ActionExecutor):
    """A program that the operator configured."""

    action = "command"
    Settings: ClassVar[type[BaseModel]] = CommandSettings

    def __init__(self, settings: BaseModel | None = None) -> None:
        super().__init__(settings)
        self.Configuration = _model_of(self.settings)  # type: ignore[misc]
        self._patterns = Patterns.of(
            self.settings.progress_pattern, self.settings.duration_pattern, self.settings.message_pattern
        )

    def lacks(self) -> str:
        """Why no job could run its program, as far as that can be told before one comes; empty: nothing is known.

        A program, or a PATH, that depends on the job is not looked for.
        """
        program, path = self.settings.argv[0], self.settings.environment.get("PATH")
        if placeholders.names(program) or placeholders.names(path or ""):
            return ""
        program = placeholders.fill_text(program, {})
        is_path = os.sep in program
        if is_path and not program.startswith(os.sep):
            if self.settings.working_directory is None:
                return f"{program} would be looked for in a job's scratch folder, which is empty; name its full path"
            program = os.path.join(self.settings.working_directory, program)  # noqa: PTH118 - ./x stays ./x
        path = os.environ.get("PATH", os.defpath) if path is None else placeholders.fill_text(path, {})
        if shutil.which(program, path=path):
            return ""
        if found := shutil.which(program, os.F_OK, path):
            return f"{found} may not be executed by the daemon's user; `chmod +x` it, or name another program"
        where = "" if is_path else f" in {path}"
        return f"there is no program {program}{where}; install it, or name its full path"

    async def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        """Run the program to its end."""
        values = _values(context)
        argv = placeholders.fill_all(self.settings.argv, values)
        output = Output(self._patterns, self.settings.output_tail_bytes, context.progress)
        process = await self._start(argv, values, context)
        try:
            code = await _follow(process, output)
        finally:
            await _end_group(process, self.settings.kill_grace_s)
        if code not in self.settings.success_exit_codes:
            said = output.tail.strip()
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            raise CommandFailed(f"{argv[0]} {how}" + (f": {said[-2000:]}" if said else ""))
        return ActionExecutorResponse(
            result=output.message or f"{Path(argv[0]).name} ended with exit code {code}",
            job_context_variables={"exitCode": code, "output": output.tail},
        )

    async def _start(
        self, argv: list[str], values: Mapping[str, Any], context: ExecutionContext[Any]
    ) -> asyncio.subprocess.Process:
        folder = self.settings.working_directory or str(context.scratch)
        try:
            return await asyncio.create_subprocess_exec(
                *argv,
                cwd=folder,
                env=self._environment(values, context),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            if not os.path.isdir(folder):  # noqa: ASYNC240, PTH112 - one look, and only where it failed
                raise CommandFailed(f"there is no working directory {folder}") from None
            raise CommandFailed(f"there is no program {argv[0]}; install it, or name its full path") from None
        except PermissionError:
            raise CommandFailed(f"{argv[0]} may not be executed by the daemon's user") from None

    def _environment(self, values: Mapping[str, Any], context: ExecutionContext[Any]) -> dict[str, str]:
        passed_on = {*_PASSED_ON, *self.settings.inherit_environment}
        environment = {name: value for name, value in os.environ.items() if name in passed_on}
        environment["JEF_EXECUTION_ID"] = context.execution_id
        environment["JEF_ATTEMPT"] = str(context.attempt)
        if context.workflow_id:
            environment["JEF_WORKFLOW_ID"] = context.workflow_id
        if context.traceparent:
            environment["TRACEPARENT"] = context.traceparent
        if context.locks:
            tokens = {lock.resource: lock.fencing_token for lock in context.locks.values()}
            environment["JEF_FENCING_TOKENS"] = json.dumps(tokens)
        added = self.settings.environment.items()
        return environment | {name: placeholders.fill_text(text, values) for name, text in added}


def _values(context: ExecutionContext[Any]) -> dict[str, Any]:
    return {
        "configuration": context.configuration.model_dump(),
        "executionId": context.execution_id,
        "workflowId": context.workflow_id or "",
        "attempt": context.attempt,
        "scratch": str(context.scratch),
        "jobContextVariables": context.job_context_variables,
        "workflowContextVariables": context.workflow_context_variables,
    }


def _model_of(settings: CommandSettings) -> type[BaseModel]:
    """The configuration that the placeholders ask for, so that a missing key is refused before anything runs."""
    templates = [*settings.argv, *settings.environment.values()]
    named = {name for template in templates for name in placeholders.names(template)}
    keys = sorted({name.split(".")[1] for name in named if name.startswith("configuration.")})
    fields: dict[str, Any] = {key: (Any, Field(description=f"For {{configuration.{key}}}.")) for key in keys}
    if not all(key.isidentifier() and not key.startswith(("_", "model_")) for key in keys):
        return AnyConfiguration
    return create_model("Configuration", __base__=AnyConfiguration, **fields)


async def _follow(process: asyncio.subprocess.Process, output: Output) -> int:
    """Read the output to its end, or a little beyond the program's."""
    reading = asyncio.create_task(_read(process, output), name="output")
    try:
        code = await process.wait()
        await asyncio.wait({reading}, timeout=_PIPES_S)
    finally:
        reading.cancel()
    output.close()
    return code


async def _read(process: asyncio.subprocess.Process, output: Output) -> None:
    if process.stdout is None:
        raise AssertionError("it is a pipe")
    while chunk := await process.stdout.read(_READ_BYTES):
        output.feed(chunk)


async def _end_group(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Leave nothing of the group alive; the program itself is given its grace."""
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    _signal(process.pid, signal.SIGKILL)
    await process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


__all__ = ["Command", "CommandFailed", "CommandSettings"]
