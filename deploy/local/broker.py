#!/usr/bin/env python3
"""A RabbitMQ to work with, from the first of: JEF_AMQP_URL; an installed rabbitmq-server; Docker; apt.

An installed server is run as a private node: own data, log, ports, cookie and port mapper under one folder,
loopback only, as whatever user calls this, without systemd. Nothing of the system's is touched.

    broker.py start [--folder .jef/broker]    start it (again: says where it is), print its URL
    broker.py stop | kill | status | url      the rest
    broker.py install                         only make sure that there is a server to start

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX_VARIABLE = "JEF_TEST_RABBITMQ_PREFIX"
"""A folder with `sbin/` and `root/usr/lib/erlang/bin/`: another RabbitMQ, for tests of versions."""
URL_VARIABLE = "JEF_AMQP_URL"

_PLACES = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/rabbitmq/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
    "/home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin",
    "/opt/homebrew/sbin",
    "/usr/local/sbin",
)
"""Where the true scripts are; Debian's /usr/sbin/rabbitmq-server would switch to another user."""

_START_S = 90.0
_STOP_S = 30.0
_ADVICE = "install RabbitMQ (`apt-get install rabbitmq-server`, `brew install rabbitmq`) or set JEF_AMQP_URL"


class BrokerError(Exception):
    """No broker can be had; the text says what to do."""


def scripts() -> Path | None:
    """The folder of an installed RabbitMQ's scripts, None where there is none."""
    if prefix := os.environ.get(PREFIX_VARIABLE):
        return Path(prefix, "sbin").resolve()
    for pattern in _PLACES:
        for folder in sorted(glob.glob(pattern), reverse=True):
            if os.access(Path(folder, "rabbitmq-server"), os.X_OK):
                return Path(folder)
    return None


