"""RabbitMQ: the topology in one table, a session that comes back by itself, publishing many at once.

    topology    every exchange, queue and binding
    frames      messages as bytes
    tap         deliveries and confirmations, taken out of the stream before the library reads it
    deliveries  frames → deliveries
    unreadable  deliveries that the library cannot decode
    publisher   many publishes in one write, their confirms
    users       who may do what on the broker
    definitions users and topology as a file that the broker loads
    session     one connection: topology, consumers, publisher
    refusals    what the broker's errors mean, in a sentence
    keepers     which ledger keeps the locks of a prefix, and which its workflows
    bus         session after session; the port's implementation
    client      what people do: submit, watch, command
    dead_letters  looked at, published again, dropped
    check       what a daemon does, tried
    lock_client the lock service as those outside speak to it
    lock_claim  locks had and kept over it

The only package that imports aio_pika and aiormq.
"""

from jef_daemon.rabbitmq.bus import RabbitBus
from jef_daemon.rabbitmq.topology import (
    CONTROL,
    COORDINATOR,
    HANDED_ON,
    LOCK_REPLIES,
    LOCKS,
    UPDATES,
    WATCHED,
    WORKFLOWS,
    Topology,
)

__all__ = [
    "CONTROL",
    "COORDINATOR",
    "HANDED_ON",
    "LOCKS",
    "LOCK_REPLIES",
    "UPDATES",
    "WATCHED",
    "WORKFLOWS",
    "RabbitBus",
    "Topology",
]
