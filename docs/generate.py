#!/usr/bin/env python3
"""Writes the generated parts of the documentation: `make docs`. A test fails when they are not up to date.

A page is written by hand; what can be read off the code stands in it between two marks, and only that is
replaced here. In Markdown (in TOML with `#` instead of the brackets):

    <!-- generated: NAME -->
    …
    <!-- end of generated -->

NAME is a key of `PARTS`; a word behind it is handed to the part.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main
import yaml
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from docs.tables import kind_of, row, table  # noqa: E402
from jef_daemon import cli, lifecycle, messages, units  # noqa: E402  the checkout's own, wherever this is called
from jef_daemon.actions.command import CommandSettings  # noqa: E402
from jef_daemon.actions.http import HttpSettings  # noqa: E402
from jef_daemon.actions.roots import RootsSettings  # noqa: E402
from jef_daemon.cli.app import FAMILIES as COMMANDS  # noqa: E402
from jef_daemon.cli.app import app  # noqa: E402
from jef_daemon.events import Event  # noqa: E402
from jef_daemon.lifecycle import TABLE, Place  # noqa: E402
from jef_daemon.lock import messages as lock_messages  # noqa: E402
from jef_daemon.metrics import FAMILIES  # noqa: E402
from jef_daemon.names import Names  # noqa: E402
from jef_daemon.rabbitmq.topology import Topology  # noqa: E402
from jef_daemon.sections import Action  # noqa: E402
from jef_daemon.settings import NEEDS_RESTART, Settings  # noqa: E402
from jef_daemon.tracing.recorded import DEFINITIONS as SPANS  # noqa: E402
from jef_daemon.tracing.recorded import EVERY  # noqa: E402
from jef_daemon.workflow import definition as workflow_definition  # noqa: E402
from jef_daemon.workflow import events, expressions, law  # noqa: E402
from jef_daemon.workflow import messages as workflow_messages  # noqa: E402
from jef_daemon.workflow.plan import plan  # noqa: E402

PAGES = tuple(
    ROOT / name
    for name in (
        "config/jef.toml",
        "docs/configuration.md",
        "docs/life-cycle.md",
        "docs/wire-protocol.md",
        "docs/cli.md",
        "docs/workflows.md",
        "docs/metrics.md",
        "docs/prometheus.md",
        "docs/tracing.md",
    )
)
_MARKED = re.compile(
    r"^(?P<open>(?:<!--|#) generated: (?P<name>[\w-]+)(?: (?P<about>\w+))?(?: -->)?\n)"
    r".*?^(?P<close>(?:<!--|#) end of generated)",
    re.MULTILINE | re.DOTALL,
)
_WIDTH = 100
_COMMAND_KEY = "argv"
"""What the model of a command's settings calls the key `command`, which every action has."""


def rewrite(text: str) -> str:
    """A page with its generated parts renewed."""

    def renew(match: re.Match[str]) -> str:
        part = PARTS[match["name"]](match["about"] or "").strip("\n")
        gap = "\n" if match["open"].startswith("<") else ""  # Markdown wants an empty line around a table
        return f"{match['open']}{gap}{part}\n{gap}{match['close']}"

    return _MARKED.sub(renew, text)


# --- settings --------------------------------------------------------------------------------------------


def sections(model: type[BaseModel] = Settings, above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted name, the top level first; without the actions'."""
    yield above, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{above}.{name}".lstrip("."))


def keys_of(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo, str]]:
    """A section's own keys: name, field, what its value must be."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if is_section or field.annotation == dict[str, Action] or name == _COMMAND_KEY:
            continue
        found = {key: value for key, value in schema["properties"][name].items() if key != "description"}
        kind = kind_of(found, schema).removesuffix(" or null")
        unit = "seconds, " if name.endswith("_s") else "bytes, " if name.endswith("_bytes") else ""
        yield name, field, unit + (kind.removeprefix("number, ") if unit else kind)


def shown(name: str, field: FieldInfo) -> tuple[str, bool]:
    """A key's value as TOML, and whether it is the default; else it is an example: the default is in its text."""
    default = field.get_default() if field.default_factory is None else None
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if field.default_factory in {list, dict}:
        default = [] if field.default_factory is list else {}
    if default is not None:
        return json.dumps(default, ensure_ascii=False, default=str), True
    if not field.examples:
        raise ValueError(f"{name} has no fixed default: give it examples=[…] beside its description")
    return json.dumps(field.examples[0], ensure_ascii=False), False


