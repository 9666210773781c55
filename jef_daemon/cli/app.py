"""The command tree, the options that all commands share, errors as one sentence with their exit code."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import CommandInfo, TyperInfo

from jef_daemon.errors import ExitCode, JefError

if TYPE_CHECKING:
    from jef_daemon.settings import Settings

_EPILOG = """[bold]Begin here[/bold]

  jef check                            is all there that a daemon needs?

  jef run                              run one

  jef submit checksum path=. --wait    give it a job, see it through

  jef list --status FAILED             what went wrong?

  jef show ID   jef history ID         with which one, and when?

  jef cancel ID   jef retry ID         stop one, try one again

[bold]Exit codes[/bold]

  0 ok · 1 the job or check failed · 2 usage · 3 configuration · 4 broker ·
  5 ledger · 6 not found · 7 a lock was lost · 127 no such program ·
  130 interrupted
"""

app = typer.Typer(
    name="jef",
    help="Jobs on RabbitMQ: long ones, kept and told, never run twice.",
    epilog=_EPILOG,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Common:
    """What was said before the command."""

    config: Path | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> Settings:
        """All settings, from all sources."""
        from jef_daemon.config import load

        return load(self.config, self.overrides)


common = Common()


def _say_version(wanted: bool) -> None:
    if wanted:
        from jef_daemon import __version__

        typer.echo(f"jef_daemon {__version__}")
        raise typer.Exit


@app.callback()
def options(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration file (JEF_CONFIG).")
    ] = None,
    amqp_url: Annotated[
        str | None, typer.Option(help="The broker (JEF_AMQP_URL).", show_default=False)
    ] = None,
    ledger_url: Annotated[
        str | None, typer.Option(help="The ledger (JEF_LEDGER_URL).", show_default=False)
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Beginning of all queue names (JEF_PREFIX).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Any key: --set slots.total=8. Again for more.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Jobs on RabbitMQ: long ones, kept and told, never run twice."""
    put(config=config, amqp_url=amqp_url, ledger_url=ledger_url, prefix=prefix, settings=settings)


def put(config: Path | None = None, settings: list[str] | None = None, **keys: str | None) -> None:
    """Take options, before the command or behind it."""
    common.config = config or common.config
    common.overrides |= {key: value for key, value in keys.items() if value is not None}
    if settings:
        from jef_daemon.config import parse_override

        common.overrides |= dict(parse_override(text) for text in settings)


FAMILIES = {
    "control": ("cancel", "retry", "resume"),
    "daemon": ("run", "actions", "check"),
    "definitions": ("definitions",),
    "jobs": ("list", "show", "history", "watch"),
    "keeping": ("purge", "schema"),
    "letters": ("dead-letters",),
    "locks": ("locks",),
    "submitting": ("submit",),
    "systemd": ("systemd",),
    "workflows": ("workflows",),
}
"""Modules, and the commands that each adds to the tree."""


def families(arguments: list[str]) -> list[str]:
    """The modules that these arguments may need: all of them cost a tenth of a second, whichever is called.

    A word that names a command may be an option's value, so each such word counts; without any, or where help is
    asked for before the first, it is the whole tree that is looked at.
    """
    words = [{name for name, commands in FAMILIES.items() if word in commands} for word in arguments]
    first = next((place for place, found in enumerate(words) if found), len(words))
    if first == len(words) or {"-h", "--help"} & set(arguments[:first]):
        return list(FAMILIES)
    named = set().union(*words)
    return [name for name in FAMILIES if name in named]


def set_examples_apart(tree: typer.Typer) -> None:
    """Have help show examples indented, as they are written.

    The library takes away the indentation that all lines behind the first paragraph but one have in common. Behind
    an empty one that is none.
    """
    told: list[CommandInfo | TyperInfo] = [*tree.registered_commands]
    if tree.registered_callback is not None:
        told.append(tree.registered_callback)
    for one in told:
        first, _, further = (inspect.getdoc(one.callback) or "").partition("\n\n")
        if further.startswith("Examples:"):
            one.help = f"{first}\n\n\n\n{further}"
    for group in tree.registered_groups:
        if group.typer_instance is not None:
            set_examples_apart(group.typer_instance)


def main() -> None:
    """Run a command; what went wrong is one sentence on standard error."""
    for family in families(sys.argv[1:]):
        importlib.import_module(f"jef_daemon.cli.{family}")  # it adds itself to the tree
    set_examples_apart(app)
    # What libraries say of a broker that is away would stand beside our own sentence; `run` sets logging up.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app()
    except JefError as error:
        typer.echo(f"jef: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`jef list | head`): no error of anybody's.
        sys.stderr.close()
        sys.exit(ExitCode.OK)
