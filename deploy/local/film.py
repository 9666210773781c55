"""The demo's film: `config/workflows/ingest.yaml`, as shipped, over a real media file. Only where ffmpeg is.

It is ingested twice. The first time its proxy fails for a quality that there is none of, and a retry goes on from there
with another; the second time somebody changes his mind while ffmpeg works.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = ROOT / "config" / "workflows" / "ingest.yaml"
_PICTURES = ("picture-0.jpg", "picture-1.jpg", "picture-2.jpg")
STAGES = (
    ("film:probe:1", "probe", "COMPLETED", "3.0 s", "a film comes in, is read;"),
    ("film:sums:1", "checksum", "COMPLETED", "", "beside one another: its checksum,"),
    ("film:proxy:1", "proxy", "FAILED", "CommandFailed", "and a proxy, which fails;"),
    ("film:proxy:2", "proxy", "COMPLETED", "", "mended, it goes on from there"),
    ("film:points:1", "probe", "COMPLETED", "", "long enough for pictures?"),
    *((f"film:pictures.{number}:1", "picture", "COMPLETED", "", "one for each time") for number in range(3)),
    ("film:store:1", "copy", "COMPLETED", "verified", "stored, under a lock;"),
    ("film:clean:1", "clean", "COMPLETED", "", "in the end: cleaned up"),
    ("cut:probe:1", "probe", "COMPLETED", "3.0 s", "the film once more:"),
    ("cut:proxy:1", "proxy", "CANCELLED", "", "cancelled as ffmpeg works;"),
    ("cut:clean:1", "clean", "COMPLETED", "", "that is cleaned up, too"),
)
"""(execution id, action, its end, what that says, what it shows)."""


def is_possible() -> bool:
    """Whether this machine has what it takes."""
    return all(map(shutil.which, ("ffmpeg", "ffprobe")))


def configuration() -> str:
    """Its actions, as shipped, as a template of a playground."""
    text = (ROOT / "examples" / "ingest.toml").read_text()
    return text.replace("{", "{{").replace("}", "}}")


def requests(folder: Path) -> list[dict[str, Any]]:
    """Make the film, and what is asked for; all of it in one folder."""
    film, store = folder / "film.mkv", folder / "store"
    store.mkdir(parents=True)
    source = ("-f", "lavfi", "-i", "testsrc=duration=3:size=320x180:rate=25")
    subprocess.run(["ffmpeg", "-v", "error", *source, "-c:v", "mpeg4", str(film)], check=True)
    asked = []
    for name, how in (("film", {"crf": -5}), ("cut", {"readrate": 0.02})):
        work = folder / f"work-{name}"
        work.mkdir()
        variables = {"asset": name, "source": str(film), "work": str(work), "store": str(store), **how}
        asked.append({"workflowId": name, "workflow": "ingest", "variables": variables})
    return asked


def command(told: dict[str, Any]) -> dict[str, Any] | None:
    """What is commanded when something is told; None: nothing."""
    if (told.get("workflowId"), told.get("workflow"), told["status"]) == ("film", "ingest", "FAILED"):
        return {"command": "retry", "workflowId": "film", "configuration": {"proxy": {"crf": 32}}}
    if (told.get("executionId"), told["status"]) == ("cut:proxy:1", "RUNNING"):
        return {"command": "cancel", "workflowId": "cut", "reason": "the wrong film"}
    return None


def problems(folder: Path) -> Iterator[str]:
    """What is otherwise on the disk than it should be."""
    stored = sorted(path.relative_to(folder / "store").as_posix() for path in (folder / "store").rglob("*.*"))
    wanted = [f"film/{name}" for name in (*_PICTURES, "proxy.mp4")]
    if stored != wanted:
        yield f"in the store is {stored}, not {wanted}"
    left = [path.name for path in folder.glob("work-*")]
    if left:
        yield f"{left} were not cleaned up"
