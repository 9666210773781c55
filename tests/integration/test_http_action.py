"""The action `http` in a real daemon, against a real service in a process of its own and against hostile ones."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import aio_pika
import httpx

from tests.support.amqp import Client
from tests.support.http import free_port
from tests.support.process import DaemonProcess
from tests.support.services import RenderService, Scripted, certificate, response

SECRET = "Bearer the-secret-of-the-render-service"
FAILURE = "jef_daemon.actions.exchange.ServiceFailure"


def serve(daemon: DaemonProcess, *ports: int, more: str = "", http_port: int = 0) -> None:
    """Start a daemon whose action may talk to some ports of this machine."""
    hosts = json.dumps([f"127.0.0.1:{port}" for port in ports])
    daemon.configure(f"[actions.http]\nallowed_hosts = {hosts}\nplain_http = true\n{more}\n")
    daemon.start(JEF_HTTP_PORT=str(http_port))


def of_ledger(daemon: DaemonProcess, query: str) -> Any:
    """One value of its ledger."""
    with closing(sqlite3.connect(daemon.folder / "data" / "ledger.db")) as connection:
        return connection.execute(query).fetchone()[0]


async def test_the_result_may_come_at_once(daemon: DaemonProcess, client: Client) -> None:
    """And what is posted is the job: its configuration, variables, who it is."""
    with RenderService() as service:
        serve(daemon, service.port)
        await client.submit("http", "1", {"url": service.url, "scene": "a beach"})
        end = await client.end_of("1")
    assert (end["status"], end["result"]) == ("COMPLETED", "rendered a beach")
    assert end["jobContextVariables"] == {"frames": 10, "scene": "a beach"}
    async with Scripted([response(200, {"result": "ok"})]) as scripted:
        daemon.stop()
        serve(daemon, scripted.port)
        variables = {"from": "before"}
        await client.submit(
            "http", "2", {"url": scripted.url, "scene": "x"}, jobContextVariables=variables, workflowId="w"
        )
        await client.end_of("2")
    [posted] = scripted.requests
    assert posted.body == {
        "executionId": "2",
        "workflowId": "w",
        "action": "http",
        "attempt": 1,
        "configuration": {"scene": "x"},
        "jobContextVariables": variables,
        "workflowContextVariables": {},
    }
    assert (posted.method, posted.path, posted.headers["idempotency-key"]) == ("POST", "/jobs", "2-1")


async def test_the_service_is_polled(daemon: DaemonProcess, client: Client) -> None:
    """Over a restart of the daemon; with progress and the service's own identifier; its failure is the job's."""
    with RenderService() as service:
        serve(daemon, service.port)
        await client.submit("http", "1", {"url": service.url, "scene": "a wood", "seconds": 5})
        await client.until(lambda: any(0 < told["progress"] < 100 for told in client.of("1")))
        daemon.stop()
        daemon.start()
        await client.submit("http", "2", {"url": service.url, "seconds": 0.5, "broken": True})
        end = await client.end_of("1")
        assert (end["status"], end["result"]) == ("COMPLETED", "rendered a wood")
        assert (end["externalId"], end["attempt"]) == ("render-1", 1)
        assert any("frame" in told["message"] for told in client.of("1"))
        failed = await client.end_of("2")
        assert failed["status"] == "FAILED"
        assert failed["error"]["message"] == "OutOfPaint: no blue left"


async def test_the_service_reports_itself(daemon: DaemonProcess, client: Client) -> None:
    """To the daemon's HTTP port, with the token it was given; it is not polled, as there is nothing to look at."""
    port = free_port()
    with RenderService("--report", "callback") as service:
        callback = f'callback_base_url = "http://127.0.0.1:{port}"'
        serve(daemon, service.port, more=callback, http_port=port)
        await client.submit("http", "1", {"url": service.url, "scene": "a sea", "seconds": 3})
        await client.submit("http", "2", {"url": service.url, "seconds": 60})
        end = await client.end_of("1")
        assert (end["status"], end["result"], end["progress"]) == ("COMPLETED", "rendered a sea", 100)
        assert [told["progress"] for told in client.of("1")] == sorted(
            told["progress"] for told in client.of("1")
        )
        assert len(client.of("1")) > 5
        daemon.jef("show", "2")
        await client.until(lambda: any(told["progress"] for told in client.of("2")), 20)
        await _cancel(client, "2")
        assert (await client.end_of("2"))["status"] == "CANCELLED"
    assert not [event for event in daemon.events() if event["event"] == "poll_failed"]


