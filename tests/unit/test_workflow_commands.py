"""`jef workflows` as it is typed, as far as it needs no daemon."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

import jef_daemon.cli.workflows  # noqa: F401  it adds itself to the tree
from jef_daemon.cli.app import app


def jef(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["workflows", *map(str, words)])


def test_a_folder_is_checked_with_what_nobody_would_find(tmp_path: Path) -> None:
    """And what is wrong with a workflow within several is told once."""
    (tmp_path / "lost.yml").write_text("name: lost")
    (tmp_path / "inner.yaml").write_text("name: inner\nstages: []")
    for name in ("v", "w"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nstages: [{{name: a, workflow: inner}}]")
    for words in ((tmp_path,), ("--folder", tmp_path)):
        done = jef("check", "--without-actions", *words)
        assert done.exit_code == 1
        assert [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()] == [
            "inner.yaml:2: stages: should not be empty",
            "lost.yml: nothing finds it: call it lost.yaml",
            "v.yaml:2: stage a.workflow: the workflow 'inner' has mistakes of its own",
            "w.yaml:2: stage a.workflow: the workflow 'inner' has mistakes of its own",
        ]
