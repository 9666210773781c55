"""The Debian package on a machine of its own, under a real systemd: installed, run, crashed, stopped, purged."""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.amqp import Client, delete_all
from tests.support.machine import Machine, root_of_machines
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(
    600
)  # a first test builds the package, and the machine's root where it is not there

UNIT = "jef-daemon.service"
CONFIGURATION = """
prefix = "{prefix}"
amqp_url_file = "amqp-url"
[slots]
total = 8
[jobs]
kill_grace_s = 1.0
[shutdown]
drain_s = 3.0
[actions.nap]
command = ["sleep", "{{configuration.seconds}}"]
[actions.again]
command = ["sleep", "600"]
may_run_again = true
[actions.probe]
command = ["/usr/bin/python3", "/srv/probe.py"]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this checkout."""
    folder = tmp_path_factory.mktemp("package")
    script = ROOT / "deploy" / "debian" / "build.sh"
    built = subprocess.run([script, "--quick", folder], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.strip())


@pytest.fixture(scope="module", autouse=True)
def lintian(package: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Debian's own checks of the package, begun at once: they take their time beside the other tests."""
    found = package.with_suffix(".lintian")
    words = ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)]
    with found.open("wb") as output:
        started = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
    yield started, found
    started.kill()
    started.wait()


def boot(package: Path) -> Machine:
    return Machine(
        root_of_machines(), {"/srv/jef.deb": package, "/srv/probe.py": ROOT / "tests/support/probe.py"}
    )


@pytest.fixture(scope="module")
def shared_prefix(amqp_url_of_module: str) -> Iterator[str]:
    name = f"t{secrets.token_hex(4)}"
    yield name
    asyncio.run(delete_all(amqp_url_of_module, name))


