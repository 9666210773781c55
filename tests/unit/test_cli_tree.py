"""The command line loads what a command needs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from docs.generate import command_tree
from jef_daemon.cli.app import FAMILIES, app, families, main

ALL = list(FAMILIES)


def test_each_command_is_in_the_family_that_adds_it() -> None:
    """The table is written by hand; the tree knows."""
    tree = command_tree()
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(tree.commands)
    added = {
        command.name or command.callback.__name__.rstrip("_"): command.callback
        for command in app.registered_commands
        if command.callback
    }
    for family, names in FAMILIES.items():
        modules = {added[name].__module__ for name in names if name in added}
        assert modules <= {f"jef_daemon.cli.{family}"}


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["run"], ["daemon"]),
        (["list", "--status", "FAILED"], ["jobs"]),
        (["list", "--help"], ["jobs"]),
        (["-c", "list", "run"], ["daemon", "jobs"]),
        (["dead-letters", "list"], ["jobs", "letters"]),
        ([], ALL),
        (["--help"], ALL),
        (["-h", "run"], ALL),
        (["lsit"], ALL),
    ],
)
def test_what_is_loaded(arguments: list[str], needed: list[str]) -> None:
    """An option's value may look like a command; help and typing errors are answered from the whole tree."""
    assert families(arguments) == needed


def test_no_example_is_broken_in_a_terminal_of_80_columns() -> None:
    """Help keeps a column free at each side; a line that goes on in the next cannot be copied."""

    def lines(command: Any) -> Iterator[str]:
        yield from (command.help or "").partition("Examples:\n")[2].splitlines()
        for inner in getattr(command, "commands", {}).values():
            yield from lines(inner)

    tree = command_tree()
    examples = [line for line in lines(tree) if line]
    assert len(examples) > 50
    assert [line for line in (*examples, *tree.epilog.splitlines()) if len(line) > 78] == []


@pytest.mark.parametrize("command", ["run", "locks", "cancel"])
def test_examples_are_indented(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind one paragraph, of a family of commands, behind several."""
    monkeypatch.setattr(sys, "argv", ["jef", command, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main()
    _, _, behind = capsys.readouterr().out.partition("\n Examples:")
    assert behind.splitlines()[1].startswith(f"   jef {command}")


def test_a_daemon_loads_no_pretty_printer() -> None:
    """Neither it nor its children: it takes a fifth of their start."""
    code = "import jef_daemon.daemon, sys; print(sorted({'rich', 'pygments'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
