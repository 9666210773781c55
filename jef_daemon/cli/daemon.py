"""`jef run`, `jef actions`, `jef check`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jef_daemon.cli.app import app, common, put
from jef_daemon.errors import ExitCode, JefError

if TYPE_CHECKING:
    from jef_daemon.settings import Settings

Config = Annotated[Path | None, typer.Option("--config", "-c", help="Configuration file (JEF_CONFIG).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any key: --set slots.total=8.")]


Role = Annotated[
    list[str] | None,
    typer.Option("--role", help="Only this role: worker, locks, watcher, workflows. Again for more."),
]


@app.command(rich_help_panel="The daemon")
def run(config: Config = None, settings: Overrides = None, role: Role = None) -> None:
    """Run the daemon, until SIGTERM or Ctrl-C; again makes haste. SIGHUP reloads the configuration.

    Examples:
      jef run

      jef run --config config/jef.toml

      JEF_AMQP_URL=amqp://user:secret@broker/ jef run --set slots.total=8

      jef run --role locks   # the lock service alone
    """
    from jef_daemon.daemon import run as run_daemon
    from jef_daemon.logs import configure

    put(config, settings)
    if role:
        common.overrides["roles"] = role
    loaded = common.settings()
    configure(loaded.logging)
    run_daemon(loaded, common.settings)


@app.command(rich_help_panel="The daemon")
def actions(
    name: Annotated[
        str | None, typer.Argument(help="Only this one, with its configuration's schema.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
    config: Config = None,
) -> None:
    """What a daemon with this configuration runs, and what each action's configuration must hold.

    Examples:
      jef actions

      jef actions checksum
    """
    from jef_daemon.errors import NotFound
    from jef_daemon.run.probe import examine

    put(config)
    catalogue = asyncio.run(examine(common.settings()))
    chosen = {key: action for key, action in catalogue.all.items() if name in {None, key}}
    if name is not None and not chosen:
        raise NotFound(f"there is no action {name}; `jef actions` shows which are")
    if as_json or name is not None:
        told = {
            key: {
                "executor": action.spec.executor,
                "description": action.description,
                "runs": "in a process" if action.is_blocking else "in the event loop",
                "mayRunAgain": action.may_run_again,
                "problem": action.problem or None,
                "configuration": action.schema,
            }
            for key, action in chosen.items()
        }
        typer.echo(json.dumps(told if name is None else told[name], indent=2))
        return
    width = max(18, *map(len, chosen)) + 2
    for key, action in chosen.items():
        required = ", ".join(action.schema.get("required", []))
        wants = f"  (needs {required})" if required else ""
        description = action.description or f"{action.spec.executor}, which has no docstring."
        typer.echo(f"{key:<{width}}{action.problem or description + wants}")


@app.command(rich_help_panel="The daemon")
def check(config: Config = None) -> None:
    """Is everything there that a daemon needs? Each line is ok, or what is wrong and the remedy.

    Looks at configuration, broker, permissions, ledger, folders and executors. Exit code 1 if anything is wrong.

    Examples:
      jef check

      jef check --config config/jef.toml
    """
    put(config)
    found: list[tuple[str, str]] = []
    try:
        settings = common.settings()
    except JefError as error:
        found.append(("configuration", str(error)))
    else:
        found = [("configuration", ""), *asyncio.run(_check(settings))]
    for what, wrong in found:
        mark = typer.style("ok   ", fg="green") if not wrong else typer.style("WRONG", fg="red", bold=True)
        typer.echo(f"{mark}  {what}" + (f"\n       {wrong}" if wrong else ""))
    if any(wrong for _, wrong in found):
        raise typer.Exit(ExitCode.FAILED)


async def _check(settings: Settings) -> list[tuple[str, str]]:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq.check import check
    from jef_daemon.run.probe import examine

    catalogue = await examine(settings)
    found = _check_ledger(settings)
    try:
        names = Names(settings.prefix)
        found += await check(broker_url(settings), names, list(catalogue.served), settings.bus.queue_type)
    except JefError as error:
        found.append(("broker", str(error)))
    found += [(f"action {action.name}", action.problem) for action in catalogue.all.values()]
    return found


def _check_ledger(settings: Settings) -> list[tuple[str, str]]:
    import os
    import shutil

    from jef_daemon.daemon import make_folders
    from jef_daemon.ledger.opening import examine as examine_ledger

    found: list[tuple[str, str]] = []
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        (f"folder {settings.data_dir}", lambda: make_folders(settings)),
        (f"ledger {settings.ledger.removeprefix('sqlite:///')}", lambda: examine_ledger(settings.ledger)),
    )
    for what, step in steps:
        try:
            step()
        except JefError as error:
            found.append((what, str(error)))
            return found
        found.append((what, ""))
    free = shutil.disk_usage(settings.data_dir).free
    low = free < 200 * 2**20
    found.append(
        (f"free disk of the ledger: {free // 2**20} MiB", "less than 200 MiB; free some space" if low else "")
    )
    if not os.access(settings.default_root, os.W_OK):
        found.append((f"default root {settings.default_root}", "it cannot be written; check its owner"))
    return found