@pytest.fixture(scope="module")
def amqp_url_of_module(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue("broker").url
    return url


@pytest.fixture(scope="module")
def machine(package: Path, amqp_url_of_module: str, shared_prefix: str) -> Iterator[Machine]:
    """One that has the package, with a configuration that was there before; the daemon has been started."""
    with boot(package) as booted:
        booted.write("/etc/jef-daemon/jef.toml", CONFIGURATION.format(prefix=shared_prefix))
        booted.write("/etc/jef-daemon/amqp-url", amqp_url_of_module)
        booted.write("/home/ada/film", "private")
        booted.run("install", "-d", "-m", "1777", "/opt/open")  # what nothing but the unit forbids
        booted.run("dpkg", "--force-confold", "-i", "/srv/jef.deb")
        yield booted


@pytest.fixture
async def told(machine: Machine, amqp_url_of_module: str, shared_prefix: str) -> AsyncIterator[Client]:
    """A foreign client, outside; the daemon inside runs."""
    await asyncio.to_thread(machine.run, "systemctl", "start", UNIT)
    async with Client(amqp_url_of_module, shared_prefix) as connected:
        yield connected


async def test_it_has_started_and_says_what_it_does(machine: Machine, told: Client) -> None:
    """READY was seen: the start has come to its end; STATUS stands where people look. `jef` finds ledger and broker."""
    assert machine.show(UNIT, "ActiveState") == "active"
    assert machine.show(UNIT, "UnitFileState") == "enabled"
    assert "\n    Process: " not in machine.run("systemctl", "status", UNIT).stdout
    name = await running(told, "nap", 600)

    def status() -> bool:
        return "1 running" in machine.run("systemctl", "status", UNIT).stdout

    await asyncio.to_thread(machine.until, status)
    listed = (await asyncio.to_thread(machine.run, "jef", "list")).stdout
    assert name in listed
    await asyncio.to_thread(machine.run, "jef", "cancel", name, "--yes")
    assert (await told.end_of(name))["status"] == "CANCELLED"


def test_units_are_right_and_hardened_where_they_are(machine: Machine) -> None:
    """By systemd's own word about what is installed."""
    for unit in (UNIT, "jef-daemon@worker.service"):
        verified = machine.run("systemd-analyze", "verify", "--man=no", unit)
        assert verified.stdout + verified.stderr == ""
        rated = machine.run("systemd-analyze", "security", "--no-pager", unit).stdout
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", rated)
        assert exposure is not None, rated
        assert float(exposure[1]) <= 1.5


async def test_executors_may_do_what_they_need_and_no_more(told: Client) -> None:
    await told.submit("probe", "probe")
    end = await told.end_of("probe", 60)
    assert end["status"] == "COMPLETED", end


async def test_a_reload_loses_no_job(machine: Machine, told: Client) -> None:
    """Log level, concurrency, actions: a job that runs goes on, one that waits runs by the new rules."""
    configuration = "/etc/jef-daemon/jef.toml"
    before = machine.run("cat", configuration).stdout
    daemon = machine.show(UNIT, "MainPID")
    name, waiting = await running(told, "nap", 605), "waits-for-the-reload"
    machine.write(configuration, before.replace("[actions.nap]", "[actions.nap]\nconcurrency = 1"))
    await asyncio.to_thread(reloaded, machine)
    await told.submit("nap", waiting, {"seconds": 0})
    await told.until(lambda: told.statuses(waiting) == ["QUEUED"])
    more = (
        before.replace("total = 8", "total = 9")
        + '[actions.later]\ncommand = ["true"]\n[logging]\nlevel = "debug"\n'
    )
    machine.write(configuration, more)
    await asyncio.to_thread(reloaded, machine)
    assert (await told.end_of(waiting))["status"] == "COMPLETED"
    await told.submit("later", "served-since-the-reload")
    assert (await told.end_of("served-since-the-reload"))["status"] == "COMPLETED"
    assert told.statuses(name) == ["QUEUED", "RUNNING"]
    assert machine.show(UNIT, "MainPID") == daemon
    assert "sleep\n605\n" in processes(machine)
    await asyncio.to_thread(machine.run, "jef", "cancel", name, "--yes")
    assert (await told.end_of(name))["status"] == "CANCELLED"
    machine.write(configuration, before)
    await asyncio.to_thread(reloaded, machine)


async def test_a_killed_daemon_is_back_and_settles_its_jobs(machine: Machine, told: Client) -> None:
    """What ran is FAILED and told, or runs again where it may; no process of it is left."""
    lost, kept = await running(told, "nap", 610), await running(told, "again")
    assert "sleep\n610\n" in processes(machine)
    before = int(machine.show(UNIT, "NRestarts"))
    machine.signal(UNIT, signal.SIGKILL)
    end = await told.end_of(lost, 60)
    assert (end["status"], end["error"]["type"]) == ("FAILED", "Interrupted")
    await told.until(
        lambda: told.of(kept)[-1]["status"] == "RUNNING" and told.of(kept)[-1]["attempt"] == 2, 60
    )
    assert int(machine.show(UNIT, "NRestarts")) == before + 1
    assert "sleep\n610\n" not in processes(machine)
    await asyncio.to_thread(machine.run, "jef", "cancel", kept, "--yes")


async def test_a_daemon_that_hangs_is_aborted_and_back(machine: Machine, told: Client) -> None:
    """Its watchdog is not fed; where it was stands in the journal; its job is settled."""
    assert machine.show(UNIT, "WatchdogUSec") == "1min"
    machine.write(f"/run/systemd/system/{UNIT}.d/test.conf", "[Service]\nWatchdogSec=6\n")
    machine.run("systemctl", "daemon-reload")
    await asyncio.to_thread(machine.run, "systemctl", "restart", UNIT)
    name = await running(told, "nap", 620)
    machine.signal(UNIT, signal.SIGSTOP)
    end = await told.end_of(name, 90)
    assert (end["status"], end["error"]["type"]) == ("FAILED", "Interrupted")
    said = machine.journal(UNIT)
    assert "Watchdog timeout (limit 6s)!" in said
    assert "Fatal Python error: Aborted" in said
    machine.run("rm", "-r", f"/run/systemd/system/{UNIT}.d")
    machine.run("systemctl", "daemon-reload")


async def test_a_stop_under_load_ends_in_good_order(machine: Machine, told: Client) -> None:
    """Within its time: what can finish has, what cannot is told, what waited is handed back and runs after a start."""
    short = [await running(told, "nap", 2) for _ in range(4)]
    long = [await running(told, "nap", 630) for _ in range(4)]
    waiting = [f"waiting-{number}" for number in range(40)]
    for name in waiting:
        await told.submit("nap", name, {"seconds": 0})
    await told.until(lambda: all(told.statuses(name) for name in waiting))
    await asyncio.to_thread(machine.run, "systemctl", "stop", UNIT, within_s=200)
    assert machine.show(UNIT, "Result") == "success"
    assert machine.show(UNIT, "ExecMainStatus") == "0"
    assert [(await told.end_of(name))["status"] for name in short] == ["COMPLETED"] * 4
    assert [(await told.end_of(name))["error"]["type"] for name in long] == ["Interrupted"] * 4
    queue = await told.channel.get_queue(f"{told.prefix}.jobs.nap")
    ended = [name for name in waiting if "COMPLETED" in told.statuses(name)]
    assert queue.declaration_result.message_count == len(waiting) - len(ended) > 0
    await asyncio.to_thread(machine.run, "systemctl", "start", UNIT)
    assert {(await told.end_of(name))["status"] for name in waiting} == {"COMPLETED"}


def test_anybody_on_the_machine_may_call_jef(machine: Machine) -> None:
    """Also who may not look into /etc/jef-daemon, where the daemon's configuration is."""
    done = machine.run("setpriv", "--reuid=nobody", "--clear-groups", "jef", "list", check=False, HOME="/tmp")
    assert done.returncode == 5
    assert done.stderr.startswith("jef: there is no ledger at /tmp/.local/state/jef-daemon/ledger.db")


async def test_one_role_runs_in_a_unit_of_its_own(machine: Machine) -> None:
    """With a ledger of its own, beside the others."""
    machine.run("systemctl", "start", "jef-daemon@watcher")
    assert machine.show("jef-daemon@watcher", "ActiveState") == "active"
    machine.run("test", "-f", "/var/lib/jef-daemon-watcher/ledger.db")
    machine.run("systemctl", "stop", "jef-daemon@watcher")


async def test_an_upgrade_restarts_what_ran(machine: Machine, told: Client) -> None:
    """New code never comes under a running daemon: it is stopped before, and what ran before runs again."""
    machine.run("systemctl", "start", "jef-daemon@watcher")
    name = await running(told, "nap", 640)
    first = machine.show(UNIT, "MainPID")
    await asyncio.to_thread(machine.run, "dpkg", "--force-confold", "-i", "/srv/jef.deb")
    assert (await told.end_of(name))["error"]["type"] == "Interrupted"
    assert machine.show(UNIT, "ActiveState") == "active"
    assert machine.show(UNIT, "MainPID") != first
    assert machine.show("jef-daemon@watcher", "ActiveState") == "active"
    machine.run("systemctl", "stop", "jef-daemon@watcher")


def test_a_purge_leaves_nothing(package: Path) -> None:
    """Installed where no broker is, which the installation does not wait for; gone with all that it made."""
    with boot(package) as machine:
        before = files_of(machine)
        installed = machine.run("dpkg", "-i", "/srv/jef.deb")
        assert "not started yet" in installed.stderr
        assert machine.show(UNIT, "ActiveState") == "activating"
        assert "no broker" in machine.show(UNIT, "StatusText")
        assert files_of(machine) - before > {"/var/lib/jef-daemon/ledger.db", "/etc/jef-daemon/amqp-url"}
        machine.run("dpkg", "--purge", "jef-daemon")
        assert files_of(machine) - before == set()
        assert "jef" not in processes(machine)
        assert machine.run("systemctl", "list-units", "--all", "--no-legend", "jef-daemon*").stdout == ""
        # The account stays, so that its number comes to nobody else; nobody can log in with it.
        assert "/usr/sbin/nologin" in machine.run("getent", "passwd", "jef-daemon").stdout


async def test_what_jef_systemd_install_writes_works(package: Path, amqp_url_of_module: str) -> None:
    """From a virtual environment in /opt, as pip makes one: the printed commands are typed, a job runs."""
    prefix = f"t{secrets.token_hex(4)}"
    with boot(package) as machine:
        unpack = (
            "dpkg-deb -x /srv/jef.deb /new && mv /new/usr/lib/jef-daemon /opt && rm /opt/jef-daemon/bin/jef"
        )
        machine.run("sh", "-c", unpack)  # but for its script, which the package has made for another folder
        said = machine.run("/opt/jef-daemon/bin/python3", "-m", "jef_daemon", "systemd", "install").stdout
        for command in said.partition("next:\n")[2].splitlines():
            if "editor" in command:
                machine.write(command.split()[1], amqp_url_of_module)
                machine.write(
                    f"/etc/systemd/system/{UNIT}.d/name.conf", f"[Service]\nEnvironment=JEF_PREFIX={prefix}\n"
                )
            else:
                await asyncio.to_thread(machine.run, "sh", "-c", command)
        assert machine.show(UNIT, "ActiveState") == "active"
        assert (
            "ExecStart=/opt/jef-daemon/bin/python3 -m jef_daemon run"
            in machine.run("systemctl", "cat", UNIT).stdout
        )
        machine.write("/var/lib/jef-daemon/files/a", "abc")
        async with Client(amqp_url_of_module, prefix) as told:
            await told.submit("checksum", "1", {"path": "a"})
            assert (await told.end_of("1"))["status"] == "COMPLETED"
    await delete_all(amqp_url_of_module, prefix)


def test_lintian_finds_nothing_that_is_not_explained(lintian: tuple[subprocess.Popen[bytes], Path]) -> None:
    """Each of the package's overrides has its reason beside it."""
    process, found = lintian
    assert (process.wait(), found.read_text()) == (0, "")


def reloaded(machine: Machine) -> None:
    """Reload, and wait until it is in force, by the journal's field."""

    def count() -> int:
        said = machine.run(
            "journalctl", "--quiet", "-u", UNIT, "JEF_EVENT=reloaded", "-o", "cat", check=False
        )
        return len(said.stdout.splitlines())

    before = count()
    machine.run("systemctl", "reload", UNIT)
    machine.until(lambda: count() > before)
    machine.until(lambda: machine.show(UNIT, "ActiveState") == "active")


async def running(told: Client, action: str, seconds: float = 0) -> str:
    """Submit a job and wait until it runs; returns its id."""
    name = f"{action}-{secrets.token_hex(4)}"
    await told.submit(action, name, {"seconds": seconds})
    await told.until(lambda: "RUNNING" in told.statuses(name), 60)
    return name


def processes(machine: Machine) -> str:
    """The command lines of all of its processes, a word in a line."""
    return machine.run("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'").stdout


def files_of(machine: Machine) -> set[str]:
    """Every file and folder but those of the kernel, of the journal, and of dpkg's own book-keeping."""
    apart = ["/proc", "/sys", "/dev", "/run", "/tmp", "/srv", "/var/log", "/var/lib/dpkg", "/var/lib/systemd"]
    apart += ["/var/cache", "/var/tmp"]
    pruned = " -o ".join(f"-path {path}" for path in apart)
    found = machine.run("sh", "-c", f"find / \\( {pruned} \\) -prune -o -print").stdout
    return {
        line
        for line in found.splitlines()
        if not re.fullmatch(r"/etc/(passwd|group|g?shadow)-?|/etc/\.pwd\.lock", line)
    }
