"""The broker's users from `jef definitions`: on a real broker each does all of its work, and nothing else."""

from __future__ import annotations

import json
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import broker_kinds
import pika
import pika.exceptions
import pytest
from broker import URL_VARIABLE, PrivateBroker

from jef_daemon.names import Names
from jef_daemon.rabbitmq.users import rights
from tests.support.process import ROOT, DaemonProcess

PREFIX, ELSEWHERE = "acme", "elsewhere"
"""`ELSEWHERE`: a virtual host with the same users and names, where nobody works: there it is tried what is refused."""
PARTS = sorted(rights(Names()))
NAMES = Names(PREFIX)
QUEUES = ("jobs.nap", "unroutable", "dead-letters", "locks", "updates", "control", "workflows")
EXCHANGES = ("jobs", "status", "dead", "unroutable", "daemons", "watched", "workflow-status", "workflows")
LEDGER = "0123456789ab"


@dataclass
class Site:
    """A broker that has loaded the definitions."""

    broker: PrivateBroker
    passwords: Path

    def url(self, part: str, vhost: str = "%2f") -> str:
        """How a user logs in."""
        user = f"{PREFIX}-{part}"
        password = (self.passwords / user).read_text().strip()
        port = urlsplit(self.broker.url).port
        return urlunsplit(("amqp", f"{user}:{password}@127.0.0.1:{port}", f"/{vhost}", "", ""))

    def connect(self, part: str, vhost: str = "%2f") -> pika.BlockingConnection:
        """Log in."""
        return pika.BlockingConnection(pika.URLParameters(self.url(part, vhost)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A broker of the module's own; one file loaded when it starts, as in compose, another when it runs."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "jef.toml").write_text(f'prefix = "{PREFIX}"\n[actions.nap]\ncommand = ["true"]\n')
    define(folder, "/", "definitions.json")
    define(folder, ELSEWHERE, "elsewhere.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URL_VARIABLE, raising=False)
        broker = PrivateBroker(folder / "broker")
        write = broker_kinds.Node._write_configuration
        added = (ROOT / "deploy/docker/rabbitmq.conf").read_text().replace("/run/jef", str(folder))

        def write_more(node: broker_kinds.Node) -> None:
            write(node)
            with (folder / "broker/rabbitmq.conf").open("a") as configuration:
                configuration.write(added)

        patch.setattr(broker_kinds.Node, "_write_configuration", write_more)
        broker.start()
        broker.ctl("import_definitions", str(folder / "elsewhere.json"))
        yield Site(broker, folder / "passwords")
        broker.remove()


def define(folder: Path, vhost: str, name: str) -> None:
    """Write definitions for a virtual host, as the command line makes them."""
    words = ["--config", str(folder / "jef.toml"), "definitions", "--passwords", str(folder / "passwords")]
    made = subprocess.run(
        [sys.executable, "-m", "jef_daemon", *words, "--vhost", vhost],
        check=True,
        capture_output=True,
        text=True,
    )
    (folder / name).write_text(made.stdout)


# --- what each may do, and nothing else --------------------------------------------------------------------


def refused(connection: pika.BlockingConnection, step: Callable[[Any], object]) -> bool:
    """Whether the broker refuses a step for lack of permission."""
    channel = connection.channel()
    try:
        channel.confirm_delivery()
        step(channel)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != 403:  # not refused but wrong: the step itself must be mended
            raise
        return True
    channel.close()
    return False


def publish(exchange: str, key: str) -> Callable[[Any], object]:
    return lambda channel: channel.basic_publish(exchange, key, b"{}")


def get(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.basic_consume(queue, lambda *_: None)


def hear(exchange: str) -> Callable[[Any], object]:
    def bind(channel: Any) -> None:
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue, exchange, "#")

    return bind


def declare(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.queue_declare(queue, exclusive=True)


def delete(exchange: str) -> Callable[[Any], object]:
    return lambda channel: channel.exchange_delete(exchange)


STEPS: dict[str, Callable[[Any], object]] = {
    # An own exclusive queue, whose name the broker gives.
    "declare own": lambda channel: channel.queue_declare("", exclusive=True),
    **{f"get {name}": get(f"{PREFIX}.{name}") for name in QUEUES},
    **{f"publish {name}": publish(f"{PREFIX}.{name}", "nap") for name in EXCHANGES},
    "publish by queue": publish("", f"{PREFIX}.jobs.nap"),
    **{f"hear {name}": hear(f"{PREFIX}.{name}") for name in EXCHANGES},
    "declare jobs": declare(f"{PREFIX}.jobs.other"),
    "declare elsewhere": declare("another.queue"),
    **{f"declare of {part}": declare(f"{PREFIX}-{part}.answers") for part in PARTS},
    # Last: in this order each is gone for the next, who may not have known of it.
    "delete amq": delete("amq.topic"),
}

MAY: dict[str, set[str]] = {
    "producer": {"declare own", "publish jobs", "publish workflows", "declare of producer"},
    "reader": {"declare own", "hear status", "hear workflow-status", "declare of reader"},
    "outside": {"declare own", "publish by queue", "declare of outside"},
    "operator": {
        *("declare own", "declare of operator", "publish jobs", "publish workflows", "publish by queue"),
        *("hear status", "hear workflow-status", "get dead-letters"),
    },
    "daemon": {
        *(f"get {name}" for name in QUEUES if name != "dead-letters"),
        *(f"publish {name}" for name in EXCHANGES),
        *("publish by queue", "declare jobs"),
    },
    "watcher": {"publish status", "publish watched", "publish by queue"},
}


@pytest.mark.parametrize("part", PARTS)
def test_each_may_do_its_own_and_nothing_else(site: Site, part: str) -> None:
    """Every step tried; the broker's word decides. `hear` needs a queue of one's own to hear with."""
    connection = site.connect(part, ELSEWHERE)
    allowed = {name for name, step in STEPS.items() if not refused(connection, step)}
    connection.close()
    assert allowed == MAY[part]


def test_passwords_are_needed_and_not_told(site: Site) -> None:
    """The file has hashes only; a wrong password is refused; nobody is an administrator."""
    told = json.loads(site.broker.ctl("list_users", "--formatter", "json"))
    ours = {user["user"]: user["tags"] for user in told if user["user"].startswith(PREFIX)}
    assert ours == {f"{PREFIX}-{part}": [] for part in PARTS}
    assert "guest" not in {user["user"] for user in told}, "with users of its own the broker makes none"
    file = (site.passwords.parent / "definitions.json").read_text()
    for path in site.passwords.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text().strip() not in file
    parameters = pika.URLParameters(site.url("producer"))
    parameters.credentials = pika.PlainCredentials(f"{PREFIX}-producer", "guess")
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        pika.BlockingConnection(parameters)


def test_without_passwords_nobody_can_log_in(site: Site, tmp_path: Path) -> None:
    """Until the operator gives one."""
    made = subprocess.run(
        [sys.executable, "-m", "jef_daemon", "--prefix", "later", "definitions"],
        check=True,
        capture_output=True,
        text=True,
    )
    (tmp_path / "definitions.json").write_text(made.stdout)
    site.broker.ctl("import_definitions", str(tmp_path / "definitions.json"))
    parameters = pika.URLParameters(site.url("producer"))
    for password in ("", "later-producer"):
        parameters.credentials = pika.PlainCredentials("later-producer", password)
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            pika.BlockingConnection(parameters)
    site.broker.ctl("change_password", "later-producer", "given")
    parameters.credentials = pika.PlainCredentials("later-producer", "given")
    pika.BlockingConnection(parameters).close()


def test_a_producer_can_be_held_to_some_actions(site: Site) -> None:
    """By topic permissions, as the page says."""
    page = (ROOT / "docs/rabbitmq.md").read_text()
    words = shlex.split(page.partition("rabbitmqctl set_topic_permissions ")[2].partition("\n")[0])
    assert words[:2] == ["jef-producer", "jef.jobs"]
    named = [word.replace("jef", PREFIX) for word in words[:2]]
    site.broker.ctl("set_topic_permissions", "-p", ELSEWHERE, *named, *words[2:])
    connection = site.connect("producer", ELSEWHERE)
    assert not refused(connection, publish(NAMES.jobs, "thumbnail"))
    assert refused(connection, publish(NAMES.jobs, "nap"))
    connection.close()
    site.broker.ctl("clear_topic_permissions", "-p", ELSEWHERE, named[0])


# --- what each does all day --------------------------------------------------------------------------------


class Reader:
    """Whoever listens, as the user `reader`: a queue of its own on all statuses."""

    def __init__(self, site: Site, vhost: str = "%2f") -> None:
        self._connection = site.connect("reader", vhost)
        self._channel = self._connection.channel()
        self._queue = f"{PREFIX}-reader.{time.monotonic_ns()}"
        self._channel.queue_declare(self._queue, exclusive=True)
        for exchange in (NAMES.status, NAMES.workflow_status):
            self._channel.queue_bind(self._queue, exchange, "#")
        self.told: list[dict[str, Any]] = []

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def until(
        self, name: str, status: str, with_key: str = "status", key: str = "executionId"
    ) -> dict[str, Any]:
        """Wait until a job (or a workflow) is told to have a status, in a notification that has a key."""
        until = time.monotonic() + 40
        while time.monotonic() < until:
            for _, _, body in self._channel.consume(self._queue, auto_ack=True, inactivity_timeout=0.2):
                if body is None:
                    break
                self.told.append(json.loads(body))
                told = self.told[-1]
                if (told.get(key), told["status"]) == (name, status) and with_key in told:
                    return told
        raise AssertionError(f"{name} never was {status}: {self.told}")


@pytest.fixture
def reader(site: Site) -> Iterator[Reader]:
    listener = Reader(site)
    yield listener
    listener.close()


@pytest.fixture(scope="module")
def daemon(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon in all roles, as the user `daemon`."""
    process = DaemonProcess(site.url("daemon"), PREFIX, tmp_path_factory.mktemp("daemon"))
    process.configure(slots={"total": 1}, shutdown={"drain_s": 0.5})
    process.start()
    yield process
    process.kill()


def submit(site: Site, name: str, action: str, configuration: Any = None, **more: Any) -> None:
    """As the user `producer`, confirmed."""
    connection = site.connect("producer", more.pop("vhost", "%2f"))
    channel = connection.channel()
    channel.confirm_delivery()
    properties = pika.BasicProperties(delivery_mode=2, reply_to=more.pop("reply_to", None))
    body = json.dumps({"executionId": name, "configuration": configuration or {}, **more}).encode()
    channel.basic_publish(NAMES.jobs, action, body, properties, mandatory=True)
    connection.close()


def jef(site: Site, part: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user."""
    return subprocess.run(
        [sys.executable, "-m", "jef_daemon", "--amqp-url", site.url(part), "--prefix", PREFIX, *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


def test_the_daemon_is_ready_for_its_work(site: Site, daemon: DaemonProcess) -> None:
    """`jef check` tries permissions one by one, as its user and as another."""
    checked = daemon.jef("check")
    assert checked.returncode == 0, checked.stdout
    assert "permission to consume" in checked.stdout
    assert "permission" in jef(site, "reader", "check").stdout.partition("WRONG")[2]


def test_jobs_run_from_request_to_answer(site: Site, daemon: DaemonProcess, reader: Reader) -> None:
    """Producer, daemon and reader; the answer comes to the producer's own queue."""
    connection = site.connect("producer")
    channel = connection.channel()
    channel.queue_declare(f"{PREFIX}-producer.answers", exclusive=True)
    submit(
        site,
        "whole",
        "quick",
        reply_to=f"{PREFIX}-producer.answers",
        locks=[{"resource": "asset/42", "mode": "EXCLUSIVE"}],
    )
    assert reader.until("whole", "COMPLETED")["result"] == "done"
    for _, _, body in channel.consume(f"{PREFIX}-producer.answers", auto_ack=True, inactivity_timeout=30):
        assert json.loads(body or b"{}")["status"] == "COMPLETED"
        break
    connection.close()


def test_a_producer_starts_workflows(site: Site, daemon: DaemonProcess, reader: Reader) -> None:
    """By their exchange, as a client and by the command line; an operator too; a reader does not."""
    folder = daemon.folder / "data" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "line.yaml").write_text("name: line\nstages: [{name: a, action: quick}]\n")
    connection = site.connect("producer")
    channel = connection.channel()
    channel.confirm_delivery()
    request = {"workflowId": "w-1", "workflow": "line"}
    channel.basic_publish(NAMES.workflows, "", json.dumps(request).encode(), mandatory=True)
    connection.close()
    assert reader.until("w-1", "COMPLETED", "workflow", key="workflowId")["variables"] == {}
    for number, part in enumerate(("producer", "operator"), 2):
        started = jef(site, part, "workflows", "start", "line", "--id", f"w-{number}")
        assert started.returncode == 0, started.stderr
        reader.until(f"w-{number}", "COMPLETED", "workflow", key="workflowId")
    assert "ACCESS_REFUSED" in jef(site, "reader", "workflows", "start", "line").stderr


def test_operators_cancel_look_at_locks_and_replay(site: Site, daemon: DaemonProcess, reader: Reader) -> None:
    """By the command line; and what they do reaches the daemon."""
    submit(site, "long", "slow", {"seconds": 600}, locks=[{"resource": "asset/7", "mode": "SHARED"}])
    while "asset/7" not in jef(site, "operator", "locks", "list").stdout:
        assert daemon.process is not None
        assert daemon.process.poll() is None
    assert jef(site, "operator", "cancel", "long", "--reason", "wrong file").returncode == 0
    assert reader.until("long", "CANCELLED")["reason"] == "wrong file"
    submit(site, "bad", "quick", locks="none")
    reader.until("bad", "FAILED")
    letters = jef(site, "operator", "dead-letters", "list")
    assert "bad" in letters.stdout, letters
    assert jef(site, "operator", "dead-letters", "replay", "1").returncode == 0
    assert "ACCESS_REFUSED" in jef(site, "reader", "cancel", "long").stderr


def test_who_works_outside_updates(site: Site, daemon: DaemonProcess, reader: Reader) -> None:
    """To the queue of updates, by the default exchange; it need not be able to submit."""
    submit(site, "outside", "farm")
    token = reader.until("outside", "RUNNING", "externalId")["message"]
    connection = site.connect("outside")
    channel = connection.channel()
    channel.confirm_delivery()
    update = {"executionId": "outside", "token": token, "status": "COMPLETED", "result": "rendered"}
    channel.basic_publish("", NAMES.updates, json.dumps(update).encode(), mandatory=True)
    connection.close()
    assert reader.until("outside", "COMPLETED")["result"] == "rendered"


def test_a_watcher_watches_as_its_own_user(site: Site, tmp_path: Path) -> None:
    """What a dead daemon left behind: the watcher goes on with its ledger, and can do what it must."""
    # Where no other daemon takes the job, or flags it.
    reader = Reader(site, ELSEWHERE)
    daemon = DaemonProcess(site.url("daemon", ELSEWHERE), PREFIX, tmp_path)
    daemon.arguments = ("--role", "worker")
    daemon.start()
    submit(site, "forgotten", "farm", timeouts={"update": 2}, vhost=ELSEWHERE)
    reader.until("forgotten", "RUNNING", "externalId")
    daemon.kill()
    daemon.url = site.url("watcher", ELSEWHERE)
    daemon.configure()
    daemon.arguments = ("--role", "watcher")
    daemon.start()
    assert "no update for" in reader.until("forgotten", "TIMED_OUT")["message"]
    assert daemon.stop() == 0
    reader.close()


def test_a_reader_watches_by_the_command_line(site: Site, daemon: DaemonProcess) -> None:
    """`jef watch`, with no other right than to hear."""
    words = ["--amqp-url", site.url("reader"), "--prefix", PREFIX, "watch", "--json", "--for", "60"]
    with subprocess.Popen(
        [sys.executable, "-m", "jef_daemon", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as watching:
        assert watching.stdout is not None
        told = ""
        for number in range(100):  # until it listens, nothing is kept for it
            submit(site, f"watched-{number}", "quick")
            if select.select([watching.stdout], [], [], 0.3)[0]:
                told = watching.stdout.readline()
                break
        watching.kill()
    assert json.loads(told)["executionId"].startswith("watched-")


def test_what_was_not_started_is_handed_back(site: Site, daemon: DaemonProcess, reader: Reader) -> None:
    """The last thing that a daemon does, to the exchange of requests; and all the while it was refused nothing."""
    submit(site, "last", "slow", {"seconds": 600})
    submit(site, "waits", "quick")
    reader.until("last", "RUNNING")
    reader.until("waits", "QUEUED")
    assert daemon.stop() == 0
    connection = site.connect("daemon")
    consumer = connection.channel()
    for _, _, body in consumer.consume(NAMES.job_queue("quick"), inactivity_timeout=30):
        assert json.loads(body or b"{}")["executionId"] == "waits"
        break
    connection.close()
    assert "ACCESS_REFUSED" not in daemon.log.read_text()


def test_the_definitions_name_what_the_daemon_declares(site: Site, daemon: DaemonProcess) -> None:
    """Queues and exchanges of the file are the daemon's, so that it finds them equal."""
    file = json.loads((site.passwords.parent / "definitions.json").read_text())
    queues = {queue["name"] for queue in file["queues"]}
    assert queues >= {f"{PREFIX}.{name}" for name in QUEUES}
    assert {exchange["name"] for exchange in file["exchanges"]} == {f"{PREFIX}.{name}" for name in EXCHANGES}