def _sentence(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").partition("\n")[0]


def _prose(text: str, first: str = "# ") -> str:
    wrapped = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent="# ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(wrapped) + "\n"


def settings_file(about: str) -> str:
    """Every section and key as TOML, keys commented out."""
    told = ""
    for name, model in sections():
        told += f"\n# {'-' * 98}\n{_prose(_sentence(model))}[{name}]\n" if name else ""
        for key, field, kind in keys_of(model):
            value, is_default = shown(key, field)
            unset = "" if is_default else " The value here is an example."
            unset += _restart(name, key)
            told += f"\n{_prose(f'{field.description} ({kind}){unset}')}#{key} = {value}\n"
    return told


def action_keys_file(about: str) -> str:
    """The keys of an action, as comments: the examples beside them show them at work."""
    told = ""
    for title, section, model in _action_sections():
        told += f"# {title}\n#\n"
        told += "".join(
            _prose(f"{section}{key}: {field.description} ({kind}; default: {_default(field)})", "# - ")
            for key, field, kind in keys_of(model)
        )
        told += "#\n"
    return told.removesuffix("#\n")


def _action_sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """What an action's table may hold: a title, the section within it with its dot, the keys."""
    for name, model in sections(Action):
        title = f"Keys of its section `[actions.NAME.{name}]`:" if name else "Keys that every action takes:"
        yield title, f"{name}." if name else "", model
    yield "Keys of an action with a `command`, besides:", "", CommandSettings
    yield "Keys of `checksum` and `copy`, besides:", "", RootsSettings
    yield "Keys of `http`, besides:", "", HttpSettings


def _default(field: FieldInfo) -> str:
    if field.default_factory not in {None, list, dict} or "Default: " in (field.description or ""):
        return "as said"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    return "unset" if default is None else json.dumps(default, ensure_ascii=False, default=str)


def _restart(section: str, key: str) -> str:
    return " Needs a restart." if f"{section}.{key}".lstrip(".") in NEEDS_RESTART else ""


def _setting_table(model: type[BaseModel], prefix: str, section: str = "actions") -> str:
    told = table("key", "meaning", "value", "default", "environment")
    for key, field, kind in keys_of(model):
        default = _default(field)
        default = default if default in {"unset", "as said"} else f"`{default}`"
        variable = f"`{prefix}{key.upper()}`"
        told += row(f"`{key}`", f"{field.description}{_restart(section, key)}", kind, default, variable)
    return told


def settings_page(about: str) -> str:
    """Every section as a table."""
    told = ""
    for name, model in sections():
        title = f"`[{name}]`\n\n{_sentence(model)}" if name else "Top level"
        told += f"### {title}\n\n{_setting_table(model, _variable(name), name)}\n"
    return told


def _variable(section: str) -> str:
    """How the environment's names of a section's keys begin."""
    return "JEF_" + "".join(f"{part.upper()}__" for part in section.split(".") if part)


def action_keys_page(about: str) -> str:
    """The keys of an action as tables."""
    return "\n".join(
        f"{title}\n\n{_setting_table(model, _variable(f'actions.NAME.{section}'))}"
        for title, section, model in _action_sections()
    )


# --- the life cycle --------------------------------------------------------------------------------------


@functools.cache
def driven() -> frozenset[str]:
    """Names of the events that this version brings about: something outside the table makes them."""
    made = {"Accepted"}  # by `lifecycle.accept`, for whoever takes a request in
    for path in (ROOT / "jef_daemon").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "lifecycle.py" or "testing" in path.parts or "events" not in text:
            continue
        nodes = list(ast.walk(ast.parse(text)))
        imports = [
            (one.module, name.name) for one in nodes if isinstance(one, ast.ImportFrom) for name in one.names
        ]
        ours = {name for module, name in imports if module == Event.__module__}
        is_whole = tuple(Event.__module__.split(".")) in imports
        for called in (one.func for one in nodes if isinstance(one, ast.Call)):
            if isinstance(called, ast.Name) and called.id in ours:
                made.add(called.id)
            if is_whole and isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                made |= {called.attr} if called.value.id == "events" else set()
    return frozenset(made & {event.__name__ for _, event in TABLE})


@functools.cache
def reached() -> frozenset[Place]:
    """Places that an execution can come to in this version."""
    found = {Place.NEW}
    for _ in Place:  # each round goes at least one arrow further
        found |= {
            to for (place, event), (to, _) in TABLE.items() if place in found and event.__name__ in driven()
        }
    return frozenset(found)


def transitions(about: str) -> str:
    """The table, row by row, each with whether this version drives it."""
    events, places = driven(), reached()
    told = table("from", "event", "to", "what happened", "this version")
    for (place, event), (to, _) in TABLE.items():
        is_driven = event.__name__ in events and place in places
        quiet = "" if _tells(event) else " (not told)"
        what = f"{_sentence_of(event)}{quiet}"
        told += row(place.value, f"`{event.__name__}`", to.value, what, "yes" if is_driven else "not yet")
    return told


def _tells(event: type[Event]) -> bool:
    return lifecycle.is_told(object.__new__(event))


def _sentence_of(event: type[Event]) -> str:
    return (event.__doc__ or "").partition("\n")[0]


def diagram(about: str) -> str:
    """The table as a Mermaid state diagram; dashed: places that this version does not reach."""
    arrows: dict[tuple[Place, Place], list[str]] = {}
    for (place, event), (to, _) in TABLE.items():
        arrows.setdefault((place, to), []).append(event.__name__)
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [
        f'    state "{place.value}" as {place.name}'
        for place in Place
        if "(open" in place.value or "(closed" in place.value
    ]
    for (place, to), names in arrows.items():
        start = "[*]" if place is Place.NEW else place.name
        lines.append(f"    {start} --> {to.name}: {', '.join(names)}")
    ends = [place for place in Place if place not in {start for start, _ in arrows}]
    lines += [f"    {place.name} --> [*]" for place in ends]
    later = [place.name for place in Place if place not in reached()]
    if later:
        lines += ["    classDef later stroke-dasharray: 5 5", f"    class {','.join(later)} later"]
    return "\n".join([*lines, "```"])


# --- the wire --------------------------------------------------------------------------------------------


def fields(about: str) -> str:
    """The fields of a message, or of a part of a workflow's definition."""
    homes = (messages, lock_messages, workflow_definition, workflow_messages)
    home = next(each for each in homes if hasattr(each, about))
    schema = getattr(home, about).model_json_schema(by_alias=True)
    required = schema.get("required", [])
    told = table("key", "value", "default", "meaning")
    for key, one in schema["properties"].items():
        default = (
            "required" if key in required else f"`{json.dumps(one['default'])}`" if "default" in one else ""
        )
        told += row(f"`{key}`", kind_of(one, schema), default, one.get("description", ""))
    return told


def topology(about: str) -> str:
    """What the daemon declares on the broker."""
    declared = Topology.of(Names(), ["<action>"], "quorum", "<ledger>", coordinates=True)
    told = table("name", "kind", "arguments")
    for exchange in declared.exchanges:
        bound = f", bound to `{exchange.source}`" if exchange.source else ""
        told += row(f"`{exchange.name}`", f"{exchange.type} exchange{bound}", _arguments(exchange.arguments))
    keeper = {
        "alternate-exchange": "<ledger>"
    }  # declared for itself: what it was declared with is what it tells
    for name in (Names().lock_keeper, Names().workflow_keeper):
        told += row(f"`{name}`", "fanout exchange, internal", _arguments(keeper))
    for queue in declared.queues:
        bound = f", bound to `{queue.exchange}`" if queue.exchange else ""
        key = f" with `{queue.routing_key}`" if queue.routing_key else ""
        told += row(f"`{queue.name}`", f"queue{bound}{key}", _arguments(queue.arguments))
    return told


def filters(about: str) -> str:
    """What expressions of workflows may use."""
    words = [", ".join(f"`{name}`" for name in names) for names in (expressions.FILTERS, expressions.TESTS)]
    return f"Filters, behind a `|`: {words[0]}.\n\nTests, behind `is`: {words[1]}."


def variables(about: str) -> str:
    """What three stages in a row are given, and give: as the law has it."""
    names = ("a", "b", "c")
    stages = [{"name": name, "action": "any"} for name in names]
    begin = {"name": "w", "variables": {"x": 0}, "stages": stages}
    made = plan(workflow_definition.Definition.model_validate(begin))
    given: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"k": 1}, {"x": 1}),
        ({"m": 2}, {"y": 2}),
        ({}, {"x": 3}),
    )
    state = law.new(made, "w-1", {}, 0, 0.0)
    told = table(
        "stage", "is given `job.*`", "`workflow.*`", "answers job", "and workflow variables", "context then"
    )
    effects = law.advance(made, state, events.Begun(), 0.0)
    for name, (job, workflow) in zip(names, given, strict=True):
        request = next(json.loads(each.body) for each in effects if isinstance(each, events.StartJob))
        ended = events.Ended(
            stage=name,
            index=None,
            attempt=1,
            status=lifecycle.Status.COMPLETED,
            job_variables=job,
            workflow_variables=workflow,
        )
        effects = law.advance(made, state, ended, 0.0)
        saw = (
            request["jobContextVariables"],
            request["workflowContextVariables"],
            job,
            workflow,
            state.context,
        )
        told += row(name, *(f"`{json.dumps(each)}`" for each in saw))
    return told


