"""A machine with a real systemd: Debian's own, booted by systemd-nspawn, in memory over a root that never changes.

Its loopback is this machine's: what runs inside reaches the tests' private broker. It ends with the test, whatever
becomes of that.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

import psutil

from tests.support.process import ROOT

T = TypeVar("T")

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_WITHIN_S = 60
# Into control groups of its own; told to halt the machine when whoever started it is gone.
_START = """
for group in "$@"; do
    [ "$group" = -- ] && break
    mkdir -p "$group" && echo $$ >"$group/cgroup.procs" || exit 1
    shift
done
shift
exec setpriv --pdeathsig TERM -- "$@"
"""


def root_of_machines() -> Path:
    """The root that machines boot from; made where it is missing, which takes most of a minute."""
    made = subprocess.run(
        [ROOT / "deploy" / "local" / "debian_root.sh"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError(f"a system to boot cannot be had: {made.stderr.strip()}")
    return Path(made.stdout.strip())


class Machine:
    """One that runs while its context does.

    Args:
        root: of `root_of_machines`.
        shared: folders and files of this machine's, by where they are to be seen there, read-only.
    """

    def __init__(self, root: Path, shared: Mapping[str, Path]) -> None:
        self.name = f"jef-{secrets.token_hex(4)}"
        is_systemds = Path("/run/systemd/system").exists()
        # Under a systemd it gets a scope from that; else the groups where its systemd keeps services are made here.
        self._groups = [] if is_systemds else [group / self.name for group in _own_groups()]
        self._command = [
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--settings=no", "--volatile=overlay"),
            *("--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=read-only"),
            *([] if is_systemds else ["--keep-unit"]),
            *(f"--machine={self.name}", f"--directory={root}"),
            *(f"--bind-ro={path}:{where}" for where, path in shared.items()),
        ]
        self._process: subprocess.Popen[bytes]
        self._leader = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["sh", "-c", _START, "sh", *map(str, self._groups), "--", *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            self._leader = self.until(self._booted, _BOOT_WITHIN_S, "it did not boot")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # With its init die all of its processes; nspawn then takes down what it had set up.
        for process in self._inits():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.communicate()
        for group in self._groups:
            for inner in sorted(group.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    inner.rmdir()
            with contextlib.suppress(OSError):
                group.rmdir()

    def _inits(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children()
        return []

    def _booted(self) -> int | None:
        """The process that is number 1 inside, once everything is up that starts with it."""
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            said = self._process.stdout.read().decode(errors="replace").strip()
            raise RuntimeError(f"systemd-nspawn cannot boot here (root and control groups needed): {said}")
        for init in self._inits():
            self._leader = init.pid
            state = self.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
            if state in {"running", "degraded"}:
                return init.pid
        return None

    def run(
        self, *words: str, check: bool = True, within_s: float = 100, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in it."""
        kept = [
            f"{key}={value}" for key, value in {"PATH": _PATH, "LC_ALL": "C.UTF-8", **environment}.items()
        ]
        done = subprocess.run(
            [
                *("nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--pid", "--cgroup"),
                *("--", "env", "-i", "-C", "/", *kept, *words),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def write(self, path: str, text: str) -> None:
        """A file in it."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && printf %s "$2" >"$1"', "sh", path, text)

    def until(self, found: Callable[[], T | None], within_s: float = 60, otherwise: str = "") -> T:
        """Ask again and again until there is an answer."""
        until = time.monotonic() + within_s
        while not (answer := found()):
            if time.monotonic() > until:
                raise AssertionError(otherwise or f"not within {within_s:g} s")
            time.sleep(0.1)
        return answer

    # --- what systemd says -----------------------------------------------------------------------------------

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def signal(self, unit: str, number: signal.Signals) -> None:
        """Send a signal to a unit's main process."""
        self.run("systemctl", "kill", "--kill-whom=main", f"--signal={number.name}", unit)

    def journal(self, unit: str) -> str:
        """All that a unit, and systemd about it, has said."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout


def _own_groups() -> list[Path]:
    """The control groups of this process in the hierarchies that systemd uses."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    where = {"" if kind == "cgroup2" else "name=systemd": Path(path) for _, path, kind, options, *_ in mounts
             if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(","))}  # fmt: skip
    mine = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return [where[controllers] / path.lstrip("/") for _, controllers, path in mine if controllers in where]
