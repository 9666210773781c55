"""Which actions this daemon serves, and how: entry points, `module:Class`, configured commands.

Executors are looked at first by `probe`, in a process of its own: one that does not import, hangs, or ends
the interpreter makes its own action unserved and nothing else. Requests for it wait in their queue.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import structlog
from pydantic import BaseModel, ValidationError

from jef_daemon.errors import ExecutorNotLoaded
from jef_daemon.retry import RetryPolicy
from jef_daemon.sdk import ActionExecutor
from jef_daemon.sections import Action as ActionSettings
from jef_daemon.settings import Settings

log = structlog.get_logger()

ENTRY_POINTS = "jef_daemon.actions"
_TOUCH_FILES = frozenset({"jef_daemon.actions.checksum:Checksum", "jef_daemon.actions.copy:Copy"})
_COMMAND = "jef_daemon.actions.command:Command"
_NAME = re.compile(r"[A-Za-z0-9_.:@,/+ -]{1,128}")
"""What the name of a queue and a routing key can hold; `*` and `#` would bind other actions' requests too."""


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """How to make an action's executor, in any process."""

    name: str
    executor: str
    """`module:Class`."""
    settings: str = "{}"
    """The executor's own settings, as JSON."""


@dataclass(slots=True)
class Action:
    """An action as this daemon knows it."""

    spec: ActionSpec
    is_blocking: bool = False
    concurrency: int | None = None
    execution_timeout_s: float | None = None
    may_run_again: bool = False
    is_async: bool = False
    """Its work runs outside; a slot is held only while it is launched."""
    hooks: dict[str, bool] = field(default_factory=dict)
    """An async executor's other methods, and whether each blocks."""
    cancellable: bool = True
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    update_timeout_s: float | None = None
    timeout_grace_s: float = 300.0
    queue_timeout_s: float | None = None
    lock_timeout_s: float | None = None
    scope: str = "RELEASE"
    schema: dict[str, Any] = field(default_factory=dict)
    """JSON Schema of its configuration."""
    description: str = ""
    problem: str = ""
    """Why it is not served; empty: it is."""
    is_retired: bool = False
    """A reload took it out: nothing of it is started any more, what is under way goes on with this."""

    @property
    def name(self) -> str:
        """The routing key of its requests."""
        return self.spec.name


class Catalogue:
    """All actions, served or not. A reload changes it; whoever holds one of its mappings sees the change.

    Args:
        actions: by name.
    """

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.all = dict(actions)
        self.served = {name: action for name, action in actions.items() if not action.problem}
        """Those whose executor works."""
        self.known = dict(self.served)
        """Those, and those that were served before a reload took them out. None ever leaves."""

    @property
    def retired(self) -> frozenset[str]:
        """Those that were served once and are not any more."""
        return frozenset(self.known.keys() - self.served.keys())

    def tell(self) -> None:
        """Say in the log which are not served, or not for long."""
        for action in self.all.values():
            if action.problem:
                log.error(
                    "action_not_served",
                    action=action.name,
                    problem=action.problem,
                    consequence="its requests wait",
                )
            elif action.scope in {"DEPRECATED", "OBSOLETE"}:
                consequence = "it still runs" if action.scope == "DEPRECATED" else "its requests are refused"
                log.warning("action_scope", action=action.name, scope=action.scope, consequence=consequence)

    def become(self, new: Catalogue) -> None:
        """Be as another one from now on."""
        for name in self.served.keys() - new.served.keys():
            self.known[name].is_retired = True
        self.known.update(new.served)
        for ours, theirs in ((self.all, new.all), (self.served, new.served)):
            ours.clear()
            ours.update(theirs)


def specs(settings: Settings) -> dict[str, ActionSpec]:
    """What the configuration and the installed packages name, by action."""
    found: dict[str, ActionSpec] = {}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        found[entry.name] = ActionSpec(entry.name, entry.value)
    for name, configured in settings.actions.items():
        if not configured.enabled:
            found.pop(name, None)
            continue
        found[name] = _configured(name, configured, found.get(name), settings)
    default_root = str(settings.default_root)
    return {name: _with_root(spec, default_root) for name, spec in found.items()}


