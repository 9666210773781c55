"""Where a RabbitMQ comes from: one that is installed, Docker, or apt.

Finds, and installs where nothing is found; starts nothing. Standard library only: it runs before anything
is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

URL_VARIABLE = "JEF_AMQP_URL"
"""A broker that is there already; nothing is started or stopped then."""
PREFIX_VARIABLE = "JEF_TEST_RABBITMQ_PREFIX"
"""A folder with `sbin/` and `root/usr/lib/erlang/bin/`: another RabbitMQ, for tests of versions."""

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
_DOCKER_S = 20.0
_POLICY = Path("/usr/sbin/policy-rc.d")
_ADVICE = "install RabbitMQ (`apt-get install rabbitmq-server`, `brew install rabbitmq`) or set JEF_AMQP_URL"


class BrokerError(Exception):
    """No broker can be had, or it does not do as told; the text says what to do."""


def scripts() -> Path | None:
    """The folder of an installed RabbitMQ's scripts, None where there is none."""
    if prefix := os.environ.get(PREFIX_VARIABLE):
        return Path(prefix, "sbin").resolve()
    for pattern in _PLACES:
        for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True):
            if os.access(folder / "rabbitmq-server", os.X_OK):
                return folder
    return None


def has_docker() -> bool:
    """Whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=_DOCKER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def docker(*arguments: str) -> str:
    """Run docker; returns what it prints.

    Raises:
        BrokerError: it failed; the text has what it said.
    """
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BrokerError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def install() -> str:
    """Make sure that a broker can be started; returns what it will be.

    Raises:
        BrokerError: with what to install.
    """
    if os.environ.get(URL_VARIABLE):
        return f"the one in {URL_VARIABLE}"
    if found := scripts():
        return f"RabbitMQ in {found}"
    if has_docker():
        return "RabbitMQ in a Docker container"
    if shutil.which("apt-get") is None:
        raise BrokerError(f"there is no RabbitMQ here and no apt to install it: {_ADVICE}")
    _apt_install("rabbitmq-server")
    if found := scripts():
        return f"RabbitMQ in {found}, just installed"
    raise BrokerError(f"apt installed rabbitmq-server, but its scripts are in no known place: {_ADVICE}")


def _apt_install(package: str) -> None:
    """Install a package of which nothing runs afterwards: a broker of the system's was not asked for."""
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if sudo and shutil.which("sudo") is None:
        raise BrokerError(f"there is no RabbitMQ here, and installing it takes root or sudo: {_ADVICE}")
    print(f"installing {package} with apt …", file=sys.stderr, flush=True)
    # Debian's maintainer scripts ask this policy before they start a service; 101 forbids it.
    hold_back = f"printf '#!/bin/sh\\nexit 101\\n' > {_POLICY} && chmod +x {_POLICY}"
    held = not _POLICY.exists() and _run(*sudo, "sh", "-c", hold_back)
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    options = ["-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"]
    try:
        # A failed update is no end: the package may be known already.
        _run(*apt, *options, "update")
        installed = _run(*apt, *options, "install", "-y", package)
    finally:
        if held:
            _run(*sudo, "rm", "-f", str(_POLICY))
    if not installed:
        raise BrokerError(f"apt-get install {package} failed, see above: {_ADVICE}")
    if Path("/run/systemd/system").is_dir():
        # Otherwise it would start with the machine's next boot.
        _run(*sudo, "systemctl", "--quiet", "disable", "--now", package)


def _run(*command: str) -> bool:
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