async def test_cancel_reaches_the_service(daemon: DaemonProcess, client: Client) -> None:
    """DELETE at the status address; what it says then ends the job."""
    with RenderService() as service:
        serve(daemon, service.port)
        await client.submit("http", "1", {"url": service.url, "seconds": 600})
        await client.until(lambda: any(told.get("externalId") for told in client.of("1")))
        await _cancel(client, "1")
        end = await client.end_of("1")
    assert (end["status"], end["message"]) == ("CANCELLED", "stopped")


async def test_cancel_goes_where_the_operator_says(daemon: DaemonProcess, client: Client) -> None:
    """A foreign identifier stays within its place in the address."""
    taken = response(202, {"externalId": "../other?x"}, Location="/state")
    running = response(200, {"status": "RUNNING"})
    async with Scripted([taken, *[running] * 3, response(204)]) as service:
        more = f'cancel_url = "http://127.0.0.1:{service.port}/stop/{{externalId}}"\ncancel_method = "POST"'
        serve(daemon, service.port, more=more)
        await client.submit("http", "1", {"url": service.url})
        await client.until(lambda: any(told.get("externalId") for told in client.of("1")))
        service._responses = [response(204)]
        await _cancel(client, "1")
        assert (await client.end_of("1"))["status"] == "CANCELLED"
    asked = [one for one in service.requests if one.method == "POST"][-1]
    assert asked.path == "/stop/%2E%2E%2Fother%3Fx"


async def _cancel(client: Client, execution_id: str) -> None:
    body = json.dumps({"command": "cancel", "executionId": execution_id}).encode()
    await client.channel.default_exchange.publish(aio_pika.Message(body), f"{client.prefix}.control")


async def test_only_allowed_hosts_are_talked_to(daemon: DaemonProcess, client: Client) -> None:
    """Neither named by the job nor by a service's answer; and none at all before somebody names some."""
    async with Scripted([response(200)]) as secret:
        status = f"http://127.0.0.1:{secret.port}/status"
        async with Scripted([response(202, Location=status)]) as service:
            serve(daemon, service.port)
            for name, url in {
                "direct": secret.url,
                "location": service.url,
                "file": "file:///etc/passwd",
            }.items():
                await client.submit("http", name, {"url": url})
                end = await client.end_of(name)
                assert end["error"]["type"] == "ConfigurationRefused", end
            daemon.stop()
            daemon.configure()
            daemon.start()
            await client.submit("http", "none", {"url": service.url})
            end = await client.end_of("none")
            assert "plain_http" in end["error"]["message"]
            await client.submit("http", "tls", {"url": "https://127.0.0.1/"})
            end = await client.end_of("tls")
            assert "no hosts are allowed; set allowed_hosts" in end["error"]["message"]
    assert secret.requests == []


async def test_redirects_stay_with_the_host(daemon: DaemonProcess, client: Client) -> None:
    """Within it they are followed where that is safe; to another, allowed or not, never."""
    async with Scripted([response(200)]) as other:
        cases: dict[str, tuple[list[bytes], str, int]] = {
            "away": ([response(307, Location=other.url)], "redirects to another host", 1),
            "away-303": ([response(303, Location=other.url)], "redirects to another host", 1),
            "changed": ([response(302, Location="/there")], "with a redirect 302", 1),
            "loop": ([response(307, Location="/jobs")], "more than 3 redirects", 4),
            "same": ([response(307, Location="/there"), response(200, {"result": "ok"})], "", 2),
        }
        for name, (responses, said, requests) in cases.items():
            async with Scripted(responses) as service:
                serve(daemon, service.port, other.port)
                await client.submit("http", name, {"url": service.url})
                end = await client.end_of(name)
                daemon.stop()
            assert said in (end["error"]["message"] if said else end["result"] + "ok"), name
            assert end["status"] == ("FAILED" if said else "COMPLETED")
            assert len(service.requests) == requests
    assert other.requests == []