def _arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in arguments.items())


# --- the command line ------------------------------------------------------------------------------------


def command_tree() -> Any:
    """The tree of `jef`'s commands, as the library that parses them has it."""
    for module in pkgutil.iter_modules(cli.__path__, "jef_daemon.cli."):
        importlib.import_module(module.name)  # each adds its commands
    tree: Any = typer.main.get_command(app)
    # In one order, whoever has imported which of them before.
    order = [name for names in COMMANDS.values() for name in names]
    tree.commands = {name: tree.commands[name] for name in sorted(tree.commands, key=order.index)}
    return tree


def commands(about: str) -> str:
    """Every command with its help."""
    tree = command_tree()
    told = f"## `jef`\n\n{_command('jef', tree)}"
    panels: dict[str, list[Any]] = {}
    for command in tree.commands.values():
        panels.setdefault(command.rich_help_panel or "Further", []).append(command)
    for panel, found in panels.items():
        told += f"## {panel}\n\n"
        for command in found:
            inner = getattr(command, "commands", {}).values()
            told += f"### `jef {command.name}`\n\n{_command(f'jef {command.name}', command)}"
            for one in inner:
                words = f"jef {command.name} {one.name}"
                told += f"#### `{words}`\n\n{_command(words, one)}"
    return told


def _command(words: str, command: Any) -> str:
    what, _, examples = (command.help or "").partition("\nExamples:\n")
    places = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    further = " COMMAND" if hasattr(command, "commands") else ""
    usage = "".join(f" {_place(one)}" for one in places)
    told = f"{what.strip()}\n\n```text\n{words}{' [options]' if options else ''}{usage}{further}\n```\n\n"
    if command.params:
        told += table("", "meaning")
        told += "".join(row(f"`{_place(one)}`", _meaning(one)) for one in places)
        told += "".join(row(_option(one), _meaning(one)) for one in options) + "\n"
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return told + ("```sh\n" + "\n".join(lines) + "\n```\n\n" if lines else "")


