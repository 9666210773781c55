"""What every side's job does: says that it began, works for so long, tells its statuses, says that it ended."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

URL = os.environ["PEER_URL"]
PREFIX = os.environ["PEER_PREFIX"]
IS_TOLD = os.environ["PEER_MODE"] == "told"
STATUS = f"{PREFIX}.status"
"""The exchange of notifications."""
QUEUE = f"{PREFIX}.jobs"
WORDS = ("QUEUED", "RUNNING", "COMPLETED")
_trace = os.open(os.environ["PEER_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def begins(number: int) -> None:
    """A line in the file that all processes share."""
    os.write(_trace, f"b{number:07d}\n".encode())


def ends(number: int) -> None:
    """Another."""
    os.write(_trace, f"e{number:07d}\n".encode())


def notification(number: int, word: str) -> bytes:
    """As long as one of the daemon's."""
    body = {
        "executionId": f"b{number}",
        "workflowId": None,
        "progress": 100 if word == "COMPLETED" else 0,
        "message": "",
        "status": word,
        "action": "nothing",
        "attempt": 1,
        "sequence": WORDS.index(word) + 1,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    return json.dumps(body).encode()


def routing_key(word: str) -> str:
    """As the daemon's."""
    return f"nothing.{word.lower()}"
