"""Who may do what on the broker: a user for each part, with no more than it needs, as a table. Pure.

RabbitMQ asks three things of each exchange and queue: may it be made (configure), written to (published to, bound
to something), read (consumed from, bound from). Each is a regular expression over names. Declaring what exists
already asks as much as making it, and naming a dead-letter or alternate exchange asks to read the one and write the
other.

What the broker cannot tell apart: whoever may write to the default exchange reaches every queue by its name. Who
needs that (commands, updates and answers are sent so) is trusted with it; producers, readers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jef_daemon.names import Names
from jef_daemon.rabbitmq.topology import trial

_LEDGER = "[0-9a-f]{12}"
_DEFAULT_EXCHANGE = r"amq\.default"
_SERVER_NAMED = r"amq\.gen-.+"
"""Queues that the broker names. Nobody guesses such a name, and clients declare them for themselves alone."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What a user may do: of each kind, alternatives of regular expressions over names."""

    meaning: str
    """Who it is for."""
    configure: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    def permissions(self) -> dict[str, str]:
        """As RabbitMQ takes them."""
        return {
            "configure": _whole(self.configure),
            "write": _whole(self.write),
            "read": _whole(self.read),
        }


def _whole(alternatives: tuple[str, ...]) -> str:
    return f"^({'|'.join(alternatives)})$" if alternatives else "^$"


def user_name(names: Names, part: str) -> str:
    """How the user of a part is called."""
    return f"{names.prefix}-{part}"


def rights(names: Names) -> Mapping[str, Rights]:
    """The users, by part."""

    def own(part: str) -> tuple[str, ...]:
        """Queues for answers and for listening: server-named, or beginning with the user's name and a dot."""
        return (_SERVER_NAMED, rf"{user_name(names, part)}\..+")

    def with_own(part: str, meaning: str, write: tuple[str, ...] = (), read: tuple[str, ...] = ()) -> Rights:
        return Rights(meaning, own(part), (*own(part), *write), (*own(part), *read))

    status = _literal(names.status)
    requests = (_literal(names.jobs), _literal(names.workflows))
    return {
        "producer": with_own("producer", "sends requests, hears their answers", write=requests),
        "daemon": _daemon(names),
        "watcher": _watcher(names),
        "reader": with_own(
            "reader",
            "hears all status notifications, sends nothing",
            read=(status, _literal(names.workflow_status)),
        ),
        "outside": with_own(
            "outside",
            "does the work of async jobs, sends updates; may ask for locks",
            write=(_DEFAULT_EXCHANGE,),
        ),
        "operator": _operator(names, own("operator")),
    }


def _daemon(names: Names) -> Rights:
    """Whoever runs jobs and keeps locks: declares everything, so that a broker needs no preparation."""
    exchanges = [names.jobs, names.status, names.daemons, names.watched, names.lock_keeper, names.dead]
    exchanges += [names.workflow_status, names.workflow_keeper]
    queues = [names.unroutable, names.locks, names.updates, names.control]  # the first is an exchange, too
    queues += [names.workflows, names.coordinator]  # and again
    own = [_literal(names.daemon("")) + _LEDGER, _literal(names.lock_replies("")) + _LEDGER, _watched(names)]
    read = (*map(_literal, exchanges), *map(_literal, queues), f"{_literal(names.job_queue(''))}.+", *own)
    made = (*read, _literal(names.dead_letters), _literal(trial(names)))
    # A ledger's name alone: what the register of the lock keeper is declared with is one.
    return Rights(
        "runs jobs, keeps locks, watches, carries workflows out",
        configure=made,
        write=(*made, _DEFAULT_EXCHANGE, _LEDGER),
        read=read,
    )


def _watcher(names: Names) -> Rights:
    """`jef run --role watcher`: hears what is watched, tells what fell silent, and its last word to `reply_to`."""
    exchanges = (_literal(names.status), _literal(names.watched))
    heard = (*exchanges, _watched(names))
    return Rights("flags jobs that fell silent", heard, (*heard, _DEFAULT_EXCHANGE), heard)


def _operator(names: Names, own: tuple[str, ...]) -> Rights:
    """`jef cancel`, `jef locks`, `jef dead-letters replay`: people, by the command line."""
    replies = f"{_literal(names.lock_replies('client-'))}[0-9a-f]{{32}}"
    requests = (_literal(names.jobs), _literal(names.workflows))
    status, letters = _literal(names.status), _literal(names.dead_letters)
    return Rights(
        "people: `jef submit`, `watch`, `cancel`, `locks`, `workflows`, `dead-letters`",
        configure=(*own, replies),
        write=(*own, replies, *requests, _DEFAULT_EXCHANGE),
        read=(*own, replies, status, _literal(names.workflow_status), letters),
    )


def _literal(name: str) -> str:
    """A name as a regular expression; a prefix has nothing that means something there."""
    return name.replace(".", r"\.")


def _watched(names: Names) -> str:
    """The queue of a session that watches."""
    return rf"{_literal(names.watched)}\.{_LEDGER}\.[0-9a-f]{{8}}"