def _place(argument: Any) -> str:
    word = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def _option(option: Any) -> str:
    value = "" if option.is_flag else f" {option.opts[0].lstrip('-').upper()}"
    return ", ".join(f"`{word}{value}`" for word in option.opts)


def _meaning(one: Any) -> str:
    again = " May be given again." if getattr(one, "multiple", False) and "gain" not in one.help else ""
    is_telling = one.default not in {None, ""} and not isinstance(one.default, bool)
    default = f" Default: `{one.default}`." if is_telling else ""
    return f"{one.help or ''}{again}{default}"


# --- metrics ---------------------------------------------------------------------------------------------


def metrics(about: str) -> str:
    """Every metric, by family."""
    told = ""
    for heading, family in FAMILIES.items():
        told += f"### {heading}\n\n" + table("name", "kind", "labels", "meaning")
        for one in family:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            values = f": {', '.join(one.values)}" if one.values else ""
            told += row(f"`{one.name}`", one.kind, labels + values, one.meaning)
        told += "\n"
    return told.rstrip("\n") + "\n"


def alerts(about: str) -> str:
    """Every alert of the rules, with the link to its paragraph."""
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/alerts.yml").read_text(encoding="utf-8"))
    told = table("alert", "severity", "after", "what it says")
    for alert in (rule for group in rules["groups"] for rule in group["rules"]):
        name, link = alert["alert"], alert["annotations"]["runbook_url"].removeprefix("docs/")
        said = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", alert["annotations"]["summary"])
        told += row(f"[{name}]({link})", alert["labels"]["severity"], alert.get("for", "at once"), said)
    return told


