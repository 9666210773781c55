"""The two kinds of a private broker: a node of an installed RabbitMQ, and a Docker container.

Each starts, stops and kills one broker whose particulars are in a `State`; neither waits until it answers,
nor looks after two callers at once: `broker.PrivateBroker` does. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import broker_process as process
from broker_source import PREFIX_VARIABLE, BrokerError, docker, scripts

_STOP_S = 30.0
_PORT_S = 1.0
"""Patience with a port that something of our own may be about to leave."""
_IMAGE = "rabbitmq:4"


@dataclass
class State:
    """What is remembered of a broker between two calls."""

    kind: str
    """`node` or `container`."""
    port: int
    dist_port: int = 0
    epmd_port: int = 0
    name: str = field(default_factory=lambda: f"jef{secrets.token_hex(4)}")
    """Of the node, or of the container. The data belong to it."""
    pid: int = 0
    """Of the node's process; 0: never started."""
    born: str = ""
    """When that process began."""

    @classmethod
    def new(cls, kind: str) -> State:
        """A broker with ports that are free now."""
        port, dist_port, epmd_port = process.free_ports(3)
        return cls(kind, port, dist_port, epmd_port)


class Kind(Protocol):
    """How a kind of broker is started and ended."""

    def start(self) -> None:
        """Start it; what it was remains."""

    def stop(self) -> None:
        """End it in good order, with all that belongs to it; data stay."""

    def kill(self) -> None:
        """End it as a power failure would."""

    def remove(self) -> None:
        """Drop what is kept outside its folder."""

    def is_alive(self) -> bool:
        """Whether its process runs; it may not answer yet."""

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`."""

    def log_tail(self) -> str:
        """The end of its log."""


class Node:
    """A node of an installed RabbitMQ, started by hand: own data, log, ports, cookie and port mapper.

    Args:
        folder: of all that is its own.
        state: which node; `pid` and `born` are set by `start`.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._state = state
        self._home = folder / "home"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, its process the leader of a group."""
        self._clear_remains()
        state = self._state
        if not process.is_free(state.port, _PORT_S):
            # Somebody took it while we were down. Another port is better than no broker.
            state.port = process.free_ports(1)[0]
        state.dist_port, state.epmd_port = process.free_ports(2)
        self._write_configuration()
        folder = _scripts()
        with (self._folder / "out.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(folder / "rabbitmq-server")],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._folder,
            )
        state.pid, state.born = self._process.pid, process.birth(self._process.pid)

    def stop(self) -> None:
        """SIGTERM, patience, SIGKILL; its port mapper too."""
        if self.is_alive():
            os.kill(self._state.pid, signal.SIGTERM)
            if not self._wait_gone():
                self.kill()
        self._clear_remains()

    def kill(self) -> None:
        """Kill -9; the port mapper stays, as nothing tells it."""
        if self.is_alive():
            process.kill_group(self._state.pid)
            self._wait_gone()

    def remove(self) -> None:
        """Nothing: all is in its folder."""

    def is_alive(self) -> bool:
        """Whether the very process we started runs."""
        return bool(self._state.born) and process.birth(self._state.pid) == self._state.born

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on it."""
        command = [str(_scripts() / "rabbitmqctl"), "-q", *arguments]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def log_tail(self) -> str:
        """The end of what it printed."""
        try:
            return (self._folder / "out.log").read_text(errors="replace")[-3000:].strip()
        except OSError:
            return "(it wrote no log)"

    def _wait_gone(self) -> bool:
        gone = process.wait_gone(self._state.pid, self._state.born, _STOP_S)
        if gone and self._process is not None:
            self._process.poll()
        return gone

    def _clear_remains(self) -> None:
        """The port mapper, and helpers of a killed node."""
        if self._state.epmd_port and self._state.born:
            process.stop_port_mapper(self._state.epmd_port)
        process.kill_all_at_home(self._home)

    def _write_configuration(self) -> None:
        for name in ("home", "mnesia", "log"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "enabled_plugins").write_text("[].\n")
        (self._folder / "none.conf").write_text("")
        (self._folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self._state.port}\n"
            "disk_free_limit.absolute = 50MB\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "log.console.level = warning\n"
        )

    def _environment(self) -> dict[str, str]:
        """Ours without what would lead it elsewhere, and all of RabbitMQ's places in our folder."""
        folder, state = self._folder, self._state
        foreign = ("RABBITMQ_", "ERL_", "JEF_", "NOTIFY_SOCKET")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        if prefix := os.environ.get(PREFIX_VARIABLE):
            kept["PATH"] = f"{prefix}/root/usr/lib/erlang/bin:{kept.get('PATH', '')}"
        return kept | {
            "HOME": str(self._home),
            "LANG": kept.get("LANG", "C.UTF-8"),
            "RABBITMQ_NODENAME": f"{state.name}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(state.port),
            "RABBITMQ_DIST_PORT": str(state.dist_port),
            "ERL_EPMD_PORT": str(state.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the server instead of waiting for it: one process, one id.
            "RUNNING_UNDER_SYSTEMD": "true",
        }


class Container:
    """A container; its data live in it until it is removed.

    Args:
        state: which container.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def start(self) -> None:
        """Start it; the first time, Docker may have to fetch the image."""
        name = self._state.name
        if name in docker("ps", "-a", "--format", "{{.Names}}").split():
            docker("start", name)
            return
        print(f"starting {_IMAGE} in Docker (the first time it is downloaded) …", file=sys.stderr, flush=True)
        # The node, and with it the data, is named after the host.
        docker(
            "run",
            "-d",
            "--name",
            name,
            "--hostname",
            name,
            "-p",
            f"127.0.0.1:{self._state.port}:5672",
            _IMAGE,
        )

    def stop(self) -> None:
        """Stop it; it stays, as its data are in it."""
        if self.is_alive():
            docker("stop", "-t", f"{_STOP_S:.0f}", self._state.name)

    def kill(self) -> None:
        """Kill -9."""
        if self.is_alive():
            docker("kill", self._state.name)

    def remove(self) -> None:
        """Remove it with its data."""
        docker("rm", "-f", "-v", self._state.name)

    def is_alive(self) -> bool:
        """Whether Docker runs it."""
        return self._state.name in docker("ps", "--format", "{{.Names}}").split()

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` in it."""
        return docker("exec", self._state.name, "rabbitmqctl", "-q", *arguments)

    def log_tail(self) -> str:
        """The end of what it printed."""
        return docker("logs", "--tail", "30", self._state.name).strip()


def _scripts() -> Path:
    folder = scripts()
    if folder is None:
        raise BrokerError("the RabbitMQ that this broker was started with is gone; install it again")
    return folder
