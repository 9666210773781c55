"""What the broker's errors mean: one sentence with culprit and remedy, and whether waiting can help."""

from __future__ import annotations

import re

from aiormq import exceptions

from jef_daemon.errors import BrokerError, TopologyConflict

_VALUE = re.compile(r"(?:the value )?'?(?P<value>[^']*)'?(?: of type '.*)?")
_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)' for (?P<kind>queue|exchange) '(?P<name>[^']+)' in vhost '(?P<vhost>[^']*)'"
    r": received (?P<ours>.*?) but current is (?P<theirs>.*)"
)


def meaning(error: BaseException, where: str) -> BrokerError | None:
    """The refusal that an error means, or None where the broker is just not there (yet).

    Args:
        error: what the library raised.
        where: the broker's URL without its password.
    """
    text = str(error)
    if isinstance(error, exceptions.ChannelPreconditionFailed):
        return TopologyConflict(_conflict(text))
    if isinstance(error, exceptions.AuthenticationError | exceptions.ProbableAuthenticationError):
        return BrokerError(
            f"the broker at {where} refuses user or password; check JEF_AMQP_URL or its secret file"
        )
    if isinstance(error, exceptions.ConnectionNotAllowed) or "NOT_ALLOWED" in text:
        if "not found" in text:
            return BrokerError(
                f"the broker at {where} has no such virtual host; create it with `rabbitmqctl add_vhost`, "
                "or name another at the end of JEF_AMQP_URL"
            )
        return BrokerError(
            f"the user has no access to the virtual host of {where}; `rabbitmqctl set_permissions`"
        )
    if isinstance(error, exceptions.ChannelAccessRefused) or "ACCESS_REFUSED" in text:
        return BrokerError(
            f"the user of {where} lacks a permission: {text}; grant it with `rabbitmqctl set_permissions`"
        )
    return None


def current_value(error: exceptions.ChannelPreconditionFailed) -> str:
    """What an exchange or queue was declared with, where the broker says so; else its whole sentence."""
    found = _INEQUIVALENT.search(str(error))
    return _value(found["theirs"]) if found else str(error)


def reason(error: BaseException) -> str:
    """A lost or impossible connection in a few words, for the log."""
    text = str(error).strip()
    return text or type(error).__name__


def _conflict(text: str) -> str:
    found = _INEQUIVALENT.search(text)
    if found is None:
        return f"the broker refuses a declaration: {text}"
    kind, name, argument = found["kind"], found["name"], found["argument"]
    ours, theirs = _value(found["ours"]), _value(found["theirs"])
    remedy = (
        'set queue_type = "classic" in [bus], or delete the queue when it is empty'
        if argument == "x-queue-type"
        else f"delete the {kind} when it is not in use, or use another prefix"
    )
    return f"the {kind} {name} exists with another {argument} ({theirs}; wanted: {ours}): {remedy}"


def _value(text: str) -> str:
    """RabbitMQ writes `the value 'quorum' of type 'longstr'`, or `none`."""
    match = _VALUE.match(text)
    return match["value"].strip() if match else text