def spans(about: str) -> str:
    """Every span, its times, attributes and events."""
    told = table("span", "kind", "from", "to", "attributes", "events")
    for one in SPANS:
        attributes, happenings = _told(one.attributes), _told(one.happenings)
        told += row(f"`{one.name}`", one.kind, one.begins, one.ends, attributes, happenings)
    return f"Every span has {', '.join(f'`{name}`' for name in EVERY)}, where they are known.\n\n{told}"


def _told(meanings: Mapping[str, str]) -> str:
    return " ".join(f"`{name}`: {meaning}" for name, meaning in meanings.items())


PARTS: Mapping[str, Callable[[str], str]] = {
    "settings-file": settings_file,
    "action-keys-file": action_keys_file,
    "settings": settings_page,
    "action-keys": action_keys_page,
    "diagram": diagram,
    "transitions": transitions,
    "fields": fields,
    "topology": topology,
    "filters": filters,
    "variables": variables,
    "commands": commands,
    "metrics": metrics,
    "alerts": alerts,
    "spans": spans,
}
"""What can be generated, by the name in the mark."""


# --- systemd ---------------------------------------------------------------------------------------------


def packaged(kind: Callable[[units.Place], str]) -> str:
    """A file of systemd's as the Debian package carries it."""
    return kind(units.Place(("/usr/bin/jef",), stop_s=units.stop_within_s(Settings())))


FILES: Mapping[Path, Callable[[], str]] = {
    ROOT / "systemd" / name: functools.partial(packaged, kind)
    for name, kind in {
        "jef-daemon.service": units.service,
        "jef-daemon@.service": units.role_service,
        "jef-daemon.sysusers": units.account,
        "jef-daemon.tmpfiles": units.folders,
    }.items()
}
"""What is generated as a whole."""


def main() -> None:
    """Write every page anew."""
    for path, make in FILES.items():
        path.write_text(make(), encoding="utf-8")
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rewrite(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