def has_docker() -> bool:
    """Whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def install() -> str:
    """Make sure that a broker can be started; returns what it will be.

    Raises:
        BrokerError: with what to install.
    """
    if os.environ.get(URL_VARIABLE):
        return "the one in JEF_AMQP_URL"
    if found := scripts():
        return f"RabbitMQ in {found}"
    if has_docker():
        return "RabbitMQ in a Docker container"
    if shutil.which("apt-get") is None:
        raise BrokerError(f"there is no RabbitMQ here and no apt to install it: {_ADVICE}")
    _apt_install("rabbitmq-server")
    if found := scripts():
        return f"RabbitMQ in {found}, just installed"
    raise BrokerError(f"apt installed rabbitmq-server, but its scripts are in none of the known places: {_ADVICE}")


def _apt_install(package: str) -> None:
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if sudo and shutil.which("sudo") is None:
        raise BrokerError(f"there is no RabbitMQ here, and installing it takes root or sudo: {_ADVICE}")
    print(f"installing {package} with apt …", flush=True)
    # Installing must not leave a system broker running: services of this one call are not started.
    policy = Path("/usr/sbin/policy-rc.d")
    hold_back = [*sudo, "sh", "-c", f"printf '#!/bin/sh\\nexit 101\\n' > {policy} && chmod +x {policy}"]
    held = not policy.exists() and subprocess.run(hold_back, check=False).returncode == 0
    quiet = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    try:
        subprocess.run([*quiet, "update"], check=False, stdout=subprocess.DEVNULL)
        done = subprocess.run([*quiet, "install", "-y", package], check=False, stdout=subprocess.DEVNULL)
    finally:
        if held:
            subprocess.run([*sudo, "rm", "-f", str(policy)], check=False)
    if done.returncode:
        raise BrokerError(f"apt-get install {package} failed (exit {done.returncode}): {_ADVICE}")


class PrivateBroker:
    """A broker of our own in a folder.

    Starting it twice finds the one that runs. After `kill` or `stop`, `start` goes on with the same data on
    the same port.

    Args:
        folder: keeps data, log and state; made when needed.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder).resolve()
        self._state_file = self._folder / "state.json"

    # --- what it is --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The AMQP URL.

        Raises:
            BrokerError: it was never started.
        """
        if external := os.environ.get(URL_VARIABLE):
            return external
        state = self._state()
        if not state:
            raise BrokerError(f"no broker was started in {self._folder}")
        return f"amqp://guest:guest@127.0.0.1:{state['port']}/"

    @property
    def pid(self) -> int:
        """Process id of the node; 0 while it does not run."""
        try:
            pid = int((self._folder / "pid").read_text())
        except (OSError, ValueError):
            return 0
        return pid if self._is_ours(pid) else 0

    def is_running(self) -> bool:
        """Whether it answers AMQP."""
        state = self._state()
        return bool(os.environ.get(URL_VARIABLE)) or bool(state and _answers(int(state["port"])))

    # --- what it does ------------------------------------------------------------------------------------

    def start(self) -> str:
        """Start it unless it runs; returns its URL.

        Raises:
            BrokerError: it does not come up; the text has the end of its log.
        """
        if external := os.environ.get(URL_VARIABLE):
            return external
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self.is_running():
                self._kill_remains()
                self._start()
        return self.url

    def stop(self) -> None:
        """Stop it in good order, its port mapper too. Data stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it as a power failure would; the port mapper stays, as it would."""
        state = self._state()
        if state.get("docker"):
            _docker("kill", state["docker"])
        elif pid := self.pid:
            os.kill(pid, signal.SIGKILL)
            _wait_gone(pid)

    def restart(self) -> str:
        """Stop and start again; returns the URL, the same."""
        self.stop()
        return self.start()

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`; returns what it prints.

        Raises:
            BrokerError: it failed; the text has what it said.
        """
        state = self._state()
        if state.get("docker"):
            return _docker("exec", state["docker"], "rabbitmqctl", "-q", *arguments)
        folder = scripts()
        if folder is None:
            raise BrokerError(_ADVICE)
        done = subprocess.run(
            [str(folder / "rabbitmqctl"), "-q", *arguments],
            env=self._environment(state),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    # --- inside ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        install()
        state = self._state()
        if not state:
            ports = _free_ports(3)
            name = f"jef{secrets.token_hex(4)}"
            state = {"port": ports[0], "dist": ports[1], "epmd": ports[2], "node": f"{name}@localhost", "docker": ""}
        if not scripts():
            state["docker"] = state["docker"] or str(state["node"]).partition("@")[0]
            self._write(state)
            self._start_container(state)
        else:
            self._write(state)
            self._start_node(state)
        self._wait_until_it_answers(int(state["port"]))

    def _start_node(self, state: dict[str, str]) -> None:
        for name in ("home", "mnesia", "log"):
            (self._folder / name).mkdir(exist_ok=True)
        (self._folder / "enabled_plugins").write_text("[].\n")
        (self._folder / "none.conf").write_text("")
        (self._folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{state['port']}\n"
            "disk_free_limit.absolute = 50MB\nvm_memory_high_watermark.absolute = 1GB\nlog.console.level = warning\n"
        )
        folder = scripts()
        with (self._folder / "out.log").open("ab") as log:
            subprocess.Popen(
                [str(folder and folder / "rabbitmq-server")],
                env=self._environment(state),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._folder,
            )

    def _start_container(self, state: dict[str, str]) -> None:
        if state["docker"] in _docker("ps", "-a", "--format", "{{.Names}}").split():
            _docker("start", state["docker"])
            return
        publish = f"127.0.0.1:{state['port']}:5672"
        _docker("run", "-d", "--name", state["docker"], "-p", publish, "rabbitmq:4")

    def _environment(self, state: dict[str, str]) -> dict[str, str]:
        folder = self._folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_", "JEF_"))}
        if prefix := os.environ.get(PREFIX_VARIABLE):
            kept["PATH"] = f"{prefix}/root/usr/lib/erlang/bin:{kept.get('PATH', '')}"
        return kept | {
            "HOME": str(folder / "home"),
            "RABBITMQ_NODENAME": str(state["node"]),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(state["port"]),
            "RABBITMQ_DIST_PORT": str(state["dist"]),
            "ERL_EPMD_PORT": str(state["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "LANG": kept.get("LANG", "C.UTF-8"),
        }

    def _wait_until_it_answers(self, port: int) -> None:
        until = time.monotonic() + _START_S
        while not _answers(port):
            if time.monotonic() > until:
                raise BrokerError(f"RabbitMQ does not answer on port {port} after {_START_S:g} s:\n{self._log_tail()}")
            time.sleep(0.1)

    def _end(self, number: signal.Signals) -> None:
        if os.environ.get(URL_VARIABLE) or not self._folder.exists():
            return
        with self._alone():
            state = self._state()
            if state.get("docker"):
                _docker("rm", "-f", state["docker"])
            elif pid := self.pid:
                os.kill(pid, number)
                if not _wait_gone(pid):
                    os.kill(pid, signal.SIGKILL)
                    _wait_gone(pid)
            self._kill_remains()

    def _kill_remains(self) -> None:
        """The port mapper, and helpers of a killed node: whatever runs with this folder as its home."""
        home = f"HOME={self._folder / 'home'}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if home in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        if not Path("/proc").exists() and (state := self._state()) and (epmd := shutil.which("epmd")):
            subprocess.run([epmd, "-port", str(state["epmd"]), "-kill"], capture_output=True, check=False)

    def _is_ours(self, pid: int) -> bool:
        """Whether a process id is still our node's: ids are used again."""
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return not Path("/proc").exists() and _exists(pid)
        return str(self._folder).encode() in command or str(self._state().get("node", "?")).encode() in command

    def _state(self) -> dict[str, str]:
        try:
            state: dict[str, str] = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state

    def _write(self, state: dict[str, str]) -> None:
        self._state_file.write_text(json.dumps(state))

    def _log_tail(self) -> str:
        try:
            return (self._folder / "out.log").read_text(errors="replace")[-3000:]
        except OSError:
            return "(it wrote no log)"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two callers at once: the second waits and then finds the first one's broker."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _answers(port: int) -> bool:
    """Whether an AMQP broker greets on a port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            connection.settimeout(5)
            return connection.recv(1) == b"\x01"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _wait_gone(pid: int) -> bool:
    until = time.monotonic() + _STOP_S
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not _exists(pid) or _is_zombie(pid):
            return True
        time.sleep(0.05)
    return False


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BrokerError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["install", "start", "stop", "kill", "status", "url"])
    parser.add_argument("--folder", type=Path, default=Path(".jef/broker"))
    options = parser.parse_args()
    broker = PrivateBroker(options.folder)
    try:
        if options.command == "install":
            print(install())
        elif options.command == "start":
            print(broker.start())
        elif options.command == "url":
            print(broker.url)
        elif options.command == "status":
            print("running" if broker.is_running() else "stopped")
        else:
            getattr(broker, options.command)()
    except BrokerError as error:
        print(f"broker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
