"""A fault of ours that one message meets, whichever it is, ends neither the daemon nor what is beside that message.

Made by hand: rows of the ledger that nobody can read. They stand for every fault that we do not know of.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from tests.support.amqp import Client
from tests.support.process import DaemonProcess


def change(daemon: DaemonProcess, statement: str, *values: str) -> None:
    with sqlite3.connect(daemon.folder / "data" / "ledger.db", timeout=10) as ledger:
        assert ledger.execute(statement, values).rowcount == 1


async def asking(client: Client, queue: str, body: dict[str, Any]) -> dict[str, Any]:
    answers = await client.channel.declare_queue(exclusive=True)
    await client.send(queue, body, reply_to=answers.name)
    return await client.until_answered(answers, 8)


async def test_a_job_that_cannot_be_read_stops_no_other(daemon: DaemonProcess, client: Client) -> None:
    """Whatever concerns it becomes a dead letter, and is answered; a job that runs is not disturbed."""
    daemon.start()
    await client.submit("slow", "beside", {"seconds": 4})
    await client.submit("quick", "spoiled")
    await client.end_of("spoiled")
    change(daemon, "UPDATE executions SET status = 'NONSENSE' WHERE execution_id = ?", "spoiled")
    for name in ("before", "spoiled", "behind"):
        await client.submit("quick", name)
    update = {"executionId": "spoiled", "status": "RUNNING", "token": "none"}
    answers = [
        await asking(client, "updates", update),
        await asking(client, "control", {"command": "cancel", "executionId": "spoiled"}),
    ]
    for answer in answers:
        assert answer["accepted"] is False
        assert answer["reason"].startswith("message-failed: to take it failed, by a fault of the daemon: ")
    for name in ("before", "behind", "beside"):
        assert (await client.end_of(name))["status"] == "COMPLETED"
    letters = await client.dead_letters(3)
    assert {letter.headers["x-jef-reason"] for letter in letters} == {"message-failed"}
    keys = {letter.headers["x-jef-routing-key"] for letter in letters}
    assert keys == {"quick", f"{client.prefix}.updates", f"{client.prefix}.control"}
    failed = [event for event in daemon.events() if event["event"] == "message_failed"]
    assert len(failed) == 3
    assert all("NONSENSE" in json.dumps(event) for event in failed)
    assert daemon.stop() == 0
    daemon.start()
    await client.submit("quick", "again")
    assert (await client.end_of("again"))["status"] == "COMPLETED"


async def test_a_workflow_that_cannot_be_read_stops_no_other(daemon: DaemonProcess, client: Client) -> None:
    """Nor a start; mended, and the dead letter sent again, it goes on."""
    folder = daemon.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    stages = "[{name: a, action: away, elsewhere: true}, {name: b, action: quick}]"
    (folder / "w.yaml").write_text(f"name: w\nstages: {stages}\n")
    daemon.start()
    away = await client.channel.declare_queue(f"{client.prefix}.jobs.away", durable=True)
    await away.bind(f"{client.prefix}.jobs", "away")
    for name in ("spoiled", "other"):
        await client.start_workflow("w", name)
    await client.until(lambda: all(len(client.of_workflow(name)) == 2 for name in ("spoiled", "other")))
    with sqlite3.connect(daemon.folder / "data" / "ledger.db") as ledger:
        [state] = ledger.execute("SELECT state FROM workflows WHERE workflow_id = 'spoiled'").fetchone()
    change(daemon, "UPDATE workflows SET state = '{' WHERE workflow_id = ?", "spoiled")
    for name in ("spoiled", "other"):
        await client.tell(
            "away.completed", {"executionId": f"{name}:a:1", "status": "COMPLETED", "sequence": 3}
        )
    assert (await client.end_of_workflow("other"))["status"] == "COMPLETED"
    daemon.wait_for("message_failed")
    daemon.stop()
    begin = daemon.log.stat().st_size
    daemon.start()
    daemon.wait_for("workflow_unreadable", begin)
    change(daemon, "UPDATE workflows SET state = ? WHERE workflow_id = ?", str(state), "spoiled")
    replayed = daemon.jef("dead-letters", "replay", "--reason", "message-failed")
    assert "1 sent again" in replayed.stdout, replayed.stdout + replayed.stderr
    assert (await client.end_of_workflow("spoiled"))["status"] == "COMPLETED"