async def test_answers_that_are_none(daemon: DaemonProcess, client: Client) -> None:
    """Too long, cut off, nonsense, compressed, late, or no: FAILED, each with its sentence."""
    big = b'{"result": "' + b"x" * 5000 + b'"}'
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n"
    cases: dict[str, tuple[bytes, str]] = {
        "long": (response(200, big), "longer than 4096 bytes"),
        "endless": (endless + b"1000\r\n" + b" " * 4096 + b"\r\n", "longer than 4096 bytes"),
        "cut": (response(200, {"result": "x"})[:-3], "broke"),
        "html": (response(200, b"<html>"), "no answer"),
        "list": (response(200, []), "no answer"),
        "types": (response(200, {"jobContextVariables": 5}), "jobContextVariables"),
        "gzip": (response(200, b"\x1f\x8b", Content_Encoding="gzip"), "compressed"),
        "no": (response(422, {"message": "no such scene"}), '422: {"message": "no such scene"}'),
        "error": (response(500), "answered 500"),
        "homeless": (response(202), "no address to look at"),
        "garbage": (b"\x00\x01\r\n\r\n", "broke"),
    }
    servers = {name: Scripted([answer]) for name, (answer, _) in cases.items()}
    for server in servers.values():
        await server.__aenter__()
    serve(daemon, *(server.port for server in servers.values()), more="max_response_bytes = 4096")
    try:
        for name, server in servers.items():
            await client.submit("http", name, {"url": server.url})
        for name, (_, said) in cases.items():
            end = await client.end_of(name)
            assert (end["status"], end["error"]["type"]) == ("FAILED", FAILURE), end
            assert said in end["error"]["message"], (name, end["error"])
            assert len(servers[name].requests) == 1, name
    finally:
        for server in servers.values():
            await server.__aexit__()


async def test_what_is_safe_is_sent_again(daemon: DaemonProcess, client: Client) -> None:
    """Turned away: again with the same key. No connection: again. Sent and not answered: never."""
    turned_away = [response(503, Retry_After="0"), response(429, Retry_After="0"), response(502)]
    async with (
        Scripted([*turned_away, response(200, {"result": "at last"})]) as busy,
        Scripted([b""]) as silent,
        Scripted([response(503, Retry_After="0")]) as down,
    ):
        port = free_port()
        serve(daemon, busy.port, silent.port, down.port, port, more="connect_timeout_s = 1")
        await client.submit("http", "busy", {"url": busy.url})
        assert (await client.end_of("busy"))["result"] == "at last"
        assert [one.headers["idempotency-key"] for one in busy.requests] == ["busy-1"] * 4
        await client.submit("http", "silent", {"url": silent.url})
        assert (await client.end_of("silent"))["status"] == "FAILED"
        assert len(silent.requests) == 1
        await client.submit("http", "down", {"url": down.url})
        assert "answered 503" in (await client.end_of("down"))["error"]["message"]
        assert len(down.requests) == 4
        await client.submit("http", "late", {"url": f"http://127.0.0.1:{port}/renders"})
        await client.until(lambda: "RUNNING" in client.statuses("late"))
        with RenderService(port=port):
            assert (await client.end_of("late"))["status"] == "COMPLETED"


