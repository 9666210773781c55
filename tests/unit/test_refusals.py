"""What the broker's errors mean: culprit and remedy, or that waiting may help."""

from __future__ import annotations

import pytest
from aiormq import exceptions

from jef_daemon.errors import BrokerError, ExitCode, Fate, TopologyConflict
from jef_daemon.rabbitmq.refusals import meaning, reason

WHERE = "amqp://jef:***@h/v"

INEQUIVALENT = (
    "PRECONDITION_FAILED - inequivalent arg '{argument}' for {kind} '{name}' in vhost '/': "
    "received {ours} but current is {theirs}"
)


def said(error: BaseException) -> str:
    found = meaning(error, WHERE)
    assert found is not None
    assert (found.exit_code, found.fate) == (ExitCode.BROKER, Fate.REQUEUE)
    return str(found)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ProbableAuthenticationError("ACCESS_REFUSED - Login was refused using …"),
        exceptions.AuthenticationError(["EXTERNAL"], ["PLAIN"]),
    ],
)
def test_user_or_password(error: BaseException) -> None:
    """It is not taken for a missing permission, which is ACCESS_REFUSED too."""
    assert said(error) == (
        f"the broker at {WHERE} refuses user or password; check JEF_AMQP_URL or its secret file"
    )


@pytest.mark.parametrize(
    "kind", [exceptions.ConnectionNotAllowed, exceptions.ConnectionClosed, ConnectionError]
)
def test_no_such_virtual_host(kind: type[Exception]) -> None:
    """However the library wraps it."""
    told = said(kind("NOT_ALLOWED - vhost v not found"))
    assert "has no such virtual host" in told
    assert WHERE in told
    assert "rabbitmqctl add_vhost" in told


def test_no_access_to_the_virtual_host() -> None:
    told = said(exceptions.ConnectionNotAllowed("NOT_ALLOWED - access to vhost 'v' refused for user 'jef'"))
    assert "no access to the virtual host" in told
    assert "rabbitmqctl set_permissions" in told


@pytest.mark.parametrize("kind", [exceptions.ChannelAccessRefused, exceptions.ChannelClosed])
def test_a_missing_permission(kind: type[Exception]) -> None:
    """The broker's words are kept: they name the permission and the resource."""
    words = "ACCESS_REFUSED - configure access to queue 'jef.jobs.a' in vhost '/' refused for user 'jef'"
    told = said(kind(words))
    assert words in told
    assert "rabbitmqctl set_permissions" in told


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (
            "the value 'quorum' of type 'longstr'",
            "the value 'classic' of type 'longstr'",
            "(classic; wanted: quorum)",
        ),
        ("'quorum'", "'classic'", "(classic; wanted: quorum)"),
        ("the value 'quorum' of type 'longstr'", "none", "(none; wanted: quorum)"),
        ("none", "the value 'quorum' of type 'longstr'", "(quorum; wanted: none)"),
    ],
)
def test_a_queue_of_another_type(ours: str, theirs: str, told: str) -> None:
    """Which queue, what it is, what it should be, and both ways out."""
    words = INEQUIVALENT.format(
        argument="x-queue-type", kind="queue", name="jef.jobs.a", ours=ours, theirs=theirs
    )
    error = exceptions.ChannelPreconditionFailed(words)
    assert isinstance(meaning(error, WHERE), TopologyConflict)
    assert said(error) == (
        f"the queue jef.jobs.a exists with another x-queue-type {told}: "
        'set queue_type = "classic" in [bus], or delete the queue when it is empty'
    )


def test_an_exchange_of_another_kind() -> None:
    words = INEQUIVALENT.format(
        argument="type", kind="exchange", name="jef.jobs", ours="'topic'", theirs="'direct'"
    )
    assert said(exceptions.ChannelPreconditionFailed(words)) == (
        "the exchange jef.jobs exists with another type (direct; wanted: topic): "
        "delete the exchange when it is not in use, or use another prefix"
    )


def test_another_precondition() -> None:
    """What we do not know is told as the broker said it."""
    error = exceptions.ChannelPreconditionFailed("PRECONDITION_FAILED - something new")
    assert isinstance(meaning(error, WHERE), TopologyConflict)
    assert "PRECONDITION_FAILED - something new" in said(error)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError(),
        OSError("no route"),
        exceptions.ConnectionClosed(320, "CONNECTION_FORCED - broker forced connection closure"),
        exceptions.ConnectionInternalError("INTERNAL_ERROR"),
        exceptions.ChannelNotFoundEntity("NOT_FOUND - no queue"),
    ],
)
def test_waiting_may_help(error: BaseException) -> None:
    """No refusal: the broker is not there, or not yet."""
    assert meaning(error, WHERE) is None


def test_reasons() -> None:
    """Never an empty one."""
    assert reason(OSError("no route")) == "no route"
    assert reason(TimeoutError()) == "TimeoutError"


def test_a_conflict_is_a_refusal() -> None:
    """So that one handler at the door serves both."""
    assert issubclass(TopologyConflict, BrokerError)
