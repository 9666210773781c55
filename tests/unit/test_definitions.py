"""The broker's definitions: hashes as RabbitMQ makes them, names of one prefix and of no other."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jef_daemon.names import Names
from jef_daemon.rabbitmq.definitions import definitions, password_hash
from jef_daemon.rabbitmq.topology import Topology
from jef_daemon.rabbitmq.users import Rights, rights


def named(topology: Topology) -> list[str]:
    """Of all exchanges and queues."""
    return [exchange.name for exchange in topology.exchanges] + [queue.name for queue in topology.queues]


def test_a_hash_is_the_one_in_rabbitmqs_own_documentation() -> None:
    assert (
        password_hash("test12", bytes.fromhex("908dc60a"))
        == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    )


def test_each_hash_has_a_salt_of_its_own() -> None:
    assert len({password_hash("same") for _ in range(20)}) == 20


def test_a_right_to_nothing_is_no_right_to_everything() -> None:
    """RabbitMQ takes an empty expression for none, too; said plainly it cannot be misread."""
    assert Rights("nobody").permissions() == {"configure": "^$", "write": "^$", "read": "^$"}


@pytest.mark.parametrize("kind", ["configure", "write", "read"])
def test_the_users_of_one_prefix_may_nothing_with_another(kind: str) -> None:
    """Nor is a dot in a name any character."""
    others = Topology.of(Names("jef2"), ["nap"], "quorum", "0123456789ab")
    names = [*named(others), "jefxjobs", "jef", "jefxstatus"]
    for part, each in rights(Names("jef")).items():
        allowed = [name for name in names if re.search(each.permissions()[kind], name)]
        assert allowed == [], part


def test_the_daemon_may_declare_all_that_it_declares() -> None:
    """In all roles, with what remembers who keeps locks and workflows."""
    names = Names("jef")
    topology = Topology.of(names, ["nap"], "quorum", "0123456789ab", coordinates=True)
    may = rights(names)["daemon"].permissions()["configure"]
    wanted = [*named(topology), names.lock_keeper, names.workflow_keeper]
    assert [name for name in wanted if not re.search(may, name)] == []


def test_the_topology_is_whole_and_in_the_virtual_host() -> None:
    made = definitions(Names(), ["nap"], "classic", {}, "media")
    everything: list[Any] = [*made["permissions"], *made["exchanges"], *made["queues"], *made["bindings"]]
    assert {each["vhost"] for each in everything} == {"media"}
    bound = {(each["source"], each["destination"], each["routing_key"]) for each in made["bindings"]}
    assert ("jef.jobs", "jef.jobs.nap", "nap") in bound
    assert ("jef.status", "jef.watched", "#") in bound
    assert ("jef.workflows", "jef.workflows", "") in bound
    assert {queue["arguments"]["x-queue-type"] for queue in made["queues"]} == {"classic"}
    assert all(user["password_hash"] == "" for user in made["users"])
