"""Reload: what a running daemon can have of another configuration, and what becomes of its parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jef_daemon.backlog import Backlog
from jef_daemon.config import known_keys
from jef_daemon.errors import RequestRefused
from jef_daemon.intake import UNROUTABLE, Intake
from jef_daemon.messages import JobRequest
from jef_daemon.ports import Delivery
from jef_daemon.reload import _keys, within_reach
from jef_daemon.run.catalogue import Action, ActionSpec, Catalogue, is_outdated, load
from jef_daemon.settings import NEEDS_RESTART, Settings


def action(name: str, executor: str = "m:C", problem: str = "") -> Action:
    return Action(ActionSpec(name, executor), problem=problem)


# --- settings --------------------------------------------------------------------------------------------


def test_what_needs_a_restart_are_keys() -> None:
    """And nothing else is: a wrong one would never be looked at."""
    assert set(NEEDS_RESTART) <= set(known_keys())
    assert set(_keys()) == {key for key in known_keys() if not key.startswith("actions.")}


@pytest.mark.parametrize("key", NEEDS_RESTART)
def test_each_of_them_keeps_its_value_and_is_named(key: str) -> None:
    others: dict[str, object] = {"roles": ["worker"], "http_port": 1, "bus.queue_type": "classic"}
    others |= {
        "tracing.enabled": True,
        "tracing.endpoint": "http://collector:4318",
        "tracing.sampling_ratio": 0.5,
    }
    value = others.get(key, 61 if key.endswith(("_s", "prefetch", "window")) else "other")
    if key.startswith("locks."):
        value = 61.0
    section, _, name = key.rpartition(".")
    wanted = Settings.model_validate({section: {name: value}} if section else {name: value})
    settings = Settings()
    wanted.slots.total = 7
    coming, restart = within_reach(settings, wanted)
    assert restart == [key]
    settings.slots.total = 7
    assert coming == settings


def test_folders_of_executors_come_and_do_not_go() -> None:
    """Modules that were imported from one stay imported."""
    settings = Settings(python_path=[Path("/a"), Path("/b")])
    coming, restart = within_reach(settings, Settings(python_path=[Path("/c"), Path("/b")]))
    assert coming.python_path == [Path("/c"), Path("/b"), Path("/a")]
    assert restart == ["python_path (without /a)"]


def test_whoever_holds_the_settings_sees_the_new_ones() -> None:
    settings = Settings()
    wanted = Settings.model_validate({"slots": {"total": 7}, "actions": {"nap": {"command": ["sleep"]}}})
    settings.become(wanted)
    assert settings == wanted


# --- actions ---------------------------------------------------------------------------------------------


def test_a_catalogue_becomes_another() -> None:
    """Its mappings stay the same objects; what is gone is retired, and is back when it is back."""
    catalogue = Catalogue({name: action(name) for name in ("stays", "goes", "changes")})
    served, known, runs = catalogue.served, catalogue.known, catalogue.known["goes"]
    catalogue.become(
        Catalogue({"stays": action("stays"), "changes": action("changes", "m:D"), "new": action("new")})
    )
    assert set(served) == {"stays", "changes", "new"}
    assert set(known) == {"stays", "changes", "new", "goes"}
    assert known["changes"].spec.executor == "m:D"
    assert catalogue.retired == {"goes"}
    assert runs.is_retired
    catalogue.become(Catalogue({"goes": action("goes", "m:E")}))
    assert catalogue.retired == {"stays", "changes", "new"}
    assert not known["goes"].is_retired
    assert runs.spec.executor == "m:C", "what runs keeps what it was started with"


def test_what_still_comes_for_a_retired_action_is_taken_and_what_cannot_be_routed_is_not() -> None:
    """It was on its way when its action was taken out, and is handed back. Without a queue it would come again."""
    catalogue = Catalogue({"goes": action("goes")})
    intake = Intake(None, None, catalogue.known, 1000, lambda: None, lambda *_: None)  # type: ignore[arg-type]
    catalogue.become(Catalogue({}))
    request = JobRequest.model_validate({"executionId": "1"})
    assert intake._action(Delivery("goes", b"", 1, 1), request).name == "goes"
    with pytest.raises(RequestRefused, match="unroutable"):
        intake._action(Delivery(UNROUTABLE, b"", 1, 1, routing_key="goes"), request)


def test_an_executor_that_was_edited_is_known_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "edited_in_a_test.py"
    file.write_text("from jef_daemon import ActionExecutor\nclass C(ActionExecutor):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = ActionSpec("c", "edited_in_a_test:C")
    assert not is_outdated(spec), "nothing runs of it yet"
    load(spec)
    assert not is_outdated(spec)
    os.utime(file, (1, 1))
    assert is_outdated(spec)
    file.unlink()
    assert is_outdated(spec)


# --- the backlog -----------------------------------------------------------------------------------------


def test_another_limit_and_other_actions() -> None:
    """Deliveries of what is gone end, those of what is new begin, unless the ledger is full of it."""
    seen: list[tuple[str, bool]] = []
    backlog = Backlog(10, ["a", "b"], lambda name, wanted: seen.append((name, wanted)))
    backlog.open({"a": 3, "b": 3})
    seen.clear()
    backlog.change(4, ["b", "c", "d"], {"c": 4})
    assert sorted(seen) == [("a", False), ("d", True)]
    assert dict(backlog.queued) == {"b": 3, "c": 4, "d": 0}
    backlog.arrived("b", 1)
    assert seen[-1] == ("b", False), "the new limit"
    backlog.left("c", 2)
    assert seen[-1] == ("c", True)


def test_what_comes_late_for_an_action_that_is_gone_is_forgotten() -> None:
    """It is handed back: counted when the action comes again it would keep others out."""
    seen: list[tuple[str, bool]] = []
    backlog = Backlog(4, ["a"], lambda name, wanted: seen.append((name, wanted)))
    backlog.open({})
    backlog.change(4, [], {})
    backlog.arrived("a", 4)
    assert seen == [("a", True), ("a", False)]
    backlog.change(4, ["a"], {})
    assert seen[-1] == ("a", True)


def test_a_closed_backlog_lets_nothing_come() -> None:
    """A reload while the daemon stops."""
    seen: list[tuple[str, bool]] = []
    backlog = Backlog(4, ["a"], lambda name, wanted: seen.append((name, wanted)))
    backlog.open({})
    backlog.close()
    backlog.change(4, ["a", "b"], {})
    assert seen == [("a", True)]
