"""`jef systemd install`: units for this machine, for who has `jef` from a wheel or a checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jef_daemon.cli.app import app, common, put
from jef_daemon.errors import SettingsError

if TYPE_CHECKING:
    from jef_daemon.units import Place

systemd = typer.Typer(
    help="Let systemd run the daemon: install.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(systemd, name="systemd", rich_help_panel="The daemon")

_PACKAGED = Path("/usr/lib/systemd/system/jef-daemon.service")
_HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # noqa: S108  named, not used
"""What the units let no process see (ProtectHome, PrivateTmp)."""

Files = dict[Path, str]


@systemd.command()
def install(
    role: Annotated[
        list[str] | None,
        typer.Option(help="One role per unit: writes the template, for this role. Again for more."),
    ] = None,
    user: Annotated[bool, typer.Option("--user", help="For your own systemd, without root.")] = False,
    account: Annotated[
        str, typer.Option(help="User and group that the daemon runs as; made where missing.")
    ] = "jef-daemon",
    root: Annotated[
        Path | None, typer.Option(help="Write below this folder, for an image, instead of on this machine.")
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Show the files, write nothing.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration file (JEF_CONFIG).")
    ] = None,
) -> None:
    """Write the units for this machine: this `jef`, this configuration, as much time to stop as it asks for.

    What it writes is its own: change units with `systemctl edit`, which a second `install` leaves alone.

    Examples:
      jef systemd install --print

      sudo jef systemd install

      sudo jef systemd install --role worker --role locks

      jef systemd install --user --config ~/jef.toml
    """
    put(config)
    files = _for_user() if user else _for_machine(account, role or [])
    if root is not None:
        files = {root / path.relative_to("/"): text for path, text in files.items()}
    if show:
        typer.echo("\n".join(f"# {path}\n{text}" for path, text in files.items()), nl=False)
        return
    if root is None and not user:
        _check_machine()
    _write(files)
    if root is None:
        typer.echo("\nnext:")
        for line in _next(user=user, roles=role or []):
            typer.echo(f"  {line}")


def _for_machine(account: str, roles: list[str]) -> Files:
    from jef_daemon import units

    config = _config()
    place = _place(config or units.CONFIG, account)
    name, unit = ("jef-daemon@", units.role_service) if roles else ("jef-daemon", units.service)
    etc = Path("/etc")
    return {
        etc / "systemd" / "system" / f"{name}.service": unit(place),
        etc / "sysusers.d" / "jef-daemon.conf": units.account(place),
        etc / "tmpfiles.d" / "jef-daemon.conf": units.folders(place, with_config=config is None),
    }


def _for_user() -> Files:
    from jef_daemon import units

    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return {home / "systemd" / "user" / "jef-daemon.service": units.user_service(_place(_config(), ""))}


def _config() -> str | None:
    """The configuration that was named, as systemd can name it."""
    named = common.config or os.environ.get("JEF_CONFIG")
    return str(Path(named).absolute()) if named else None


def _place(config: str | None, account: str) -> Place:
    from jef_daemon.units import Place, stop_within_s

    return Place(_command(), config, account, stop_within_s(common.settings()))


def _command() -> tuple[str, ...]:
    """How systemd calls the program that runs now."""
    script = Path(sys.executable).parent / "jef"
    if script.exists():
        return (str(script.absolute()),)
    return (str(Path(sys.executable).absolute()), "-m", "jef_daemon")


def _check_machine() -> None:
    """Refuse what would be written and not work."""
    if os.geteuid() != 0:
        raise SettingsError(
            "units of the machine are written as root: use sudo, or --user, or look with --print"
        )
    if _PACKAGED.exists():
        raise SettingsError(
            f"the Debian package has brought {_PACKAGED}, which a unit in /etc would hide: use `systemctl edit`"
        )
    for path in (Path(sys.prefix), Path(sys.base_prefix), Path(__file__)):
        hidden = next((one for one in _HIDDEN if path.resolve().is_relative_to(one)), None)
        if hidden is not None:
            raise SettingsError(
                f"the unit hides {hidden}, and this jef is in {path}: install it elsewhere, in /opt/jef-daemon, say"
            )


def _write(files: Files) -> None:
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_known = path.exists() and path.read_text(encoding="utf-8") == text
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
        typer.echo(f"{'is there' if is_known else 'written'}: {path}")


def _next(*, user: bool, roles: list[str]) -> list[str]:
    if user:
        return [
            "systemctl --user daemon-reload",
            "systemctl --user enable --now jef-daemon",
            "loginctl enable-linger   # where it is to run while you are not logged in",
        ]
    units = " ".join(f"jef-daemon@{role}" for role in roles) or "jef-daemon"
    return [
        "systemd-sysusers jef-daemon.conf",
        "systemd-tmpfiles --create jef-daemon.conf",
        "editor /etc/jef-daemon/amqp-url   # the broker's URL with its password",
        "systemctl daemon-reload",
        f"systemctl enable --now {units}",
    ]
