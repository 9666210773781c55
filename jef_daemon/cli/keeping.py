"""`jef purge`, `jef schema`."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.cli.words import duration_s


@app.command(rich_help_panel="Keeping house")
def purge(
    older_than: Annotated[str, typer.Option(help="Finished longer ago than this: 12h, 30d.")] = "30d",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete finished executions and workflows, and their histories, in small steps; a daemon that runs goes on.

    Examples:
      jef purge --older-than 7d

      jef purge --older-than 0s --yes
    """
    from jef_daemon.ledger.purging import Finished, count_finished, purge_finished

    before = time.time() - duration_s(older_than)
    ledger_url = common.settings().ledger
    count = count_finished(ledger_url, before)
    if not count:
        typer.echo(f"nothing finished longer than {older_than} ago")
        return
    if not yes:
        typer.confirm(f"delete {count} that finished longer than {older_than} ago?", abort=True)
    done = Finished()
    for step in purge_finished(ledger_url, before):
        done += step
        typer.echo(f"\r{done} of {count} deleted", nl=False, err=True)
    typer.echo(f"\r{done} deleted", err=False)


@app.command(rich_help_panel="Keeping house")
def schema(
    name: Annotated[str | None, typer.Argument(help="A message: JobRequest, StatusNotification, …")] = None,
    asyncapi: Annotated[
        bool, typer.Option("--asyncapi", help="The AsyncAPI document of all channels.")
    ] = False,
) -> None:
    """JSON Schemas of every message on the wire, and an AsyncAPI document, for clients in any language.

    Examples:
      jef schema

      jef schema JobRequest > job-request.json

      jef schema --asyncapi > asyncapi.json
    """
    from jef_daemon.errors import NotFound
    from jef_daemon.schemas import asyncapi as document
    from jef_daemon.schemas import json_schemas

    if asyncapi:
        typer.echo(json.dumps(document(common.settings().prefix), indent=2))
        return
    schemas = json_schemas()
    if name is None:
        for key, found in schemas.items():
            typer.echo(f"{key:<22}{str(found.get('description', '')).partition(chr(10))[0]}")
        return
    if name not in schemas:
        raise NotFound(f"there is no message {name}; one of {', '.join(schemas)}")
    typer.echo(json.dumps(schemas[name], indent=2))
