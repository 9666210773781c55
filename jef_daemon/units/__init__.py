"""What systemd reads about the daemon: units, its account, its folders; one source for all of them.

The texts beside this module are the source. From them come the files in `systemd/` (`make docs`), which the Debian
package carries, and what `jef systemd install` writes for a machine. Nothing here touches systemd or the disk.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib import resources
from string import Template

from jef_daemon.settings import Settings

ACCOUNT = "jef-daemon"
CONFIG = "/etc/jef-daemon/jef.toml"
_FLUSHES = 16
"""Steps of the way down that may each take all of `shutdown.flush_s`, when broker and disk hang both."""
_WORD = re.compile(r"[\w@%+=:,./-]+")


@dataclass(frozen=True)
class Place:
    """Where a daemon is on its machine.

    Attributes:
        command: how `jef` is called: its path, or an interpreter and what follows.
        config: the configuration; None: none is named, and the daemon looks where it always does.
        account: the user, and the group of the same name.
        stop_s: the longest way down.
    """

    command: tuple[str, ...]
    config: str | None = CONFIG
    account: str = ACCOUNT
    stop_s: int = 0


def stop_within_s(settings: Settings) -> int:
    """The longest way down that the settings allow, in seconds: what `TimeoutStopSec` must grant.

    Running jobs finish, then are interrupted, some twice: those that a failing role leaves too.
    """
    shutdown, grace_s = settings.shutdown, settings.jobs.kill_grace_s
    return math.ceil(shutdown.drain_s + 2 * grace_s + _FLUSHES * shutdown.flush_s)


def service(place: Place) -> str:
    """`jef-daemon.service`: all roles in one process."""
    heading = "The job daemon, all roles in one process. One role per unit: jef-daemon@.service"
    return _system(place, heading, "jef_daemon: jobs on RabbitMQ", (), ACCOUNT)


def role_service(place: Place) -> str:
    """`jef-daemon@.service`: the role that stands behind the @, with a ledger of its own."""
    heading = (
        "One role of the job daemon: jef-daemon@worker.service, jef-daemon@locks.service. Each has a ledger."
    )
    return _system(place, heading, "jef_daemon, role %i: jobs on RabbitMQ", ("--role", "%i"), f"{ACCOUNT}-%i")


def user_service(place: Place) -> str:
    """A unit of a user's own systemd: nothing that only root may set up."""
    heading = (
        "The job daemon of one user, in that user's systemd. It keeps its own below ~/.local/state/jef-daemon"
    )
    unit = _filled("service.txt", place, heading=heading, description="jef_daemon: jobs on RabbitMQ", role=())
    # Other managers' units cannot be waited for here.
    unit = re.sub(r"^# A broker on this.*\nAfter=.*\nWants=.*\n", "", unit, flags=re.MULTILINE)
    return f"{unit}NoNewPrivileges=yes\n\n[Install]\nWantedBy=default.target\n"


def account(place: Place) -> str:
    """What systemd-sysusers reads."""
    return _filled("sysusers.txt", place)


def folders(place: Place, *, with_config: bool = False) -> str:
    """What systemd-tmpfiles reads.

    Args:
        place: whose daemon it is.
        with_config: an empty configuration too, where there is none: for who has it from no package.
    """
    config = f'f {CONFIG} 0640 root {place.account} - amqp_url_file = "/etc/jef-daemon/amqp-url"\n'
    return _filled("tmpfiles.txt", place) + (config if with_config else "")


def _system(place: Place, heading: str, description: str, role: tuple[str, ...], state: str) -> str:
    unit = _filled("service.txt", place, heading=heading, description=description, role=role)
    owner = _filled("account.txt", place, state=state)
    return f"{unit}{owner}{_text('confinement.txt')}\n[Install]\nWantedBy=multi-user.target\n"


def _filled(name: str, place: Place, *, role: tuple[str, ...] = (), **values: str) -> str:
    config = () if place.config is None else ("--config", _escaped(place.config))
    words = [*map(_escaped, place.command), "run", *role, *config]
    return Template(_text(name)).substitute(
        values, command=" ".join(map(_quoted, words)), account=place.account, stop_s=str(place.stop_s)
    )


def _escaped(word: str) -> str:
    """A word that systemd is to take as it is: no specifier and no variable in it."""
    return word.replace("%", "%%").replace("$", "$$")


def _quoted(word: str) -> str:
    if _WORD.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _text(name: str) -> str:
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