def _configured(
    name: str, configured: ActionSettings, installed: ActionSpec | None, settings: Settings
) -> ActionSpec:
    own = configured.executor_settings
    if configured.command is not None:
        grace = {"kill_grace_s": settings.jobs.kill_grace_s}
        return ActionSpec(name, _COMMAND, json.dumps({**grace, **own, "argv": configured.command}))
    executor = configured.executor or (installed.executor if installed else "")
    return ActionSpec(name, executor, json.dumps(own))


def _with_root(spec: ActionSpec, default_root: str) -> ActionSpec:
    """Ours that touch files stay within the daemon's own folder unless the operator opens others."""
    own = json.loads(spec.settings)
    if spec.executor in _TOUCH_FILES and not own.get("roots"):
        return ActionSpec(spec.name, spec.executor, json.dumps({**own, "roots": [default_root]}))
    return spec


@functools.lru_cache(maxsize=1024)
def load(spec: ActionSpec) -> ActionExecutor:
    """Import and make an executor; once per process.

    Raises:
        ExecutorNotLoaded: a sentence that names the action, what is wrong and the remedy.
    """
    module_name, _, attribute = spec.executor.partition(":")
    where = f"actions.{spec.name}"
    if not _NAME.fullmatch(spec.name):
        raise ExecutorNotLoaded(
            f"{where}: {spec.name!r} can be no action's name; take 1 to 128 of A-Z a-z 0-9 . _ : - / @ + , and space"
        )
    if not module_name or not attribute:
        raise ExecutorNotLoaded(f'{where}: set executor = "module:Class" or command = [...]')
    try:
        found = importlib.import_module(module_name)
        _imported.setdefault(module_name, _written_at(found))
    except ModuleNotFoundError as error:
        looked = ", ".join(sys.path[:3])
        raise ExecutorNotLoaded(
            f"{where}: there is no module {error.name} (looked in {looked}, …); "
            "install it or add its folder to python_path"
        ) from None
    except (Exception, SystemExit) as error:
        raise ExecutorNotLoaded(
            f"{where}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        found = functools.reduce(getattr, attribute.split("."), found)
    except AttributeError:
        raise ExecutorNotLoaded(f"{where}: module {module_name} has no {attribute}") from None
    if not (inspect.isclass(found) and issubclass(found, ActionExecutor)):
        raise ExecutorNotLoaded(f"{where}: {spec.executor} is no ActionExecutor and no function with @action")
    return _make(found, spec, where)


_imported: dict[str, int | None] = {}
"""When the file of each module was written that executors of this process were imported from."""


def is_outdated(spec: ActionSpec) -> bool:
    """Whether this process runs an executor whose file was written anew since it was imported."""
    module_name = spec.executor.partition(":")[0]
    module = sys.modules.get(module_name)
    return module_name in _imported and module is not None and _written_at(module) != _imported[module_name]


def _written_at(module: ModuleType) -> int | None:
    """In nanoseconds; None: it has no file."""
    try:
        return os.stat(module.__file__ or "").st_mtime_ns  # noqa: PTH116 - a module may have no file, a Path is one
    except OSError:
        return None


def _make(kind: type[ActionExecutor], spec: ActionSpec, where: str) -> ActionExecutor:
    try:
        settings: BaseModel = kind.Settings.model_validate_json(spec.settings)
        return kind(settings)
    except ValidationError as error:
        raise ExecutorNotLoaded(f"{where}: {_misfits(error, kind)}") from None
    except (Exception, SystemExit) as error:
        raise ExecutorNotLoaded(
            f"{where}: {kind.__name__}() raised {type(error).__name__}: {error}"
        ) from error


def _misfits(error: ValidationError, kind: type[ActionExecutor]) -> str:
    """What is wrong with an action's keys, by the names that the operator wrote; the nearest one of a key unknown."""
    known = (kind.Settings.model_fields.keys() | ActionSettings.model_fields.keys()) - {"argv"}
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the table"
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            said = "unknown key; " + (
                f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known))}"
            )
        problems.append(f"{re.sub('^argv', 'command', key)}: {said}")
    return "; ".join(problems)