async def test_a_slow_service_is_not_waited_for(daemon: DaemonProcess, client: Client) -> None:
    """One that drips a byte now and then keeps nobody longer than the limit."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    serve(daemon, port, more="timeout_s = 1")
    began = time.monotonic()
    await client.submit("http", "1", {"url": f"http://127.0.0.1:{port}/"})
    end = await client.end_of("1")
    server.close()
    assert "did not answer within 1 s" in end["error"]["message"]
    assert time.monotonic() - began < 15


async def test_tls_is_verified(daemon: DaemonProcess, client: Client, tmp_path: Path) -> None:
    """Against the operator's authority; without it the same service is not talked to."""
    made = certificate(tmp_path)
    with RenderService("--certificate", str(made)) as service:
        url = service.url.replace("http:", "https:")
        daemon.configure(f'[actions.http]\nallowed_hosts = ["127.0.0.1:{service.port}"]\nsend_attempts = 1\n')
        daemon.start()
        await client.submit("http", "unknown", {"url": url})
        end = await client.end_of("unknown")
        assert "certificate verify failed" in end["error"]["message"].lower()
        daemon.stop()
        trust = tmp_path / "certificate.pem"
        daemon.configure(
            f'[actions.http]\nallowed_hosts = ["127.0.0.1:{service.port}"]\nca_file = "{trust}"\n'
        )
        daemon.start()
        await client.submit("http", "known", {"url": url, "scene": "a safe"})
        assert (await client.end_of("known"))["result"] == "rendered a safe"


async def test_secrets_are_sent_and_never_told(daemon: DaemonProcess, client: Client, tmp_path: Path) -> None:
    """From files, read anew each time; not in the log, the ledger or a notification."""
    secret = tmp_path / "authorization"
    secret.write_text("Bearer an-old-secret\n")
    with RenderService("--authorization", SECRET) as service:
        serve(daemon, service.port, more=f'headers = {{ Authorization = "{secret}" }}')
        await client.submit("http", "old", {"url": service.url})
        assert "answered 401" in (await client.end_of("old"))["error"]["message"]
        secret.write_text(SECRET + "\n")
        await client.submit("http", "new", {"url": service.url, "seconds": 0.2})
        assert (await client.end_of("new"))["status"] == "COMPLETED"
        secret.write_text(f"{SECRET}\nX-Injected: yes")
        await client.submit("http", "injected", {"url": service.url})
        assert "what is no header" in (await client.end_of("injected"))["error"]["message"]
        secret.unlink()
        await client.submit("http", "gone", {"url": service.url})
        assert "cannot be read" in (await client.end_of("gone"))["error"]["message"]
    daemon.stop()
    everything = daemon.log.read_bytes() + json.dumps(client.told).encode()
    everything += (daemon.folder / "data" / "ledger.db").read_bytes()
    assert b"the-secret-of" not in everything
    assert b"an-old-secret" not in everything


async def test_wrong_tokens_of_callbacks_change_nothing(daemon: DaemonProcess, client: Client) -> None:
    """The callback that a service is given is good for its job, and its attempt, alone."""
    port = free_port()
    taken = response(202)
    async with Scripted([taken]) as service:
        callback = f'callback_base_url = "http://127.0.0.1:{port}"'
        serve(daemon, service.port, more=callback, http_port=port)
        for name in ("1", "2:x"):
            await client.submit("http", name, {"url": service.url})
        await client.until(lambda: len(service.requests) == 2)
        launched = "select count(distinct execution_id) from history where event = 'Launched'"
        await client.until(lambda: of_ledger(daemon, launched) == 2)
        deadline = of_ledger(daemon, "select update_deadline from executions where execution_id = '1'")
        await client.until(lambda: of_ledger(daemon, "select count(*) from calls") == 0)
        await asyncio.sleep(0.5)  # what a poll means is written a moment after it
        still = of_ledger(daemon, "select update_deadline from executions where execution_id = '1'")
        assert still == deadline, "looking at nothing was taken for a sign of life"
    jobs = {one.body["executionId"]: one.body["callback"] for one in service.requests}
    async with httpx.AsyncClient(trust_env=False) as anybody:
        update = {"status": "COMPLETED", "result": "mine"}
        crossed = {"Authorization": f"Bearer {jobs['1']['token']}"}
        answer = await anybody.post(jobs["2:x"]["url"], json=update, headers=crossed)
        assert answer.status_code == 409
        own = {"Authorization": f"Bearer {jobs['2:x']['token']}"}
        assert (await anybody.post(jobs["2:x"]["url"], json=update, headers=own)).status_code == 200
    assert (await client.end_of("2:x"))["result"] == "mine"
    assert client.statuses("1")[-1] == "RUNNING"
