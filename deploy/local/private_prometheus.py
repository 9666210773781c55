"""A Prometheus to work with: an installed one, or the one that `setup.sh --tests` has unpacked; loopback only.

It reads this repository's own configuration and rules, from a copy that asks more often, since nobody who looks
at a test or waits for a picture wants to wait for a quarter of an hour.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from broker_process import free_ports

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
_START_S = 60.0


def program(name: str) -> str:
    """Where `prometheus` or `promtool` is.

    Raises:
        FileNotFoundError: nowhere.
    """
    unpacked = ROOT / ".jef" / "prometheus" / "usr" / "bin" / name
    found = shutil.which(name) or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        raise FileNotFoundError(f"there is no {name} here; `make setup-tests` unpacks it")
    return found


def copy_of_shipped(folder: Path, targets: list[str], every: str) -> Path:
    """A copy of the configuration and its rules that scrapes these targets so often; returns its file."""
    shutil.copytree(SHIPPED, folder)
    file = folder / "prometheus.yml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings["global"] |= {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every}
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "targets" / "jef.yml").write_text(yaml.safe_dump([{"targets": targets}]), encoding="utf-8")
    return file


class PrivatePrometheus:
    """A running Prometheus, asked over its HTTP API.

    Args:
        port: where it listens.
        log: what it says.
    """

    def __init__(self, port: int, log: Path) -> None:
        self.log = log
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def is_ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def get(self, path: str, **arguments: str | float) -> Any:
        """The data that an address of its API answers with.

        Raises:
            ValueError: it refuses; the text says why.
        """
        answer = self._http.get(f"/api/v1/{path}", params=arguments).json()
        if answer["status"] != "success":
            raise ValueError(f"{arguments}: {answer['error']}")
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """The series that an expression has now; a scalar is one without labels."""
        data = self.get("query", query=expression)
        found = (
            [{"metric": {}, "value": data["result"]}] if data["resultType"] == "scalar" else data["result"]
        )
        return list(found)

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[Any]:
        """The series that an expression has in a time."""
        data = self.get("query_range", query=expression, start=start, end=end, step=step_s)
        return list(data["result"])


@contextlib.contextmanager
def running(targets: list[str], every: str = "1s") -> Iterator[PrivatePrometheus]:
    """A Prometheus with our configuration that scrapes these targets; gone behind it, with what it has kept."""
    with tempfile.TemporaryDirectory(prefix="jef-prometheus-") as name:
        folder, [port] = Path(name), free_ports(1)
        file = copy_of_shipped(folder / "configuration", targets, every)
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(
                        program("prometheus"),
                        f"--config.file={file}",
                        f"--storage.tsdb.path={folder / 'data'}",
                    ),
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        prometheus = PrivatePrometheus(port, log)
        try:
            _wait(prometheus, process)
            yield prometheus
        finally:
            prometheus.close()
            process.kill()
            process.wait()


def _wait(prometheus: PrivatePrometheus, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while not prometheus.is_ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"Prometheus did not start:\n{prometheus.log.read_text()[-4000:]}")
        time.sleep(0.05)
