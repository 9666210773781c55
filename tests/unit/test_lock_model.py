"""The formal model of the locks (`docs/models`): every state of a small world.

Always a very small one, so that every change of the model is seen; with `HYPOTHESIS_PROFILE=ci` the bounds of
`docs/models/README.md`, and the mutations: a model in which nothing can fail proves nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "models" / "locks.pml"

missing = [tool for tool in ("spin", "cc") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}: apt-get install spin gcc"),
    pytest.mark.timeout(600),
    pytest.mark.long,
]
deep = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "ci", reason="takes a minute: HYPOTHESIS_PROFILE=ci"
)

SAFETY = (("-DSAFETY",), ())
LIVENESS = (("-DNFAIR=3",), ("-a", "-f", "-N", "served"))
SOON = "-O0"
"""Where the checker has little to look at, building it takes longer."""

Run = tuple[tuple[str, ...], tuple[str, ...]]


def explore(folder: Path, world: str, run: Run, effort: str) -> str:
    """Build the checker of one world and let it look at every state.

    Returns:
        What it says; no error is `errors: 0`.
    """
    compiler, arguments = run
    for command in (
        ("spin", "-a", *world.split(), str(MODEL)),
        ("cc", effort, "-w", *compiler, "-o", "pan", "pan.c"),
        ("./pan", "-m2000000", *arguments),
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max search depth too small" not in done.stdout
    assert "out of memory" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("world", "run"),
    [
        ("-DN=2", SAFETY),
        pytest.param("-DN=3", SAFETY, marks=deep),
        pytest.param("-DN=3 -DK=1", SAFETY, marks=deep),
        pytest.param("-DN=2 -DFENCE -DFENCES=3", SAFETY, marks=deep),
        pytest.param("-DLIVE", LIVENESS, marks=deep),
    ],
)
def test_every_state_is_lawful(tmp_path: Path, world: str, run: Run) -> None:
    """No assertion fails, no state is stuck, and under fairness nobody starves."""
    assert "errors: 0" in explore(tmp_path, world, run, SOON if world == "-DN=2" else "-O2")


@deep
@pytest.mark.parametrize(
    ("world", "run", "said"),
    [
        ("-DNO_A", SAFETY, "(m==11)"),
        ("-DNO_B", SAFETY, "(shared||exclusive)"),
        ("-DNO_C", SAFETY, "!(firm[j])"),
        ("-DNO_SWEEP", SAFETY, "assertion violated blocked"),
        ("-DNO_MOVE", SAFETY, "assertion violated blocked"),
        ("-DNO_RISE -DFENCE -DN=2", SAFETY, "assertion violated (token"),
        ("-DLIVE -DNO_COUNT", LIVENESS, "acceptance cycle"),
    ],
)
def test_the_model_notices_what_is_left_out(tmp_path: Path, world: str, run: Run, said: str) -> None:
    """Each rule is needed: without it the checker finds a history that breaks an assertion."""
    assert said in explore(tmp_path, world, run, SOON)
