"""Back-pressure: when an action's deliveries are switched off and on."""

from __future__ import annotations

from jef_daemon.backlog import Backlog


def switches(limit: int, *actions: str) -> tuple[Backlog, list[tuple[str, bool]]]:
    seen: list[tuple[str, bool]] = []
    return Backlog(limit, actions, lambda action, wanted: seen.append((action, wanted))), seen


def test_deliveries_begin_when_it_is_opened() -> None:
    """Nothing is asked for before the ledger's own jobs are counted."""
    backlog, seen = switches(10, "a")
    backlog.arrived("a", 1)
    assert seen == []
    backlog.open({})
    assert seen == [("a", True)]


def test_a_full_ledger_asks_for_nothing_more() -> None:
    """A restart with a full backlog does not take more in."""
    backlog, seen = switches(10, "a")
    backlog.open({"a": 10})
    assert seen == []
    backlog.left("a", 5)
    assert seen == [("a", True)]


def test_off_at_the_limit_on_at_half() -> None:
    """It does not flutter around the limit."""
    backlog, seen = switches(10, "a")
    backlog.open({})
    backlog.arrived("a", 10)
    backlog.left("a", 4)
    assert seen == [("a", True), ("a", False)]
    backlog.left("a", 1)
    assert seen[-1] == ("a", True)


def test_one_action_does_not_stop_another() -> None:
    """An hours-long action's backlog leaves the others' queues open."""
    backlog, seen = switches(2, "a", "b")
    backlog.open({})
    backlog.arrived("a", 2)
    assert ("b", False) not in seen


def test_a_limit_of_one_still_works() -> None:
    """The smallest backlog: on when empty, off when not."""
    backlog, seen = switches(1, "a")
    backlog.open({})
    backlog.arrived("a", 1)
    backlog.left("a", 1)
    assert seen == [("a", True), ("a", False), ("a", True)]


def test_a_closed_one_switches_nothing() -> None:
    """While it drains, jobs that leave must not open the queue again."""
    backlog, seen = switches(2, "a")
    backlog.open({"a": 2})
    backlog.close()
    backlog.left("a", 2)
    assert seen == []
