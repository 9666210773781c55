"""The ingest of a real media file, `config/workflows/ingest.yaml`, with ffmpeg: to its end, cancelled, timed out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of moving pictures."""
    path = tmp_path_factory.mktemp("in") / "a.mkv"
    source = ["-f", "lavfi", "-i", "testsrc=duration=3:size=320x180:rate=25"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-c:v", "mpeg4", str(path)], check=True)
    return path


@pytest.fixture
def ingest(daemon: DaemonProcess, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with the example's definition and actions, as shipped."""
    folder = daemon.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "config/workflows/ingest.yaml", folder)
    actions = (ROOT / "examples/ingest.toml").read_text().replace('"probe:Probe"', '"examples.probe:Probe"')
    roots = f'roots = ["{tmp_path.parent}"]\n'
    review = '[actions.review]\nexecutor = "tests.support.executors:Resumed"\n'
    daemon.configure(f"{actions}\n[actions.checksum]\n{roots}[actions.copy]\n{roots}{review}")
    (tmp_path / "store").mkdir()
    daemon.start()
    yield daemon
    daemon.kill()


def request(name: str, movie: Path, tmp_path: Path, **variables: Any) -> dict[str, Any]:
    work = tmp_path / f"work-{name}"
    work.mkdir()
    store = str(tmp_path / "store")
    return {
        "variables": {"asset": name, "source": str(movie), "work": str(work), "store": store, **variables}
    }


async def test_a_failed_stage_is_retried_and_all_is_stored(
    ingest: DaemonProcess, client: Client, movie: Path, tmp_path: Path
) -> None:
    """The proxy fails for its quality, which a person mends; the work folder is kept until then."""
    checked = ingest.jef("workflows", "check")
    assert checked.returncode == 0, checked.stdout
    await client.start_workflow("ingest", "one", **request("one", movie, tmp_path, crf=-5))
    failed = await client.end_of_workflow("one")
    assert failed["status"] == "FAILED", failed
    assert failed["error"]["stage"] == "proxy"
    assert (tmp_path / "work-one").exists()
    retried = ingest.jef("workflows", "retry", "one", "proxy.crf:=32")
    assert retried.returncode == 0, retried.stderr
    await client.until(lambda: client.of_workflow("one")[-1]["status"] in {"COMPLETED", "CANCELLED"}, 90)
    end = client.of_workflow("one")[-1]
    assert end["status"] == "COMPLETED", end
    assert end["variables"]["duration"] == pytest.approx(3.0, abs=0.2)
    stored = tmp_path / "store" / "one"
    assert sorted(each.name for each in stored.iterdir()) == [
        *("picture-0.jpg", "picture-1.jpg", "picture-2.jpg", "proxy.mp4")
    ]
    assert all((stored / f"picture-{number}.jpg").read_bytes()[:2] == b"\xff\xd8" for number in range(3))
    assert not (tmp_path / "work-one").exists(), "cleaned up"
    assert client.statuses("one:probe:1").count("COMPLETED") == 1
    assert not client.of("one:probe:2"), "what was done is not done again"
    held = ingest.jef("history", "one:store:1").stdout
    assert "asset/one" in held
    document = json.loads(ingest.jef("workflows", "show", "one", "--json").stdout)
    origins = {variable["name"]: variable["setBy"] for variable in document["variables"]}
    assert (origins["duration"], origins["asset"], origins["review"]) == ("points", "request", "definition")


async def test_a_run_is_cancelled_half_way(
    ingest: DaemonProcess, client: Client, movie: Path, tmp_path: Path
) -> None:
    """While ffmpeg works: it is stopped, and what it left is cleaned up."""
    await client.start_workflow("ingest", "two", **request("two", movie, tmp_path, readrate=0.02))
    await client.until(lambda: "RUNNING" in client.statuses("two:proxy:1"))
    cancelled = ingest.jef("workflows", "cancel", "two", "--reason", "wrong film")
    assert cancelled.returncode == 0, cancelled.stderr
    end = await client.end_of_workflow("two")
    assert (end["status"], end["message"]) == ("CANCELLED", "wrong film")
    stages = {stage["name"]: stage["status"] for stage in end["stages"]}
    assert (stages["proxy"], stages["store"], stages["clean"]) == ("CANCELLED", "NOT_RUN", "COMPLETED")
    assert not (tmp_path / "work-two").exists()


async def test_a_stage_that_timed_out_is_resumed(
    ingest: DaemonProcess, client: Client, movie: Path, tmp_path: Path
) -> None:
    """TIMED_OUT fails nothing: the workflow waits, and goes on with the late update."""
    await client.start_workflow("ingest", "three", **request("three", movie, tmp_path, review=True))
    review = "three:review:1"
    await client.until(lambda: "TIMED_OUT" in client.statuses(review), 90)
    await client.until(lambda: "timed out: review" in client.of_workflow("three")[-1]["message"])
    assert client.of_workflow("three")[-1]["status"] == "RUNNING"
    assert ingest.jef("resume", review).returncode == 0
    back = client.statuses(review).index("TIMED_OUT") + 1
    await client.until(lambda: "RUNNING" in client.statuses(review)[back:])
    token = next(told["message"] for told in client.of(review) if told["progress"] == 1)
    done = {"executionId": review, "token": token, "status": "COMPLETED", "result": "looks good"}
    await client.send("updates", done)
    end = await client.end_of_workflow("three", 90)
    assert end["status"] == "COMPLETED", end
    assert (tmp_path / "store" / "three" / "proxy.mp4").exists()
