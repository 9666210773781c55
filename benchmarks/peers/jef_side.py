"""jef_daemon: acknowledged when the request is in its ledger."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import job
from pydantic import BaseModel

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext

HERE = Path(__file__).resolve().parent


class Nothing(ActionExecutor):
    """The job."""

    action = "nothing"

    class Configuration(BaseModel):
        """What it is to do."""

        number: int
        seconds: float

    async def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        """Work for so long."""
        wanted = context.configuration
        job.begins(wanted.number)
        if wanted.seconds:
            await asyncio.sleep(wanted.seconds)
        job.ends(wanted.number)
        return ActionExecutorResponse(result="done")


def configure(folder: Path) -> Path:
    """A configuration; its data are in the same folder."""
    file = folder / "jef.toml"
    file.write_text(
        f'amqp_url = "{job.URL}"\nprefix = "{job.PREFIX}"\ndata_dir = "{folder / "data"}"\n'
        f'python_path = ["{HERE}"]\n[slots]\ntotal = 200\n[logging]\nformat = "json"\n'
        '[actions.nothing]\nexecutor = "jef_side:Nothing"\n'
        f"may_run_again = {os.environ['PEER_MAY_RUN_AGAIN'].lower()}\n"
    )
    return file


async def _fill(count: int, seconds: float) -> None:
    import aio_pika

    connection = await aio_pika.connect(job.URL)
    channel = await connection.channel()
    jobs = await channel.get_exchange(f"{job.PREFIX}.jobs")
    for start in range(0, count, 200):
        numbers = range(start, min(count, start + 200))
        bodies = [
            f'{{"executionId": "b{number}", "configuration": {{"number": {number}, "seconds": {seconds}}}}}'
            for number in numbers
        ]
        messages = [
            aio_pika.Message(body.encode(), content_type="application/json", delivery_mode=2)
            for body in bodies
        ]
        await asyncio.gather(*(jobs.publish(message, "nothing") for message in messages))
    await connection.close()


def _declare(folder: Path) -> None:
    """Let a daemon make its queues, and go."""
    command = [sys.executable, "-m", "jef_daemon", "run", "--config", str(configure(folder))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as daemon:
        assert daemon.stdout is not None
        while b'"ready"' not in (line := daemon.stdout.readline()):
            assert line, "the daemon ended before it was ready"
        daemon.terminate()
        daemon.communicate()


if __name__ == "__main__":
    _declare(Path(os.environ["PEER_TRACE"]).parent)
    asyncio.run(_fill(int(sys.argv[1]), float(sys.argv[2])))
