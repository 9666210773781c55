"""`jef definitions`: the broker's users, permissions and topology as a file that RabbitMQ loads."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from jef_daemon.cli.app import app, common

_PASSWORD_BYTES = 24


@app.command(rich_help_panel="Keeping house")
def definitions(
    passwords: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a password in a file named after each user; missing ones are made. "
            "Without it the users have no password yet."
        ),
    ] = None,
    vhost: Annotated[str, typer.Option(help="The virtual host that all of it is for.")] = "/",
) -> None:
    """Users with least privilege and the topology, as a file that RabbitMQ loads.

    For the prefix and the actions of the configuration. The file holds salted hashes, never a password.

    Examples:
      jef definitions > definitions.json

      jef definitions --passwords secrets > definitions.json

      jef --prefix prod definitions --vhost media > definitions.json
    """
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq.definitions import definitions as make
    from jef_daemon.rabbitmq.users import rights, user_name
    from jef_daemon.run.catalogue import specs

    settings = common.settings()
    names = Names(settings.prefix)
    users = [user_name(names, part) for part in rights(names)]
    known = {} if passwords is None else _passwords(passwords, users)
    made = make(names, specs(settings), settings.bus.queue_type, known, vhost)
    typer.echo(json.dumps(made, indent=2))


def _passwords(folder: Path, users: Iterable[str]) -> dict[str, str]:
    """What the files hold; who has none gets one that only we may read.

    Raises:
        SettingsError: a file cannot be read or made, or is empty.
    """
    from jef_daemon.errors import SettingsError

    found: dict[str, str] = {}
    for user in users:
        path = folder / user
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                path.touch(0o600)
                path.write_text(secrets.token_urlsafe(_PASSWORD_BYTES) + "\n", encoding="utf-8")
            found[user] = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(
                f"the password file {path} can be neither read nor made: {error.strerror}"
            ) from None
        if not found[user]:
            raise SettingsError(
                f"the password file {path} is empty; write a password into it, or delete it to have one made"
            )
    return found
