"""The HTTP port of a real daemon: health, metrics, updates, commands, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import httpx
import psutil
import pytest
from broker import PrivateBroker
from prometheus_client.parser import text_string_to_metric_families

from jef_daemon.elsewhere import GONE
from jef_daemon.metrics import DEFINITIONS
from tests.support.amqp import Client
from tests.support.http import client_of, free_port
from tests.support.process import DaemonProcess

OPERATOR = "an-operators-token-of-this-test"
PARTS = {"daemon", "broker", "ledger", "lock service", "watcher"}


@dataclass
class Port:
    """A daemon's HTTP port: as anybody, and as an operator."""

    number: int
    anybody: httpx.AsyncClient
    operator: httpx.AsyncClient


@pytest.fixture
async def web(daemon: DaemonProcess) -> AsyncIterator[Port]:
    """A running daemon with its port open and operators known."""
    token = daemon.folder / "token"
    token.write_text(OPERATOR + "\n")
    token.chmod(0o600)
    port = free_port()
    silent = "[actions.silent]\nexecutor = 'tests.support.executors:Farm'\nupdate_timeout_s = 1.0\n"
    daemon.configure(silent)
    folder = daemon.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("name: short\nstages: [{name: a, action: staged}]\n")
    (folder / "long.yaml").write_text("name: long\nstages: [{name: a, action: away, elsewhere: true}]\n")
    daemon.start(JEF_HTTP_PORT=str(port), JEF_HTTP_TOKEN_FILE=str(token))
    async with client_of(port) as anybody, client_of(port, OPERATOR) as operator:
        yield Port(port, anybody, operator)


