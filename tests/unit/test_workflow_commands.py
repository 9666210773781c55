"""`jef workflows` as it is typed, as far as it needs no daemon."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

import jef_daemon.cli.workflows  # noqa: F401  it adds itself to the tree
from jef_daemon.cli.app import app
from jef_daemon.cli.columns import fitting


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


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    checked = jef("check", "--folder", folder)
    assert str(checked.exception) == f"{folder} cannot be read: No such file or directory"
    drawn = jef("draw", "w", "--folder", folder)
    said = f"{folder}: there is no workflow 'w': the folder cannot be read: No such file or directory"
    assert str(drawn.exception) == said
    tmp_path.joinpath("empty").mkdir()
    empty = jef("check", "--folder", tmp_path / "empty")
    assert str(empty.exception) == f"there is no definition in {tmp_path / 'empty'}; put NAME.yaml there"


def test_what_is_right_is_told_with_its_revision(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    for stages, told in (
        ("{name: a, action: x}", "1 stage"),
        ("{name: a, action: x}, {name: b, action: x}", "2 stages"),
    ):
        file.write_text(f"name: w\nstages: [{stages}]")
        done = jef("check", "--without-actions", file)
        assert (done.exit_code, done.stdout.partition(", revision ")[0]) == (0, f"{file}: ok, {told}")
    assert json.loads(jef("schema").stdout)["title"] == "jef workflow"


def test_a_narrow_terminal_goes_without_what_can_be_spared() -> None:
    rows = [("id", "began", "message"), ("w-9", "2026-11-28 09:13:49", "stage proxy failed")]
    assert fitting(rows, 0, [1]) == fitting(rows, 80, [1])
    assert fitting(rows, 80, [1])[1] == "w-9  2026-11-28 09:13:49  stage proxy failed"
    assert fitting(rows, 30, [1])[1] == "w-9  stage proxy failed"
    assert fitting(rows, 12, [1])[1] == "w-9  stage …"
