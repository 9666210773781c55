"""The broker's definitions as a file: users with their permissions, and the topology. RabbitMQ loads it when it starts.

With it, producers may publish before the first daemon has ever run, and nobody has more rights than it needs. It
holds no password: RabbitMQ takes salted hashes, and a user without one cannot log in by password. Pure, but for the
salt.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jef_daemon.names import Names
from jef_daemon.rabbitmq.topology import Exchange, Queue, Topology
from jef_daemon.rabbitmq.users import rights, user_name

_SALT_BYTES = 4


def definitions(
    names: Names, actions: Iterable[str], queue_type: str, passwords: Mapping[str, str], vhost: str = "/"
) -> dict[str, Any]:
    """What `load_definitions` and `rabbitmqctl import_definitions` take.

    Args:
        names: of everything.
        actions: whose queues there are from the start; a daemon with others declares theirs.
        queue_type: quorum or classic.
        passwords: by user; who is not in it gets none.
        vhost: the virtual host that all of it is for.
    """
    topology = Topology.of(names, actions, queue_type)
    return {
        "vhosts": [{"name": vhost}],
        "users": [_user(names, part, passwords) for part in rights(names)],
        "permissions": [
            {"user": user_name(names, part), "vhost": vhost, **each.permissions()}
            for part, each in rights(names).items()
        ],
        "exchanges": [_exchange(exchange, vhost) for exchange in topology.exchanges],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": True,
                "auto_delete": False,
                "arguments": dict(queue.arguments),
            }
            for queue in topology.queues
        ],
        "bindings": list(_bindings(topology, vhost)),
    }


def _user(names: Names, part: str, passwords: Mapping[str, str]) -> dict[str, Any]:
    name = user_name(names, part)
    return {
        "name": name,
        "password_hash": password_hash(passwords[name]) if name in passwords else "",
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": "",
    }


def password_hash(password: str, salt: bytes | None = None) -> str:
    """A password as RabbitMQ keeps it: a salt of 4 bytes, then SHA-256 of salt and password, in base64."""
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _exchange(exchange: Exchange, vhost: str) -> dict[str, Any]:
    return {
        "name": exchange.name,
        "vhost": vhost,
        "type": exchange.type,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": dict(exchange.arguments),
    }


def _bindings(topology: Topology, vhost: str) -> Iterator[dict[str, Any]]:
    for exchange in topology.exchanges:
        if exchange.source is not None:
            yield _binding(exchange.source, exchange, "#", vhost)
    for queue in topology.queues:
        if queue.exchange is not None:
            yield _binding(queue.exchange, queue, queue.routing_key, vhost)


def _binding(source: str, target: Exchange | Queue, routing_key: str, vhost: str) -> dict[str, Any]:
    return {
        "source": source,
        "vhost": vhost,
        "destination": target.name,
        "destination_type": "exchange" if isinstance(target, Exchange) else "queue",
        "routing_key": routing_key,
        "arguments": {},
    }