async def launched(client: Client, execution_id: str = "1") -> str:
    """A job whose work runs outside; returns its token."""
    await client.submit("farm", execution_id, {"how": "updates"})
    await client.until(lambda: any(told.get("externalId") for told in client.of(execution_id)))
    token: str = client.of(execution_id)[-1]["message"]
    return token


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def metrics(web: Port) -> Samples:
    """Every sample, by name and labels."""
    text = (await web.anybody.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_updates_by_http_move_a_job(web: Port, client: Client) -> None:
    """As those by AMQP do: progress, whether it should stop, the end with its variables."""
    token = await launched(client)
    address, header = "/executions/1/updates", {"Authorization": f"Bearer {token}"}
    update = {"status": "RUNNING", "progress": 40, "message": "pass 1"}
    answer = await web.anybody.post(address, json=update | {"token": token})
    assert (answer.status_code, answer.json()) == (200, {"accepted": True, "cancelRequested": False})
    asked = await web.operator.post("/executions/1/cancel", json={"reason": "wrong file", "by": "ann"})
    assert (asked.status_code, asked.json()["status"]) == (202, "RUNNING")
    answer = await web.anybody.post(address, json=update, headers=header)
    assert answer.json() == {"accepted": True, "cancelRequested": True}
    done = {"status": "COMPLETED", "result": "fine", "jobContextVariables": {"frames": 7}}
    assert (await web.anybody.post(address, json=done, headers=header)).status_code == 200
    end = await client.end_of("1")
    assert (end["status"], end["result"], end["jobContextVariables"]) == ("COMPLETED", "fine", {"frames": 7})
    late = await web.anybody.post(address, json=done, headers=header)
    assert (late.status_code, late.json()["accepted"]) == (409, False)


async def test_what_is_no_update_is_refused(web: Port, client: Client) -> None:
    """With its own status and a sentence; the job does not notice."""
    token = await launched(client)
    good: dict[str, Any] = {"status": "COMPLETED", "result": "stolen", "token": token}
    huge = good | {"jobContextVariables": {"x": "y" * 1024 * 1024}}
    cases: list[tuple[str, bytes, int, str]] = [
        ("1", json.dumps(good | {"token": None}).encode(), 401, "needs its attempt's token"),
        ("1", json.dumps(good | {"token": "x"}).encode(), 409, "the token is not this attempt's"),
        ("1", json.dumps(good | {"token": OPERATOR}).encode(), 409, "the token is not this attempt's"),
        ("2", json.dumps(good).encode(), 404, "no execution 2 is known"),
        ("1", json.dumps(good | {"token": f"{'0' * 12}.x"}).encode(), 404, GONE),
        ("1", json.dumps(good | {"executionId": "2"}).encode(), 422, "executionId"),
        ("1", json.dumps(good | {"status": "QUEUED"}).encode(), 422, "status"),
        ("1", json.dumps(huge).encode(), 413, "bytes are allowed"),
        ("1", b"[]", 422, "not-an-object"),
        ("1", b'{"status": NaN}', 422, "not-json"),
        ("1", b"\xff", 422, "not-json"),
        ("..%2F..%2Fetc", json.dumps(good).encode(), 404, ""),
        ("a b", json.dumps(good).encode(), 422, "executionId"),
    ]
    for execution_id, body, status, reason in cases:
        answer = await web.anybody.post(f"/executions/{execution_id}/updates", content=body)
        assert (answer.status_code, reason in answer.text) == (status, True), (body[:80], answer.text)
    both = await web.anybody.post(
        "/executions/1/updates", json=good, headers={"Authorization": "Bearer another"}
    )
    assert both.status_code == 422
    assert (await web.anybody.get("/executions/1/updates")).status_code == 405
    assert client.statuses("1")[-1] == "RUNNING"
    found = await metrics(web)
    assert found["jef_updates_total", (("outcome", "refused"),)] == 3
    in_ledger = {"stale-token": 2, "unknown-execution": 1}
    assert refused(found) == {**in_ledger, "malformed": 8, "no-token": 1, "unknown-ledger": 1}
    exchange = client.channel.default_exchange
    await exchange.publish(aio_pika.Message(b"no json"), f"{client.prefix}.updates")
    await client.dead_letters(1)
    while (told := refused(await metrics(web)))["malformed"] < 9:
        await asyncio.sleep(0.05)
    assert told == {**in_ledger, "malformed": 9, "no-token": 1, "unknown-ledger": 1}


def refused(found: Samples) -> dict[str, float]:
    """Updates that did not count, by reason."""
    name = "jef_updates_refused_total"
    return {labels[0][1]: value for (each, labels), value in found.items() if each == name and value}


async def test_a_body_without_end_is_cut_off(web: Port) -> None:
    """Chunked, without a length: the limit counts what came."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 64 * 1024

    answer = await web.anybody.post("/executions/1/updates", content=endless())
    assert answer.status_code == 413


async def test_an_update_for_another_ledger_is_passed_on(
    web: Port, client: Client, amqp_url: str, prefix: str, tmp_path: Path
) -> None:
    """Whichever daemon a callback reaches, the one whose token it carries decides."""
    other = DaemonProcess(amqp_url, prefix, tmp_path / "other")
    other.configure("[actions.elsewhere]\nexecutor = 'tests.support.executors:Farm'\n")
    try:
        other.start()
        await client.submit("elsewhere", "9", {"how": "updates"})
        await client.until(lambda: any(told.get("externalId") for told in client.of("9")))
        token = client.of("9")[-1]["message"]
        done = {"status": "COMPLETED", "result": "by detour", "token": token}
        answer = await web.anybody.post("/executions/9/updates", json=done)
        assert (answer.status_code, answer.json()["accepted"]) == (202, True)
        assert (await client.end_of("9"))["result"] == "by detour"
        await client.submit("elsewhere", "8", {"how": "stops"})
        await client.until(lambda: any(told.get("externalId") for told in client.of("8")))
        asked = await web.operator.post("/executions/8/cancel")
        assert asked.status_code == 202
        assert (await client.end_of("8"))["status"] == "CANCELLED"
    finally:
        other.kill()
        await client.channel.queue_delete(f"{prefix}.jobs.elsewhere")


async def test_operators_look_and_cancel(web: Port, client: Client, daemon: DaemonProcess) -> None:
    """With their token only; what is shown is what `jef show --json` shows."""
    await client.submit("slow", "1", {"seconds": 60})
    await client.until(lambda: any(told["message"] == "step 0" for told in client.of("1")))  # its only news
    for wrong in (client_of(web.number), client_of(web.number, "another")):
        async with wrong:
            for answer in (await wrong.get("/executions/1"), await wrong.post("/executions/1/cancel")):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
    strange = await web.anybody.get("/executions/1", headers={b"Authorization": b"Bearer \xe9\xff"})
    assert strange.status_code == 401
    shown = await web.operator.get("/executions/1")
    assert shown.json() == json.loads(daemon.jef("show", "1", "--json").stdout)
    assert (await web.operator.get("/executions/none")).status_code == 404
    asked = await web.operator.post("/executions/1/cancel", json={"reason": "wrong file", "by": "ann"})
    assert asked.status_code == 202
    end = await client.end_of("1")
    assert (end["status"], end["message"]) == ("CANCELLED", "wrong file")
    assert "operator:ann" in daemon.jef("history", "1").stdout
    assert (await web.operator.post("/executions/1/cancel")).status_code == 409
    later = await web.operator.post("/executions/later/cancel")
    assert (later.status_code, later.json()["status"]) == (202, None)
    for wrong_body in (b"[]", b'{"force": "yes"}', b"{"):
        assert (await web.operator.post("/executions/1/cancel", content=wrong_body)).status_code == 422


async def test_without_a_token_file_nobody_is_an_operator(daemon: DaemonProcess) -> None:
    """One sentence says how to change that."""
    port = free_port()
    daemon.start(JEF_HTTP_PORT=str(port))
    async with client_of(port, OPERATOR) as anybody:
        for answer in (await anybody.get("/executions/1"), await anybody.post("/executions/1/cancel")):
            assert answer.status_code == 403
            assert "http_token_file" in answer.json()["reason"]


@pytest.mark.parametrize(
    ("content", "said"), [("short", "at least 16"), ("", "is empty"), (None, "cannot be read")]
)
def test_a_token_that_is_none_ends_the_start(daemon: DaemonProcess, content: str | None, said: str) -> None:
    """Exit code 3, before anything is consumed."""
    token = daemon.folder / "token"
    if content is not None:
        token.write_text(content)
    daemon.start(ready=False, JEF_HTTP_PORT=str(free_port()), JEF_HTTP_TOKEN_FILE=str(token))
    assert daemon.wait() == 3
    assert said in daemon.log.read_text()


async def test_a_port_that_is_taken_ends_the_start(daemon: DaemonProcess) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        daemon.start(ready=False, JEF_HTTP_PORT=str(port))
        assert daemon.wait() == 3
    assert "cannot be had" in daemon.log.read_text()


async def test_readiness_tells_each_part(own_broker: PrivateBroker, prefix: str, tmp_path: Path) -> None:
    """200 while all work; 503 with the part's word while one does not, and alive all the time."""
    daemon = DaemonProcess(own_broker.url, prefix, tmp_path / "daemon")
    port = free_port()
    daemon.configure(bus={"reconnect_max_s": 0.5})
    daemon.start(JEF_HTTP_PORT=str(port))
    try:
        async with client_of(port) as anybody:
            ready = await anybody.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (200, True)
            assert set(ready.json()["parts"]) == PARTS
            await asyncio.to_thread(own_broker.stop)
            without = await until(anybody, 503)
            assert without["parts"]["broker"] == {"works": False, "word": "not connected"}
            assert without["parts"]["ledger"]["works"]
            assert (await anybody.get("/livez")).status_code == 200
            await asyncio.to_thread(own_broker.start)
            assert (await until(anybody, 200))["ready"]
            web = Port(port, anybody, anybody)
            found = await metrics(web)
            assert found["jef_broker_reconnects_total", ()] >= 1
            assert found["jef_broker_connected", ()] == 1
    finally:
        daemon.kill()


async def test_what_died_with_the_daemon_is_counted(web: Port, client: Client, daemon: DaemonProcess) -> None:
    """By the next one, at its start: a dashboard of failures would miss just those."""
    await client.submit("slow", "1", {"seconds": 600})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    daemon.kill()
    daemon.start(JEF_HTTP_PORT=str(web.number))
    assert (await client.end_of("1"))["error"]["type"] == "Interrupted"
    failed = (("action", "slow"), ("status", "FAILED"))
    assert (await metrics(web))["jef_jobs_finished_total", failed] == 1


async def until(anybody: httpx.AsyncClient, status: int, within_s: float = 60) -> dict[str, Any]:
    """Ask for readiness until it is so."""
    end = time.monotonic() + within_s
    while True:
        answer = await anybody.get("/readyz")
        if answer.status_code == status:
            found: dict[str, Any] = answer.json()
            return found
        assert time.monotonic() < end, answer.text
        await asyncio.sleep(0.1)


async def test_it_answers_while_it_drains(web: Port, client: Client, daemon: DaemonProcess) -> None:
    """Not ready any more, but updates count: what runs outside may end while others finish here."""
    token = await launched(client, "outside")
    await client.submit("slow", "inside", {"seconds": 3})
    await client.until(lambda: "RUNNING" in client.statuses("inside"))
    stopping = asyncio.create_task(asyncio.to_thread(daemon.stop))
    assert (await until(web.anybody, 503))["parts"]["daemon"]["word"] == "stopping"
    done = {"status": "COMPLETED", "token": token}
    assert (await web.anybody.post("/executions/outside/updates", json=done)).status_code == 200
    assert (await client.end_of("outside"))["status"] == "COMPLETED"
    assert await stopping == 0
    assert (await client.end_of("inside"))["status"] == "COMPLETED"
    with pytest.raises(httpx.ConnectError):
        await web.anybody.get("/livez")


async def test_metrics_tell_what_happened(web: Port, client: Client) -> None:
    """Each metric is there, and counts what was done; no label names an execution."""
    token = await launched(client)
    await client.submit("quick", "an-id-of-a-job")
    await client.submit("broken", "b", {"how": "raise"})
    await client.publish("quick", b"no json")
    await client.submit("slow", "s", {"seconds": 60})
    for name in ("an-id-of-a-job", "b"):
        await client.end_of(name)
    await client.submit("quick", "an-id-of-a-job")
    await client.dead_letters(1)
    await client.until(lambda: "RUNNING" in client.statuses("s"))
    await client.submit("silent", "late", {"how": "updates"})
    await client.until(lambda: client.statuses("late")[-1:] == ["TIMED_OUT"])
    await client.submit("broken", "crashes", {"how": "os-exit"})
    await client.end_of("crashes")
    away = await client.channel.declare_queue(f"{client.prefix}.jobs.away", durable=True)
    await away.bind(f"{client.prefix}.jobs", "away")
    for name, workflow in (("w-1", "short"), ("w-2", "long"), ("w-3", "none")):
        await client.start_workflow(workflow, name)
    for name in ("w-1", "w-3"):
        await client.end_of_workflow(name)
    await web.anybody.post("/executions/1/updates", json={"status": "RUNNING", "token": token})
    again = ("jef_jobs_received_total", (("action", "quick"), ("outcome", "finished")))
    while not (found := await metrics(web)).get(again) or not found["jef_event_loop_lag_seconds_count", ()]:
        await asyncio.sleep(0.05)
    for name, labels, value in [
        ("jef_jobs_received_total", {"action": "quick", "outcome": "new"}, 1),
        ("jef_jobs_received_total", {"action": "quick", "outcome": "finished"}, 1),
        ("jef_messages_refused_total", {"reason": "not-json"}, 1),
        ("jef_messages_refused_total", {"reason": "workflow-invalid"}, 1),
        ("jef_workflows", {"status": "RUNNING"}, 1),
        ("jef_workflows", {"status": "QUEUED"}, 0),
        ("jef_workflow_duration_seconds_count", {"workflow": "short", "status": "COMPLETED"}, 1),
        ("jef_jobs_finished_total", {"action": "quick", "status": "COMPLETED"}, 1),
        ("jef_jobs_finished_total", {"action": "broken", "status": "FAILED"}, 2),
        ("jef_job_duration_seconds_count", {"action": "quick", "status": "COMPLETED"}, 1),
        ("jef_job_wait_seconds_count", {"action": "slow"}, 1),
        ("jef_jobs", {"action": "slow", "status": "RUNNING"}, 1),
        ("jef_jobs", {"action": "farm", "status": "RUNNING"}, 1),
        ("jef_slots_busy", {}, 1),
        ("jef_slots", {}, 64),
        ("jef_updates_total", {"outcome": "accepted"}, 1),
        ("jef_broker_connected", {}, 1),
        ("jef_ledger_stalled", {}, 0),
        ("jef_locks_held", {"mode": "EXCLUSIVE"}, 0),
        ("jef_progress_total", {"action": "farm"}, 2),  # at its launch, and the update
        ("jef_notifications_total", {"status": "COMPLETED"}, 3),
        ("jef_notifications_total", {"status": "TIMED_OUT"}, 1),
        ("jef_jobs_timed_out_total", {"action": "silent", "clock": "update"}, 1),
        ("jef_watcher_lateness_seconds_count", {}, 1),
        (
            "jef_watcher_watched",
            {},
            1,
        ),  # the job that runs outside; the silent one is not waited for any more
        ("jef_pool_restarts_total", {"cause": "crashed"}, 1),
        ("jef_locks_lost_total", {}, 0),
        *(("jef_part_works", {"part": part}, 1) for part in PARTS),
    ]:
        assert found[name, tuple(sorted(labels.items()))] == value, name
    assert found["jef_ledger_transaction_seconds_count", ()] > 5
    assert 0 < found["jef_ledger_transaction_seconds_sum", ()] < 60
    assert found["jef_publish_seconds_count", ()] > 5
    assert 0 <= found["jef_watcher_lateness_seconds_sum", ()] < 60
    assert 0 <= found["jef_watcher_lag_seconds", ()] < 60
    assert 0 <= found["jef_outbox_age_seconds", ()] < 60
    text = (await web.anybody.get("/metrics")).text
    assert f'prefix="{client.prefix}"' in text
    assert "an-id-of-a-job" not in text
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    ours = {name: kind for name, kind in families.items() if name.startswith("jef_")}
    assert ours == {one.name.removesuffix("_total"): one.kind for one in DEFINITIONS}
    labelled = {each: [label for label, _ in pairs] for each, pairs in found}
    for one in DEFINITIONS:  # by action, one is there once it is counted
        told = labelled.get(one.name if one.kind != "histogram" else f"{one.name}_count")
        assert told == sorted(one.labels) or (told is None and one.labels == ("action",)), one.name


async def test_locks_are_counted(web: Port, client: Client, daemon: DaemonProcess) -> None:
    """Held by mode, and waiting; what was waited, lost, and not renewed."""
    locks = [{"resource": "asset/42", "mode": "EXCLUSIVE"}]
    for name in ("1", "2"):
        await client.submit("slow", name, {"seconds": 60}, locks=locks)
        status = "RUNNING" if name == "1" else "WAITING_FOR_LOCK"
        await client.until(lambda name=name, status=status: status in client.statuses(name))  # type: ignore[misc]
    found = await metrics(web)
    assert found["jef_locks_held", (("mode", "EXCLUSIVE"),)] == 1
    assert found["jef_lock_waiters", ()] == 1
    assert [requests(found, word) for word in ("granted", "waiting", "released")] == [1, 1, 0]
    assert (await web.operator.post("/executions/1/cancel")).status_code == 202
    await client.until(lambda: "RUNNING" in client.statuses("2"))
    found = await metrics(web)
    assert [requests(found, word) for word in ("granted", "waiting", "released")] == [1, 1, 1]
    assert found["jef_lock_wait_seconds_count", (("action", "slow"),)] == 1
    assert (found["jef_locks_lost_total", ()], found["jef_lock_leases_expired_total", ()]) == (0, 0)
    for command in (
        ["release", "--force", "asset/42", "--reason", "its disk is on fire"],
        ["acquire", "asset/9", "--owner", "nightly", "--lease", "1s"],
    ):
        done = await asyncio.to_thread(daemon.jef, "locks", *command)
        assert done.returncode == 0, done.stderr
    assert (await client.end_of("2"))["error"]["type"] == "LockLost"
    while not (found := await metrics(web))["jef_lock_leases_expired_total", ()]:
        await asyncio.sleep(0.1)
    assert (found["jef_locks_lost_total", ()], found["jef_lock_leases_expired_total", ()]) == (1, 1)


def requests(found: Samples, outcome: str) -> float:
    """To the lock service, by its answer."""
    return found["jef_lock_requests_total", (("outcome", outcome),)]


async def test_a_ledger_that_takes_no_writes_is_seen_everywhere(web: Port, daemon: DaemonProcess) -> None:
    """In its own part, and in the watcher's, which cannot do its work meanwhile; the metrics go on being told."""
    path = daemon.folder / "data" / "ledger.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        while (told := await until(web.anybody, 503))["parts"]["watcher"]["works"]:
            await asyncio.sleep(0.1)
        assert "s behind" in told["parts"]["watcher"]["word"]
        assert not told["parts"]["ledger"]["works"]
        assert told["parts"]["broker"]["works"]
        found = await metrics(web)
        works = {part: found["jef_part_works", (("part", part),)] for part in PARTS}
        assert works == dict.fromkeys(PARTS, 1) | {"ledger": 0, "watcher": 0}
        assert found["jef_watcher_lag_seconds", ()] >= 5
        other.execute("ROLLBACK")
    assert (await until(web.anybody, 200))["ready"]
    assert (await metrics(web))["jef_watcher_lag_seconds", ()] < 5


async def test_openmetrics_where_it_is_asked_for(web: Port) -> None:
    asked = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = await web.anybody.get("/metrics", headers=asked)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_without_a_port_nothing_of_it_is_loaded(daemon: DaemonProcess) -> None:
    """The libraries of HTTP take time and memory: whoever does not want them does not pay."""
    daemon.start(PYTHONPROFILEIMPORTTIME="1")
    log = daemon.log.read_text()
    assert "| " in log
    loaded = {line.rpartition("|")[2].strip() for line in log.splitlines() if "import time:" in line}
    assert "jef_daemon.assembly" in loaded
    assert not loaded & {"starlette", "uvicorn", "httpx", "prometheus_client", "h11"}
    assert daemon.process is not None
    assert not psutil.Process(daemon.process.pid).net_connections("tcp4") or all(
        one.status != psutil.CONN_LISTEN for one in psutil.Process(daemon.process.pid).net_connections("tcp")
    )
