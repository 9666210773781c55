"""`jef workflows`: the group, and what concerns definitions: check, draw, schema."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.errors import ExitCode, NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.workflow.library import Library
    from jef_daemon.workflow.loading import Problem, Source

workflows = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
app.add_typer(workflows, name="workflows", rich_help_panel="Jobs")

Folder = Annotated[
    Path | None, typer.Option("--folder", help="Folder of definitions; default: that of the configuration.")
]


@workflows.callback()
def group() -> None:
    """Workflows: check and draw definitions; start, look at, cancel and retry.

    Examples:
      jef workflows check

      jef workflows start ingest asset=42 source=in/a.mov
    """


@workflows.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Files; default: all of the folder.")] = None,
    folder: Folder = None,
    without_actions: Annotated[
        bool, typer.Option("--without-actions", help="Do not ask whether this daemon has the actions.")
    ] = False,
) -> None:
    """Every mistake in definitions, with file, line and remedy. Exit code 1 if there is any.

    Examples:
      jef workflows check

      jef workflows check config/workflows/ingest.yaml
    """
    problems: list[Problem] = []
    sources: list[Source] = []
    for file in _files(files or [], folder):
        source, wrong = _examined(file)
        problems += wrong
        if source is not None:
            sources.append(source)
    if not without_actions:
        problems += asyncio.run(_check_actions(sources))
    for said in dict.fromkeys(map(str, problems)):  # a workflow within several is told once
        typer.echo(said)
    wrong_files = {problem.file for problem in problems}
    for source in sources:
        if source.file not in wrong_files:
            definition = source.plan.definition
            stages = f"{len(definition.stages)} stage{'s' if len(definition.stages) > 1 else ''}"
            typer.echo(f"{source.file}: ok, {stages}, revision {definition.revision}")
    if problems:
        raise typer.Exit(ExitCode.FAILED)


@workflows.command()
def draw(
    name: Annotated[str, typer.Argument(help="The workflow's name, or a file.")],
    kind: Annotated[
        Literal["text", "mermaid", "svg"], typer.Option("--as", help="text, mermaid or svg.")
    ] = "text",
    folder: Folder = None,
) -> None:
    """Print the graph of a definition.

    Examples:
      jef workflows draw ingest

      jef workflows draw ingest --as mermaid

      jef workflows draw config/workflows/ingest.yaml --as svg > ingest.svg
    """
    from jef_daemon.workflow import drawing
    from jef_daemon.workflow.loading import DefinitionError, load

    try:
        source = (
            load(Path(name))
            if "/" in name or name.endswith((".yaml", ".yml"))
            else _library(folder).get(name)
        )
    except DefinitionError as error:
        raise SettingsError(str(error)) from None
    typer.echo(
        {"text": drawing.text, "mermaid": drawing.mermaid, "svg": drawing.svg}[kind](source.plan), nl=False
    )


@workflows.command()
def schema() -> None:
    """The JSON Schema of definitions, for editors.

    Examples:
      jef workflows schema > workflow.schema.json
    """
    from jef_daemon.workflow.definition import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _library(folder: Path | None) -> Library:
    from jef_daemon.workflow.library import Library

    return Library(folder or common.settings().workflow_folder)


def _files(named: list[Path], folder: Path | None) -> list[Path]:
    """All that is to be checked: files that end otherwise too, as nobody would find them."""
    folders = [path for path in named if path.is_dir()] if named else [_library(folder).folder]
    for each in folders:
        try:
            next(each.iterdir(), None)  # as a pattern, what cannot be read is empty
        except OSError as error:
            raise NotFound(f"{each} cannot be read: {error.strerror}") from None
        found = sorted(path for kind in ("*.yaml", "*.yml") for path in each.glob(kind))
        if not found:
            raise NotFound(f"there is no definition in {each}; put NAME.yaml there")
        named = [*named, *found]
    return [path for path in named if path not in folders]


def _examined(file: Path) -> tuple[Source | None, list[Problem]]:
    from jef_daemon.workflow.library import Library
    from jef_daemon.workflow.loading import DefinitionError, load

    try:
        source = load(file)
        Library(file.parent).with_inner(file.stem)
    except DefinitionError as error:
        return None, error.problems
    return source, []


async def _check_actions(sources: list[Source]) -> list[Problem]:
    from jef_daemon.run.catalogue import load
    from jef_daemon.run.probe import examine
    from jef_daemon.workflow.fitting import flaws

    settings = common.settings()
    catalogue = await examine(settings)
    sys.path[:0] = [str(path) for path in settings.python_path]
    models = {name: load(action.spec).Configuration for name, action in catalogue.served.items()}
    broken = {name: action.problem for name, action in catalogue.all.items() if action.problem}
    return [
        source.problem(flaw) for source in sources for flaw in flaws(source.plan.definition, models, broken)
    ]
