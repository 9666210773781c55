"""The broker that `make demo`, `make run` and these tests work on: a node of our own beside the system's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import broker_process
import broker_source
import pika
import pytest
from broker import URL_VARIABLE, BrokerError, PrivateBroker
from broker_kinds import State

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "local" / "broker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a broker that the tests of this module share, as a start takes seconds."""
    return tmp_path_factory.mktemp("private") / "broker"


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[PrivateBroker]:
    """That broker."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(URL_VARIABLE, raising=False)
        private = PrivateBroker(folder)
        yield private
        private.remove()


@pytest.fixture
def private(shared: PrivateBroker, monkeypatch: pytest.MonkeyPatch) -> PrivateBroker:
    """That broker, running, even where the other tests use one of the outside."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    shared.start()
    return shared


def state_of(folder: Path) -> State:
    return State(**json.loads((folder / "state.json").read_text()))


def processes_at(folder: Path) -> list[str]:
    """What runs with its home in a folder: beam, epmd and their helpers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "comm").read_text().strip())
        except OSError:
            continue
    return found


def run_script(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != URL_VARIABLE}
    # Not the virtual environment's: it has to work before there is one.
    return subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-E", "-s", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
        check=False,
        timeout=100,
    )


def test_a_second_start_finds_the_first_one_s_broker(private: PrivateBroker, folder: Path) -> None:
    before = state_of(folder)
    assert private.start() == private.url == PrivateBroker(folder).start()
    assert state_of(folder) == before
    assert private.is_running()


def test_starts_at_once_make_one_broker(private: PrivateBroker, folder: Path) -> None:
    private.stop()
    urls: list[str] = []
    starts = [threading.Thread(target=lambda: urls.append(PrivateBroker(folder).start())) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert urls == [private.url] * 3
    assert processes_at(folder).count("beam.smp") == 1


def test_all_its_ports_are_on_the_loopback_interface_only(private: PrivateBroker, folder: Path) -> None:
    state = state_of(folder)
    listening: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, status, *_ = line.split()
            address, _, number = local.partition(":")
            if status == "0A":
                listening.setdefault(int(number, 16), set()).add(address)
    for port in (state.port, state.dist_port, state.epmd_port):
        assert listening[port] <= {"0100007F", "0" * 24 + "01000000"}, port


def test_rabbitmqctl_reaches_it(private: PrivateBroker) -> None:
    assert private.ctl("eval", "1 + 1.").strip() == "2"
    with pytest.raises(BrokerError, match="no_such_command"):
        private.ctl("no_such_command")


def test_data_port_and_name_outlive_a_kill_and_a_restart(private: PrivateBroker, folder: Path) -> None:
    with pika.BlockingConnection(pika.URLParameters(private.url)) as connection:
        connection.channel().queue_declare("kept", durable=True)
    # A queue that was declared a moment ago may die with the broker: its log of them is written every other second.
    private.restart()
    with pika.BlockingConnection(pika.URLParameters(private.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", "kept", b"still here", pika.BasicProperties(delivery_mode=2))
    url, name = private.url, state_of(folder).name
    private.kill()
    assert not private.is_running()
    assert private.start() == url
    assert private.restart() == url
    assert state_of(folder).name == name
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        _, _, body = connection.channel().basic_get("kept", auto_ack=True)
    assert body == b"still here"


def test_stop_leaves_neither_node_nor_port_mapper_behind(private: PrivateBroker, folder: Path) -> None:
    assert {"beam.smp", "epmd"} <= set(processes_at(folder))
    state = state_of(folder)
    private.stop()
    assert processes_at(folder) == []
    assert all(broker_process.is_free(port) for port in (state.port, state.dist_port, state.epmd_port))
    assert not private.is_running()
    private.stop()


def test_stop_after_a_kill_ends_the_port_mapper_too(private: PrivateBroker, folder: Path) -> None:
    private.kill()
    private.stop()
    assert processes_at(folder) == []


def test_a_process_that_has_got_the_id_of_our_node_is_left_alone(
    private: PrivateBroker, folder: Path
) -> None:
    private.stop()
    state = state_of(folder)
    with subprocess.Popen(["sleep", "60"]) as other:
        state.pid = other.pid
        (folder / "state.json").write_text(json.dumps(vars(state)))
        assert not private.is_running()
        private.kill()
        private.stop()
        time.sleep(0.1)
        assert other.poll() is None
        other.kill()


def test_a_port_that_was_taken_meanwhile_is_given_up(private: PrivateBroker, folder: Path) -> None:
    private.stop()
    with socket.create_server(("127.0.0.1", state_of(folder).port)) as squatter:
        assert not private.is_running()
        url = private.start()
        assert f":{squatter.getsockname()[1]}/" not in url
        assert private.is_running()


def test_the_script_starts_tells_and_stops_with_the_bare_system_python(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    place = ("--folder", folder)
    assert run_script("status", *place).stdout == "stopped\n"
    started = run_script("start", *place)
    try:
        assert started.returncode == 0, started.stderr
        assert run_script("url", *place).stdout == started.stdout
        assert run_script("status", *place).stdout == "running\n"
        # The starter has gone; nobody but the system is left to reap the node.
        assert run_script("kill", *place).returncode == 0
        assert run_script("status", *place).stdout == "stopped\n"
    finally:
        assert run_script("remove", *place).returncode == 0
    assert processes_at(folder) == []
    assert not folder.exists()


def test_a_node_that_cannot_start_says_so_at_once_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbin").mkdir()
    server = tmp_path / "sbin" / "rabbitmq-server"
    server.write_text("#!/bin/sh\necho the disk has melted\nexit 1\n")
    server.chmod(0o755)
    monkeypatch.setenv(broker_source.PREFIX_VARIABLE, str(tmp_path))
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with pytest.raises(BrokerError, match=r"ended instead of starting[^$]*the disk has melted"):
        PrivateBroker(tmp_path / "broker").start()


def test_a_broker_of_the_outside_is_used_and_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, "amqp://elsewhere/")
    outside = PrivateBroker(tmp_path / "none")
    assert outside.start() == outside.url == "amqp://elsewhere/"
    assert outside.is_running()
    outside.stop()
    with pytest.raises(BrokerError, match="not ours to kill"):
        outside.kill()
    assert not (tmp_path / "none").exists()


def test_where_there_is_no_way_to_a_broker_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setattr(broker_source, "_PLACES", ())
    monkeypatch.delenv(broker_source.PREFIX_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match=r"apt-get install rabbitmq-server.*brew install rabbitmq"):
        PrivateBroker(tmp_path / "broker").start()


def test_docker_is_asked_where_no_server_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for docker: it records what it is told, and greets as AMQP does on its port."""
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    calls = tmp_path / "calls"
    serve = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "while True: c, _ = s.accept(); c.recv(8); c.send(bytes([1])); c.close()"
    )
    (tmp_path / "serve.py").write_text(serve)
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >>{calls}\nname={tmp_path}/name\ncase $1 in\n'
        f"run) echo $4 >$name; port=${{8#*:}}; port=${{port%%:*}}\n"
        f"  {sys.executable} {tmp_path}/serve.py $port >/dev/null 2>&1 & echo $! >{tmp_path}/pid ;;\n"
        f"ps) [ ! -f $name ] || cat $name ;;\n"
        f"stop|kill) kill $(cat {tmp_path}/pid) ;;\nesac\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.delenv(broker_source.PREFIX_VARIABLE, raising=False)
    monkeypatch.setattr(broker_source, "_PLACES", ())
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    contained = PrivateBroker(tmp_path / "broker")
    url = contained.start()
    try:
        name = state_of(tmp_path / "broker").name
        assert contained.start() == url
        contained.ctl("list_queues")
    finally:
        contained.remove()
    told = calls.read_text()
    port = url.rstrip("/").rpartition(":")[2]
    assert f"run -d --name {name} --hostname {name} -p 127.0.0.1:{port}:5672 rabbitmq:4\n" in told
    assert told.count("run ") == 1
    assert f"exec {name} rabbitmqctl -q list_queues\n" in told
    assert f"rm -f -v {name}\n" in told
    shutil.rmtree(tmp_path / "broker", ignore_errors=True)
